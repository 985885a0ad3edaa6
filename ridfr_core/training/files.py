"""Files and folders that are written whole or not at all."""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from .settings import TrainingError

TORCH = (OSError, SafetensorError, RuntimeError)  # what torch.save makes of a full disk
ABANDONED = 3600.0  # seconds without a change, after which nobody writes a partial file any more


def write_whole(path: Path, write: Callable[[Path], object], errors=(OSError, SafetensorError)) -> None:
    """Have `write` make a file or folder under another name, and move it to `path` when it is whole.

    That name is nobody else's, so several runs may write the same path; the last one stays.
    errors: what `write` raises if it cannot write; see TORCH.
    Raises TrainingError if it cannot be written (the disk is full, ...); then what was at `path` is still there.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        try:
            write(partial)
            if path.is_dir():
                remove(path)
            os.replace(partial, path)
        finally:
            remove(partial)
    except errors as error:
        raise TrainingError(f"'{path}' cannot be written ({' '.join(str(error).split())}): is the disk full? What was "
                            "saved before is still there.") from error


def write_png(image: Image.Image, path: Path) -> None:
    """Raises TrainingError if it cannot be written."""
    write_whole(path, lambda partial: image.save(partial, "PNG"))


def append(path: Path, line: str) -> None:
    """To a log. Raises TrainingError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise TrainingError(f"'{path}' cannot be written ({error.strerror}): is the disk full? Give the same command "
                            "again when there is space.") from error


def _remove_abandoned(folder: Path) -> None:
    """The partial files of runs that were killed."""
    for partial in folder.glob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > ABANDONED:
                remove(partial)
        except OSError:  # another run has removed it
            continue


def remove(path: Path) -> None:
    """A file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_rows(path: Path, parts: Iterable[Tensor], total: int) -> None:
    """Batches of rows, `total` in all, as one .npy file that never lies in memory as a whole.

    It is written from front to back: in a memory-mapped file, a full disk would kill the process.
    """
    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            for number, part in enumerate(parts):
                array = numpy.ascontiguousarray(part.cpu().numpy())
                if number == 0:
                    kind = numpy.lib.format.dtype_to_descr(array.dtype)
                    header = {"descr": kind, "fortran_order": False, "shape": (total, *array.shape[1:])}
                    numpy.lib.format.write_array_header_1_0(file, header)
                file.write(array.data)

    write_whole(path, write)


def rows_of(path: Path, total: int) -> numpy.ndarray | None:
    """What `write_rows` wrote, memory-mapped; None if it is not there or not whole."""
    try:
        rows = numpy.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # ValueError: also a pickle, which is not loaded
        return None
    return rows if isinstance(rows, numpy.ndarray) and len(rows.shape) and len(rows) == total else None


def sha256_of(path: Path) -> str:
    """Raises TrainingError if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    except OSError as error:
        raise TrainingError(f"'{path}' cannot be read ({error.strerror}): check the file.") from error
    return digest.hexdigest()
