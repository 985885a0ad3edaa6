"""The place outside every checkout where what was set up is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .steps import StepError, say

CHECKOUT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The cache folder: $RIDFR_CACHE, or `ridfr` in the platform's own."""
    if chosen := os.environ.get("RIDFR_CACHE"):
        return Path(chosen).expanduser().resolve()
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "ridfr"


def key_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextmanager
def locked() -> Iterator[None]:
    """One set-up at a time on this machine. The system frees the lock when its last holder dies, however it dies."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
        file = open(cache() / "lock", "a+b")  # noqa: SIM115  closed below
    except OSError as error:
        raise StepError("Opening the cache", f"{cache()} cannot be written ({error.strerror})",
                        "Set RIDFR_CACHE to a folder that can.") from error
    with file:
        if not _acquire(file, wait=False):
            say("waiting for another set-up on this machine to finish")
            _acquire(file, wait=True)
        yield


if sys.platform == "win32":
    import msvcrt
    import time

    def _acquire(file, wait: bool) -> bool:
        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.5)
else:
    import fcntl

    def _acquire(file, wait: bool) -> bool:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            return False


def clean() -> None:
    """Remove everything that was set up."""
    with locked():
        for entry in cache().iterdir():
            if entry.is_dir() and entry.name.startswith(("env-", "comfyui-", "base-")):
                say(f"removing {entry}")
                shutil.rmtree(entry)
