"""Files and folders that are written whole or not at all; SHA-256 of a file."""

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .errors import RidfrError, in_one_line

PARTIAL = ".ridfr-{}.partial"  # the name while it is written; short, as `path` may have the longest name there can be
ABANDONED = 3600.0  # seconds without a change, after which nobody writes a partial file any more


def write_whole(path: Path, write: Callable[[Path], object], failed: Callable[[str], RidfrError],
                errors: tuple[type[Exception], ...] = (OSError,)) -> None:
    """Have `write` make a file or folder under another name beside `path`, and move it there when it is whole.

    That name is nobody else's, so several runs may write the same path; the last one stays.
    failed: makes the error to raise from the reason, if it cannot be written (the disk is full, ...); then what was
    at `path` is still there. errors: what `write` raises if it cannot write.
    """
    partial = path.with_name(PARTIAL.format(uuid.uuid4().hex))
    try:
        remove_abandoned(path.parent)
        write(partial)
        if partial.is_dir() and path.is_dir():  # a file never takes a folder's place
            remove(path)
        partial.replace(path)
    except errors as error:
        raise failed(in_one_line(error)) from error
    finally:
        with suppress(OSError):
            remove(partial)


def remove_abandoned(folder: Path) -> None:
    """The partial files and folders of runs that were killed; no other program's, whose names differ."""
    for partial in folder.glob(PARTIAL.format("*")):
        with suppress(OSError):  # another run has removed it
            if time.time() - partial.stat().st_mtime > ABANDONED:
                remove(partial)


def remove(path: Path) -> None:
    """A file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read block by block. Raises OSError."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
