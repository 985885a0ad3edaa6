"""The place outside every checkout where what was set up is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .steps import StepError, say

CHECKOUT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """The cache folder: $RIDFR_CACHE, or `ridfr` in the platform's own."""
    chosen = os.environ.get("RIDFR_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else platform_cache() / "ridfr"


def platform_cache() -> Path:
    """Where this platform keeps what can be fetched again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def download_caches() -> dict[str, str]:
    """uv's and pip's settings that put their caches below ours where the platform's own cannot be written."""
    places = {"UV_CACHE_DIR": str(cache() / "uv"), "PIP_CACHE_DIR": str(cache() / "pip")}
    return {} if writable(platform_cache()) else places


def home() -> dict[str, str]:
    """The setting of another home where the user's cannot be written: comfy-cli makes a folder there when imported."""
    name = "USERPROFILE" if sys.platform == "win32" else "HOME"
    return {} if writable(Path.home()) else {name: str(cache() / "home")}


def writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
    remove(("env-", "comfyui-", "base-", "fetch-", "uv", "pip", "home"))


def clean_old(needed: Collection[Path]) -> None:
    """Remove the environments and ComfyUI trees that are not `needed`, and what a broken download left."""
    remove(("env-", "comfyui-", "fetch-"), needed)


def remove(beginnings: tuple[str, ...], needed: Collection[Path] = ()) -> None:
    """Remove the folders of the cache whose names begin so; StepError when one cannot be removed."""
    with locked():
        for folder in sorted(cache().iterdir()):
            if folder.is_dir() and folder.name.startswith(beginnings) and folder not in needed:
                say(f"removing {folder}")
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    raise StepError("Cleaning the cache", f"{error.filename} cannot be removed ({error.strerror})",
                                    "End what uses it, look at its permissions, and run this again.") from error
