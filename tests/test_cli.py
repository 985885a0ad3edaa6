"""The command line: what ends in a sentence and what does not, code pages, missing packages."""

import io
import sys

import pytest

from ridfr_core import cli
from ridfr_core.commands import train
from ridfr_core.errors import RidfrError


@pytest.mark.parametrize("package, arguments", [
    ("diffusers", ["train", "nano", "--work", "WORK", "vae"]),
    ("transformers", ["train", "nano", "--work", "WORK", "vae"]),
    ("accelerate", ["train", "content", "data=x", "base=nano", "out=WORK"]),
    ("tqdm", ["train", "content", "data=x", "base=nano", "out=WORK"]),
    ("diffusers", ["train", "content", "data=x", "base=nano", "out=WORK"]),
    ("accelerate", ["evaluate", "folder", "x", "--out", "WORK"]),
    ("transformers", ["evaluate", "folder", "x", "--out", "WORK"]),
    ("matplotlib", ["evaluate", "nano", "--report", "--work", "WORK"]),
    ("diffusers", ["evaluate", "nano", "--work", "WORK"]),
    ("diffusers", ["evaluate", "guidance", "--work", "WORK"]),
])
def test_a_missing_package_is_named_before_there_is_any_work(monkeypatch, tmp_path, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails as if it were not there
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(tmp_path / "work").join(argument.split("WORK")) for argument in arguments])
    assert stopped.value.code == (
        f"ridfr {arguments[0]} {arguments[1]}: {package} is not installed for this Python ({sys.executable}): run "
        f"`pip install -e '.[{arguments[0]}]'` in the pack's folder with it.")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("encoding, arrow", [("cp1252", "^"), ("ascii", "^"), ("utf-8", "↑")])
def test_a_code_page_without_arrows(monkeypatch, tmp_path, encoding, arrow):
    """The summary's arrows are in the file, and in what is printed as far as the code page has them."""
    data, out = tmp_path / "data", tmp_path / "out"
    cli.main(["evaluate", "portraits", str(data), "--people", "1", "--references", "1"])
    restored = out / "restored" / "0000" / "0.png"
    restored.parent.mkdir(parents=True)
    restored.write_bytes((data / "0000" / "lq" / "0.png").read_bytes())
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding, write_through=True))
    cli.main(["evaluate", "folder", str(data), "--out", str(out), "--measure-only", "--references", "0"])
    assert f"IDS-HQ {arrow}" in printed.getvalue().decode(encoding)
    assert "IDS-HQ ↑" in (out / "summary.md").read_text(encoding="utf-8")


def test_the_packs_own_errors_are_sentences_and_bugs_are_not(monkeypatch):
    def fails(error):
        def run(options):
            raise error
        monkeypatch.setattr(train, "run", run)
        cli.main(["train", "portraits", "somewhere"])

    with pytest.raises(SystemExit, match="^ridfr train portraits: one sentence$") as stopped:
        fails(RidfrError("one sentence"))
    assert stopped.value.code == "ridfr train portraits: one sentence"  # printed, and 1 for the shell
    with pytest.raises(SystemExit, match="'/x' cannot be read or written .No space left on device.: check"):
        fails(OSError(28, "No space left on device", "/x"))
    with pytest.raises(SystemExit, match="libGL.so.1: cannot open"):
        fails(ImportError("libGL.so.1: cannot open shared object file"))
    with pytest.raises(SystemExit) as stopped:
        fails(KeyboardInterrupt())
    assert stopped.value.code == 130
    for bug in (ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug"),
                ImportError("a bug", name="ridfr_core.nowhere")):
        with pytest.raises(type(bug)):
            fails(bug)


@pytest.mark.parametrize("arguments", [
    ["train", "portraits", "x", "--people", "0"],
    ["train", "nano", "--work", "x", "--threads", "0"],
    ["evaluate", "folder", "x", "--out", "y", "--guidance", "nan"],
    ["evaluate", "folder", "x", "--out", "y", "--id-preserving", "inf"],
    ["evaluate", "folder", "x", "--out", "y", "--steps", "1001"],
    ["evaluate", "folder", "x", "--out", "y", "--seeds", "0"],
    ["evaluate", "portraits", "x", "--people", "10001"],
    ["evaluate", "nano", "--work", "x", "--people", "0"],
    ["evaluate", "guidance", "--work", "x", "--ranges", "0.5-0.1"],
])
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 2
    assert any(words in said for words in ("too little", "too much", "not a finite", "not a part of the run"))
