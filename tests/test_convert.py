"""`ridfr convert` for weights; tests/test_face_model.py has it for recognisers."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from ridfr_core import checkpoints, cli

STATE = {
    "image_proj": {"latents": torch.rand(1, 2, 3), "proj_in.weight": torch.rand(3, 4)},
    "ip_adapter": {"1.to_k_ip.weight": torch.rand(3, 3).half()},
}


def convert(*args):
    cli.main(["convert", *map(str, args)])


def test_an_adapters_pickle_becomes_safetensors(tmp_path, capsys):
    torch.save(STATE, tmp_path / "adapter.bin")
    convert(tmp_path / "adapter.bin")
    state = load_file(tmp_path / "adapter.safetensors")
    want = {f"{part}.{key}": weight for part, weights in STATE.items() for key, weight in weights.items()}
    assert state.keys() == want.keys()
    assert all(torch.equal(state[key], want[key]) and state[key].dtype == want[key].dtype for key in want)
    assert "3 tensors, an identity adapter" in capsys.readouterr().out


def test_shared_tensors_are_written_apart(tmp_path):
    weight = torch.rand(4, 4)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": weight.T}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "y.safetensors")
    state = load_file(tmp_path / "y.safetensors")
    assert torch.equal(state["b.weight"], weight) and torch.equal(state["c.weight"], weight.T)


def test_what_shares_no_memory_is_not_copied_to_be_written():
    """Weights have gigabytes."""
    weight, other = torch.rand(4, 4), torch.rand(2)
    apart = checkpoints._apart({"a": weight, "b": other, "c": weight[:2], "d": weight.T})
    assert apart["a"] is weight and apart["b"] is other
    assert len({tensor.untyped_storage().data_ptr() for tensor in apart.values()}) == 4
    assert torch.equal(apart["c"], weight[:2]) and torch.equal(apart["d"], weight.T)


def not_there(folder):
    return [folder / "none.bin"]


def taken(folder):
    torch.save(STATE, folder / "a.bin")
    (folder / "a.safetensors").write_text("mine")
    return [folder / "a.bin"]


def text(folder):
    (folder / "a.bin").write_text("<html>")
    return [folder / "a.bin"]


def damaged_onnx(folder):
    (folder / "a.onnx").write_bytes(b"<html>404</html>")
    return [folder / "a.onnx"]


def no_folder(folder):
    torch.save(STATE, folder / "a.bin")
    return [folder / "a.bin", folder / "none" / "a.safetensors"]


def pipe(folder):
    os.mkfifo(folder / "a.bin")
    return [folder / "a.bin"]


def a_folder(folder):
    (folder / "a.bin").mkdir()
    return [folder / "a.bin"]


def broken_link(folder):
    torch.save(STATE, folder / "a.bin")
    (folder / "a.safetensors").symlink_to(folder / "none")
    return [folder / "a.bin"]


def nan(folder):
    torch.save({"a": torch.tensor(float("nan"))}, folder / "a.bin")
    return [folder / "a.bin"]


def sparse(folder):
    torch.save({"a": torch.eye(2).to_sparse()}, folder / "a.bin")
    return [folder / "a.bin"]


def no_weights(folder):
    torch.save({"state_dict": None}, folder / "a.bin")
    return [folder / "a.bin"]


def no_text(folder):
    torch.save({"a\ud800": torch.ones(1)}, folder / "a.bin")
    return [folder / "a.bin"]


def long_name(folder):
    torch.save(STATE, folder / "a.bin")
    return [folder / "a.bin", folder / ("x" * 300)]


def nothing(folder):
    return [folder / ("x" * 300)]


def here(folder):
    return ["."]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (not_there, "does not exist"),
        (taken, "is there already"),
        (text, "neither safetensors nor a PyTorch file"),
        (damaged_onnx, "a.onnx cannot be read as ONNX"),
        (no_folder, "cannot be written"),
        pytest.param(pipe, "is not a file", marks=pytest.mark.skipif(os.name == "nt", reason="pipes are Unix's")),
        (a_folder, "is a folder"),
        (broken_link, "is there already"),
        (nan, "holds NaN or infinite numbers in a,"),
        (sparse, "holds a as a sparse"),
        (no_weights, "holds no weights"),
        (no_text, "cannot be written"),
        (long_name, "cannot be written"),
        (nothing, "cannot be read"),
        (here, "is a folder"),
    ],
)
def test_what_cannot_be_converted(tmp_path, capsys, make, words):
    """One sentence, exit code 2, and nothing is left behind or lost."""
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        convert(*arguments)
    assert end.value.code == 2
    said = capsys.readouterr().out
    assert words in said and said.endswith(".\n") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    if make is taken:
        assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_a_full_disk(tmp_path, capsys):
    """Stood in for by a limit to the size of files. Nothing half-written stays."""
    resource = pytest.importorskip("resource")
    torch.save({"a": torch.rand(100_000)}, tmp_path / "a.bin")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            convert(tmp_path / "a.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert end.value.code == 2
    assert "cannot be written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
