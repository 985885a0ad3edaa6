"""A ComfyUI that is not running: its version and its model folders."""

import os.path
from collections.abc import Iterator
from pathlib import Path

from . import known_models


def model_folders(comfyui: Path, base: Path | None = None) -> dict[str, list[Path]]:
    """The folders of a ComfyUI that is not running: its own and those of its extra_model_paths.yaml.

    base: its --base-directory, where that is another.
    Raises ValueError naming the file when the YAML cannot be read.
    """
    base = base or comfyui
    names = {model.folder for model in known_models.MODELS}
    folders = {name: [base / "models" / name] for name in sorted(names)}
    folders["controlnet"].append(base / "models" / "t2i_adapter")
    for name, path, first in extra_folders(comfyui / "extra_model_paths.yaml"):
        if name in folders:
            folders[name].insert(0 if first else len(folders[name]), path)
    return folders | {"output": [base / "output"]}


def extra_folders(file: Path) -> Iterator[tuple[str, Path, bool]]:
    """(folder's name, path, whether it comes first) of each entry of an extra_model_paths.yaml, as ComfyUI reads it."""
    if not file.is_file():
        return
    import yaml

    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML ({error}): mend it, ComfyUI fails at it too.") from error
    for section in filter(None, sections.values()):
        base = Path(os.path.expandvars(os.path.expanduser(section.pop("base_path", "") or "")))
        first = section.pop("is_default", False)
        for name, paths in section.items():
            for path in filter(None, (line.strip() for line in paths.split("\n"))):
                yield name, file.parent / base / path, first


def version_of(comfyui: Path) -> str:
    """The version in comfyui_version.py, "" where there is none."""
    file = comfyui / "comfyui_version.py"
    line = next((line for line in file.read_text().splitlines() if "__version__" in line), "") if file.is_file() else ""
    return line.partition("=")[2].strip(" \"'")
