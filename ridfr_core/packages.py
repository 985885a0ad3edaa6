"""The packages that the pack needs, all of them ComfyUI's own, and one sentence where one cannot be used."""

import importlib
import sys
from types import ModuleType

from .errors import RidfrError, in_one_line

REQUIRED = {  # what the nodes import, and what pip calls it
    "torch": "torch", "safetensors": "safetensors", "kornia": "kornia", "numpy": "numpy", "PIL": "Pillow",
    "yaml": "pyyaml",
}


class PackageError(RidfrError):
    """A package is missing or broken; the message says what to run."""


def need(name: str) -> ModuleType:
    """Import a module of REQUIRED, or one inside it. Raises PackageError when that fails, however it fails."""
    top = name.partition(".")[0]
    pip = f"`{sys.executable} -m pip install"
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise PackageError(f"{REQUIRED[top]} is not installed: run {pip} {REQUIRED[top]}`.") from error
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise PackageError(f"{REQUIRED[top]} is installed, but it cannot be imported ({reason}): run "
                           f"{pip} --force-reinstall --no-deps {REQUIRED[top]}`.") from error
