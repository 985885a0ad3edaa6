"""A ComfyUI that is not running: its version and its model folders."""

import os.path
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import known_models
from .errors import RidfrError, in_one_line

OLDEST_COMFYUI = (0, 18, 0)
MOST = 100_000  # characters and keys of an extra_model_paths.yaml; a real one has a hundred
EMPTY = ("", [], {})  # what ComfyUI passes over in a section's place


class HostError(RidfrError):
    """An extra_model_paths.yaml that ComfyUI does not start with; the message is one sentence a user can act on."""


def version_of(comfyui: Path) -> str:
    """The version in comfyui_version.py, "" where there is none."""
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"""^__version__\s*(?::.*?)?=\s*["']([^"'\n]*)["']""", text, re.M)
    return match[1] if match else ""


def numbers(version: str) -> tuple[int, int, int] | None:
    """The numbers of a version: "0.30.0rc1" and "v0.30" -> (0, 30, 0). None where it does not begin with one."""
    match = re.match(r"\s*v?([0-9]{1,9})(?:\.([0-9]{1,9}))?(?:\.([0-9]{1,9}))?", version)
    return match and tuple(int(number or 0) for number in match.groups())


def own_folders(comfyui: Path, base: Path | None = None, names: Collection[str] = known_models.FOLDERS
                ) -> dict[str, list[Path]]:
    """The folders of a ComfyUI itself, and its "output". base: its --base-directory, where that is another."""
    base = base or comfyui
    folders = {name: [base / "models" / name] for name in names}
    folders["controlnet"].append(base / "models" / "t2i_adapter")
    return folders | {"output": [base / "output"]}


def model_folders(comfyui: Path, base: Path | None = None, names: Collection[str] = known_models.FOLDERS,
                  more: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """The folders of a ComfyUI that is not running: its own and those of its extra_model_paths.yaml.

    more: files like that one, its --extra-model-paths-config. Raises HostError when one cannot be read.
    """
    folders = own_folders(comfyui, base, names)
    for file in (comfyui / "extra_model_paths.yaml", *more):
        for name, path, first in extra_folders(file) if file.is_file() else ():
            if name in names and (first or path not in folders[name]):
                others = [folder for folder in folders[name] if folder != path]
                folders[name] = [path, *others] if first else [*others, path]
    return folders


def extra_folders(file: Path) -> Iterator[tuple[str, Path, bool]]:
    """(folder's name, path, whether it comes first) of each entry of an extra_model_paths.yaml, as ComfyUI reads it.

    Raises HostError where ComfyUI itself fails at the file.
    """
    for title, section in mapping(file, "the file", read_yaml(file)).items():
        if section is None:
            continue
        section = dict(mapping(file, f"'{title!s:.40}'", section))
        base = text(file, f"base_path of '{title!s:.40}'", section.pop("base_path", ""))
        base = file.parent.absolute() / os.path.expandvars(os.path.expanduser(base))
        first = bool(section.pop("is_default", False))
        for name, paths in section.items():
            for path in filter(None, text(file, f"'{name!s:.40}' of '{title!s:.40}'", paths).split("\n")):
                yield name, Path(os.path.normpath(base / path)), first


def mapping(file: Path, what: str, value: Any) -> dict:
    if isinstance(value, dict) or value in EMPTY:
        return value or {}
    raise wrong(file, f"{what} must hold lines like 'checkpoints: FOLDER'", value)


def text(file: Path, what: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise wrong(file, f"{what} must be a folder, or one in each line after a '|'", value)


def wrong(file: Path, what: str, value: Any) -> HostError:
    kinds = {type(None): "nothing", str: "text", list: "a list", dict: "a table", bool: "yes or no"}
    found = kinds.get(type(value), "a number or a date")
    return HostError(f"{file} cannot be used: {what}, but it is {found}. Correct it: ComfyUI does not start with it.")


def read_yaml(file: Path) -> Any:
    """What a YAML file of ordinary size holds. Raises HostError, also for one that would fill the memory."""
    import yaml

    class Loader(yaml.SafeLoader):
        keys = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)  # "<<: [*a, *a, ...]" multiplies the keys at each level
            self.keys += len(node.value)
            if self.keys > MOST:
                raise yaml.YAMLError(f"more than {MOST} keys")

    try:
        with file.open(encoding="utf-8") as stream:
            content = stream.read(MOST + 1)
        if len(content) > MOST:
            raise yaml.YAMLError(f"more than {MOST} characters")
        return yaml.load(content, Loader)
    except Exception as error:  # besides YAMLError: of the encoding, of dates and numbers, RecursionError when nested
        raise HostError(f"{file} cannot be read as YAML ({in_one_line(error):.200}): correct it, ComfyUI reads it when "
                        "it starts.") from error
