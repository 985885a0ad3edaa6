"""The test bed's virtual environment: made once outside the checkout, keyed by what it is made from."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import comfyui
from .cache import CHECKOUT, cache, download_caches, key_of, locked
from .steps import StepError, run, say

EXTRAS = ("--extra", "train", "--extra", "dev")
LOCK = CHECKOUT / "tools" / "lock.txt"
STAMP = "ridfr.json"  # written last: an environment without it is half made
MODULES = {  # what the pack and this tool import, and what pip calls it
    "torch": "torch", "aiohttp": "aiohttp", "safetensors": "safetensors", "kornia": "kornia", "numpy": "numpy",
    "PIL": "pillow", "yaml": "pyyaml", "comfy_cli": "comfy-cli", "websocket": "websocket-client",
}
TEST_MODULES = {  # what the tests import besides
    "pytest": "pytest", "ruff": "ruff", "accelerate": "accelerate", "diffusers": "diffusers", "peft": "peft",
    "transformers": "transformers", "tensorboard": "tensorboard", "tqdm": "tqdm", "matplotlib": "matplotlib",
    "insightface": "insightface", "onnx": "onnx", "onnxruntime": "onnxruntime",
}


@dataclass(frozen=True)
class Bed:
    """A Python that has all requirements, and the ComfyUI trees it runs."""

    python: Path
    tree: Path
    oldest: Path | None  # the oldest ComfyUI that the pack supports, for the tests


def prepare(tests: bool = False) -> Bed:
    """Set up what is missing and return the bed; at once when all is there."""
    own = comfyui.users_own()
    if own and (python := comfyui.users_python(own)):
        check_users_python(python, tests)
        with locked():
            return Bed(python, own, comfyui.fetch(python, comfyui.OLDEST) if tests else None)
    folder = place()
    if not complete(folder):
        with locked():
            make(folder)
    return Bed(python_in(folder), own or comfyui.place_of(comfyui.NEWEST), comfyui.place_of(comfyui.OLDEST))


def place() -> Path:
    """Where the environment of this checkout's requirements is or will be."""
    return cache() / f"env-{environment_key()}"


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def environment_key() -> str:
    """Of all that an environment is made from, so that another requirement makes another environment."""
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^dependencies = \[.*?^\]|^\[project\.optional-dependencies\].*?(?=^\[)', project, re.M | re.S)
    files = [(CHECKOUT / "tools" / name).read_text(encoding="utf-8") for name in ("testbed.txt", "lock.txt")]
    machine = [sys.implementation.name, platform.python_version(), sys.platform, platform.machine(), sys.base_prefix]
    return key_of(*wanted, *files, comfyui.NEWEST.sha256, comfyui.OLDEST.sha256, *machine)


def complete(folder: Path) -> bool:
    """Whether all was finished and the environment's Python still starts (the one it was made from may be gone)."""
    trees = [comfyui.place_of(release) for release in (comfyui.NEWEST, comfyui.OLDEST)]
    if not all(path.exists() for path in (folder / STAMP, *trees)):
        return False
    try:
        return subprocess.run([python_in(folder), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def make(folder: Path) -> None:
    """Make the environment and fetch the ComfyUI trees. A half-made one is removed: uv keeps what it downloaded."""
    if complete(folder):
        return  # made by another set-up while this one waited for the lock
    began = time.monotonic()
    os.environ.update(download_caches() | os.environ)  # what the user has set stays
    if folder.exists():
        say(f"{folder} is half made: removing it and starting again")
        shutil.rmtree(folder)
    create(folder)
    python = python_in(folder)
    newest = comfyui.fetch(python, comfyui.NEWEST)
    comfyui.fetch(python, comfyui.OLDEST)
    install(python, newest)
    seconds = round(time.monotonic() - began)
    (folder / STAMP).write_text(json.dumps({"comfyui": comfyui.NEWEST.version, "python": platform.python_version(),
                                            "seconds": seconds}))
    say(f"set up in {seconds} s, in {cache()}")
    if old := [other.name for other in cache().glob("env-*") if other != folder]:
        say(f"for other requirements there are {', '.join(old)}, up to 6 GB each: `make clean-cache ARGS=--old` "
            "removes them")


def create(folder: Path) -> None:
    say(f"making a virtual environment in {folder}")
    step = "Making the virtual environment"
    try:
        import venv

        venv.EnvBuilder(with_pip=True, symlinks=os.name == "posix").create(folder)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        raise StepError(step, str(error), "Where Python comes without venv (Debian, Ubuntu): apt install python3-venv; "
                        f"else make sure that {folder.parent} can be written, or set RIDFR_CACHE.") from error
    run("Installing uv", [python_in(folder), "-m", "pip", "install", "-qq", "uv"],
        "Look at the network and at pip's index settings (pip config list).")


def install(python: Path, tree: Path) -> None:
    say("installing the requirements of ComfyUI and of the pack (up to 3 GB to download, once)")
    quiet = [] if sys.stderr.isatty() else ["-q"]
    files = [word for file in requirement_files(tree) for word in ("-r", file)]
    run("Installing the requirements",
        [python, "-m", "uv", "pip", "install", *quiet, "--python", python, "--constraints", LOCK, *files, *EXTRAS],
        "Look at the network and at the disk's free space (12 GB), then run the same command again: it resumes.",
        env=os.environ | index_settings(python))


def requirement_files(tree: Path) -> list[Path]:
    """All that the test bed holds, with EXTRAS of pyproject.toml."""
    return [CHECKOUT / "tools" / "testbed.txt", tree / "requirements.txt", CHECKOUT / "pyproject.toml"]


def index_settings(python: Path) -> dict[str, str]:
    """pip's settings in uv's words, which does not read them; what is set for uv stays.

    They are weighed as pip weighs them: [install] of its configuration over [global], and PIP_* over both.
    """
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    values = {name: " ".join(ast.literal_eval(value).split())
              for name, _, value in (line.partition("=") for line in listed.splitlines())}
    settings = {name.rpartition(".")[2]: value for section in ("global", "install", ":env:")
                for name, value in values.items() if value and name.startswith(f"{section}.")}
    names = {"index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"), "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
             "find-links": ("UV_FIND_LINKS",), "trusted-host": ("UV_INSECURE_HOST",), "cert": ("SSL_CERT_FILE",)}
    chosen = {uvs[0]: settings[name] for name, uvs in names.items()
              if name in settings and not any(os.environ.get(uv) for uv in uvs)}
    if "UV_INDEX" in chosen and "UV_INDEX_STRATEGY" not in os.environ:
        chosen["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's own way to treat several indexes
    return chosen


def check_users_python(python: Path, tests: bool) -> None:
    """StepError naming what the Python of the user's ComfyUI lacks: nothing is installed into it unasked."""
    step, wanted = "Using the Python of your ComfyUI", MODULES | (TEST_MODULES if tests else {})
    probe = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))"
    remedy = "Set COMFYUI_PYTHON to the Python that runs it."
    try:
        answer = subprocess.run([python, "-c", probe, *wanted], capture_output=True, text=True)
    except OSError as error:
        raise StepError(step, f"{python} does not start ({error.strerror})", remedy) from error
    if answer.returncode != 0:
        raise StepError(step, f"{python} ended with code {answer.returncode}", remedy)
    if missing := answer.stdout.split():
        raise StepError(step, f"{python} lacks {', '.join(missing)}",
                        f"Run: {python} -m pip install {' '.join(wanted[name] for name in missing)}")


def write_lock() -> None:
    """Resolve the test bed anew, for every platform and Python it supports, into tools/lock.txt."""
    bed = prepare()
    # Only the main index: what pip is given beside it often has one platform's wheels, and the lock is for all.
    index = {name: value for name, value in index_settings(bed.python).items()
             if name not in ("UV_INDEX", "UV_FIND_LINKS")}
    run("Resolving the requirements",
        [bed.python, "-m", "uv", "pip", "compile", "-q", "--universal", "--upgrade", "--python-version", "3.10",
         "--no-header", "--no-annotate", *requirement_files(comfyui.place_of(comfyui.NEWEST)), *EXTRAS, "-o", LOCK],
        "Look at the network and at pip's index settings.", env=os.environ | index)
    say(f"wrote {LOCK}")
