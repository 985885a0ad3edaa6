"""What a training run or an evaluation writes: whole or not at all."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from .. import files
from ..errors import in_one_line
from .settings import TrainingError

TORCH = (OSError, SafetensorError, RuntimeError)  # what torch.save makes of a full disk


def write_whole(path: Path, write: Callable[[Path], object], errors=(OSError, SafetensorError)) -> None:
    """`files.write_whole` into a folder that is made if it is missing.

    errors: what `write` raises if it cannot write; see TORCH. Raises TrainingError if it cannot be written.
    """
    def failed(why: str) -> TrainingError:
        return TrainingError(f"'{path}' cannot be written ({why}): is the disk full? What was saved before is still "
                             "there.")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(in_one_line(error)) from error
    files.write_whole(path, write, failed, errors)


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
