import hashlib
import os
import time

import pytest

from ridfr_core.errors import RidfrError
from ridfr_core.files import PARTIAL, sha256, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def half(partial):
        partial.write_text("half")
        raise OSError("disk\nfull")

    with pytest.raises(RidfrError, match="^not written: disk full$"):
        write_whole(path, half, lambda why: RidfrError(f"not written: {why}"))
    assert path.read_text() == "before"
    write_whole(path, lambda partial: partial.write_text("after"), RidfrError)
    assert path.read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    def write(partial):
        partial.mkdir()
        (partial / "new").touch()

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    write_whole(tmp_path / "a", write, RidfrError)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(RidfrError):
        write_whole(tmp_path / "a", lambda partial: partial.write_text("a"), RidfrError)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"] and len(list(tmp_path.iterdir())) == 1


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path):
    path = tmp_path / ("a" * 255)
    write_whole(path, lambda partial: partial.write_text("a"), RidfrError)
    assert path.read_text() == "a"


def test_partial_files_of_killed_runs_are_removed_and_no_others(tmp_path):
    """A browser's half download in the same folder has such a name, too."""
    old, young, folder = (tmp_path / PARTIAL.format(name) for name in ("1", "2", "3"))
    others = tmp_path / "film.partial", tmp_path / "a.12345678.partial"
    folder.mkdir()
    for path in (old, young, *others):
        path.write_bytes(b"x")
    for path in (old, folder, *others):
        os.utime(path, (time.time() - 7200,) * 2)
    write_whole(tmp_path / "c", lambda partial: partial.write_text("c"), RidfrError)
    assert {path.name for path in tmp_path.iterdir()} == {young.name, *(path.name for path in others), "c"}


def test_sha256_is_of_all_blocks(tmp_path):
    content = os.urandom((1 << 20) + 1)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
