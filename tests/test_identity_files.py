"""Saved identities: what comes back, what a file may be called, what is no saved identity."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ridfr_core import checkpoints
from ridfr_core.checkpoints import CheckpointError
from ridfr_core.identity import Identity, IdentityError, Person, Quality
from ridfr_core.identity_files import file_name, load_identity, save_identity


def ann(clip=True, quality=True):
    person = Person(
        torch.randn(2, 512),
        torch.randn(2, 3, 8) if clip else None,
        torch.tensor([1.0, 0.5]),
        (Quality(120.0, 0.875, 21.5, 0.75), Quality(64.0, 0.5, 10.0, 0.25)) if quality else (),
    )
    return Identity((person,), torch.randn(3, 8) if clip else None, "a" * 64, torch.rand(2, 3, 112, 112), "buffalo_l")


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("quality", [True, False])
def test_what_is_saved_comes_back(tmp_path, clip, quality):
    before = ann(clip, quality)
    save_identity(before, tmp_path / "new folder" / "ann.safetensors")
    after = load_identity(tmp_path / "new folder" / "ann.safetensors")
    assert (after.digest, after.recogniser) == (before.digest, before.recogniser)
    names = ("embeddings", "clip", "weights")
    pairs = [(getattr(after.people[0], name), getattr(before.people[0], name)) for name in names]
    for ours, theirs in [*pairs, (after.clip_uncond, before.clip_uncond)]:
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert after.people[0].quality == before.people[0].quality
    torch.testing.assert_close(after.thumbnails, before.thumbnails, rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ann.safetensors"
    save_identity(ann(), path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(CheckpointError, match="disk full.*check the folder and the free space"):
        save_identity(ann(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "typed, name",
    [
        ("Ann", "Ann"),
        ("Zoë Müller", "Zoë Müller"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a/b\\c:d*e?f", "a_b_c_d_e_f"),
        ("C:\\x", "C__x"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        (" .hidden. ", "hidden"),
        ("tab\there", "tab_here"),
        ("x" * 500, "x" * 100),
    ],
)
def test_file_names(typed, name):
    assert file_name(typed) == f"{name}.safetensors" and file_name(typed, 2) == f"{name} 2.safetensors"


@pytest.mark.parametrize("typed", ["", "  ", "...", "/", "\\\\"])
def test_no_name(typed):
    with pytest.raises(IdentityError, match="no name for a file"):
        file_name(typed)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ann.safetensors"
    save_identity(ann(), path)
    return path


def rewrite(path, metadata=None, **changes):
    """The file with other tensors; None takes one out."""
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    known = {"format": "ridfr-identity", "version": "1", "recogniser": "x", "recogniser_sha256": "a" * 64}
    save_file(tensors, path, known if metadata is None else metadata)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"metadata": {}}, "'ann.safetensors' is not a saved identity"),
        ({"metadata": {"format": "ridfr-identity", "version": "2"}}, "of version 2 and this pack reads 1"),
        ({"embeddings": None}, "'ann.safetensors' is no whole identity .embeddings"),
        ({"weights": torch.ones(3)}, "'ann.safetensors' is no whole identity .weights"),
        ({"clip_uncond": None}, "'ann.safetensors' is no whole identity .clip"),
    ],
)
def test_files_that_are_no_identity(saved, changes, says):
    rewrite(saved, **changes)
    with pytest.raises(IdentityError, match=says):
        load_identity(saved)


def test_a_file_cut_short(saved):
    saved.write_bytes(saved.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="'ann.safetensors' is damaged or cut short"):
        load_identity(saved)
