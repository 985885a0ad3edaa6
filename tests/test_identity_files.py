"""Saved identities: what comes back, what a file may be called, what is no saved identity."""

import unicodedata
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ridfr_core import checkpoints
from ridfr_core.checkpoints import CheckpointError
from ridfr_core.identity import Identity, IdentityError, Person, Quality
from ridfr_core.identity_files import file_name, load_identity, new_files, save_identity


def ann(clip=True, quality=True, width=512):
    person = Person(
        F.normalize(torch.randn(2, width), dim=1),
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


def test_a_loaded_person_does_not_hang_on_the_file(tmp_path):
    """What safetensors reads is a view of the file: Windows would not let it be replaced, and a change would show."""
    path = tmp_path / "ann.safetensors"
    save_identity(ann(), path)
    loaded = load_identity(path)
    person, before = loaded.people[0], load_file(path)
    tensors = {name: getattr(person, name) for name in ("embeddings", "clip", "weights")}
    tensors["clip_uncond"] = loaded.clip_uncond
    before = {name: before[name].clone() for name in tensors}
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(path.read_bytes()[:8], "little"))
        file.write(bytes(path.stat().st_size - file.tell()))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


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
        ("名" * 80, "名" * 33),
        ("🙂" * 70, "🙂" * 25),
        ("a" + "🙂" * 70, "a" + "🙂" * 24),
        ("a\ud800b", "a_b"),
        ("\u202eexe.txt", "_exe.txt"),
        ("a\u2066b\u2028c\u200bd", "a_b_c_d"),
        ("山田\u3000太郎\u00a0", "山田 太郎"),
        ("com¹", "_com¹"),
        ("LPT³.x", "_LPT³.x"),
        ("com0", "_com0"),
        ("Com10", "Com10"),
        ("x" * 99 + " y", "x" * 99),
    ],
)
def test_file_names(typed, name):
    assert file_name(typed) == f"{name}.safetensors" and file_name(typed, 2) == f"{name} 2.safetensors"


@pytest.mark.parametrize(
    "typed", ["\x00" * 3 + "a", "e\u0301" * 99, "~root", "-rf", "%00", "a" + "\u0300" * 200, "／etc"]
)
def test_every_file_system_takes_the_names(tmp_path, typed):
    (file,) = new_files(tmp_path, typed, 1)
    (tmp_path / file_name(typed, 9999, 99999)).touch()
    file.touch()
    assert file.parent == tmp_path and len(file_name(typed, 9999, 99999).encode()) < 143
    assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") for sign in file.name)


def test_the_second_of_a_name_is_counted(tmp_path):
    def names(people, overwrite=False):
        files = new_files(tmp_path, "Ann", people, overwrite)
        [file.touch() for file in files]
        return [file.stem for file in files]

    assert names(1) == ["Ann"]
    assert names(1) == ["Ann_00002"]
    assert names(2) == ["Ann 1", "Ann 2"]
    (tmp_path / "Ann 2_00002.safetensors").touch()
    assert names(2) == ["Ann 1_00003", "Ann 2_00003"], "all files of one save have one number"
    assert names(1, overwrite=True) == ["Ann"]
    (tmp_path / "Ann_00003.safetensors").symlink_to(tmp_path / "none")
    assert names(1) == ["Ann_00004"]


@pytest.mark.parametrize(
    "typed", ["", "  ", "...", "/", "\\\\", "\x00", "\ud800", "\u200b\u202e", "\u3000", "_ _", "/" * 500]
)
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
    save_file(tensors, path, META if metadata is None else metadata)


UNIT = F.normalize(torch.randn(2, 512, generator=torch.Generator().manual_seed(1)), dim=1)
META = {"format": "ridfr-identity", "version": "1", "recogniser": "x", "recogniser_sha256": "a" * 64}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"metadata": {}}, "'ann.safetensors' is not a saved identity"),
        ({"metadata": {"format": "ridfr-identity", "version": "2"}}, "of version 2 and this pack reads 1"),
        ({"metadata": META | {"version": "1\n" * 10**6}}, "of version 1 1 1 .*[.][.][.] and this pack reads 1"),
        ({"metadata": {k: v for k, v in META.items() if k != "recogniser"}}, "does not say its recogniser\\)"),
        ({"metadata": {k: v for k, v in META.items() if k != "recogniser_sha256"}}, "not say its recogniser_sha256"),
        ({"embeddings": None}, "embeddings is missing"),
        ({"weights": None}, "weights is missing"),
        ({"thumbnails": None}, "thumbnails is missing"),
        ({"clip_uncond": None}, "clip or clip_uncond is missing"),
        ({"clip": None}, "clip or clip_uncond is missing"),
        ({"embeddings": torch.tensor(1.0)}, r"embeddings has the shape \[\] and should have 2 dimensions"),
        ({"embeddings": torch.ones(0, 512)}, r"embeddings has the shape \[0, 512\] and should have 2"),
        ({"embeddings": torch.ones(2, 0)}, r"embeddings has the shape \[2, 0\] and should have 2"),
        ({"embeddings": UNIT[:, :256].contiguous()}, "the embedding of photo . has the length 0.* instead of 1"),
        ({"embeddings": UNIT * torch.tensor([[1.0], [1.1]])}, "the embedding of photo 2 has the length 1.1 instead"),
        ({"embeddings": UNIT * 3e38}, "the embedding of photo . has the length inf instead of 1"),
        ({"embeddings": UNIT * 0}, "the embedding of photo 1 has the length 0 instead of 1"),
        ({"embeddings": torch.eye(2, dtype=torch.int32)}, "embeddings has numbers of the type int32"),
        ({"embeddings": UNIT * float("nan")}, "holds NaN or infinite numbers in embeddings"),
        ({"weights": torch.tensor(1.0)}, r"weights has the shape \[\] and should have \[2\]"),
        ({"weights": torch.ones(3)}, r"weights has the shape \[3\] and should have \[2\]"),
        ({"weights": torch.tensor([1.0, -1.0])}, "weights has numbers below 0"),
        ({"weights": torch.zeros(2)}, "All photos of 'ann.safetensors' have weight 0"),
        ({"weights": torch.full((2,), 1e300, dtype=torch.float64)}, "NaN or infinite numbers in weights"),
        ({"thumbnails": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}, r"thumbnails has the shape \[2, 3, 64, 64\]"),
        ({"thumbnails": torch.zeros(2, 3, 112, 112)}, "thumbnails has numbers of the type float32"),
        ({"quality": torch.ones(2, 2)}, r"quality has the shape \[2, 2\] and should have \[2, 4\]"),
        ({"clip": torch.ones(2, 8)}, r"clip has the shape \[2, 8\] and should have 3 dimensions"),
        ({"clip": torch.ones(2, 3, 9)}, r"clip_uncond has the shape \[3, 8\] and should have \[3, 9\]"),
        ({"clip_uncond": torch.tensor(1.0)}, r"clip_uncond has the shape \[\] and should have \[3, 8\]"),
        ({"clip_uncond": torch.ones(1, 8)}, r"clip_uncond has the shape \[1, 8\] and should have \[3, 8\]"),
        ({"clip": torch.full((2, 3, 8), float("inf"))}, "NaN or infinite numbers in clip"),
    ],
)
def test_files_that_are_no_identity(saved, changes, says):
    """One sentence, which names the file."""
    rewrite(saved, **changes)
    with pytest.raises((IdentityError, CheckpointError), match=says) as caught:
        load_identity(saved)
    message = str(caught.value)
    assert "'ann.safetensors'" in message and "\n" not in message and message.endswith(".") and len(message) < 400


def test_a_file_of_too_many_photos(saved):
    count = 10_001
    rewrite(saved, embeddings=torch.ones(count, 1), weights=torch.ones(count))
    with pytest.raises(IdentityError, match="has 10001 photos, more than 10000"):
        load_identity(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_coarse_numbers_become_float32(saved, dtype):
    before = load_identity(saved).people[0]
    coarse = ("embeddings", "clip", "weights", "quality", "clip_uncond")
    rewrite(saved, **{name: tensor.to(dtype) for name, tensor in load_file(saved).items() if name in coarse})
    after = load_identity(saved).people[0]
    assert after.embeddings.dtype == after.clip.dtype == after.weights.dtype == torch.float32
    torch.testing.assert_close(after.embeddings.norm(dim=1), torch.ones(2), rtol=0, atol=1.1e-5)
    assert (after.embeddings * before.embeddings).sum(1).min() > 0.99


def test_recognisers_of_another_width_and_names_of_any_kind(tmp_path):
    before = replace(ann(width=128), recogniser="odd\nname" * 100)
    save_identity(before, tmp_path / "x.safetensors")
    after = load_identity(tmp_path / "x.safetensors")
    assert torch.equal(after.people[0].embeddings, before.people[0].embeddings)
    assert after.recogniser.startswith("odd name") and len(after.recogniser) < 100


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "identities").touch()
    with pytest.raises(CheckpointError, match="cannot be written .*: check the folder"):
        save_identity(ann(), tmp_path / "identities" / "ann.safetensors")


def test_a_file_cut_short(saved):
    saved.write_bytes(saved.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="'ann.safetensors' is damaged or cut short"):
        load_identity(saved)
