"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .settings import TrainingError

TORCH = (OSError, SafetensorError, RuntimeError)  # what torch.save makes of a full disk


def write_whole(path: Path, write: Callable[[Path], object], errors=(OSError, SafetensorError)) -> None:
    """Have `write` make a file or folder under another name, and move it to `path` when it is whole.

    errors: what `write` raises if it cannot write; see TORCH.
    Raises TrainingError if it cannot be written (the disk is full, ...); then what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        remove(partial)  # of a run that was killed
        write(partial)
        if path.is_dir():
            remove(path)
        os.replace(partial, path)
    except errors as error:
        remove(partial)
        raise TrainingError(f"'{path}' cannot be written ({' '.join(str(error).split())}): is the disk full? What was "
                            "saved before is still there.") from error


def remove(path: Path) -> None:
    """A file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
