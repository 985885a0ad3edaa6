"""Where models are found: ComfyUI's model folders, extra_model_paths included, and the pack's own nano files."""

from pathlib import Path

import folder_paths

from ..ridfr_core.errors import RidfrError
from ..ridfr_core.nano import WEIGHTS

NANO = "nano"
NAMED = 60  # characters of a name that an error shows
PREFERRED = "buffalo_l"  # the face model that the published FaceID adapters were made for
NANO_FILES = {"ipadapter": "identity_adapter.safetensors", "controlnet": "content_controlnet.safetensors"}
EXTENSIONS = {
    "insightface": {".onnx"},
    "ipadapter": set(folder_paths.supported_pt_extensions),
    "identities": {".safetensors"},
}


def register_folders() -> None:
    """Make the folders models/NAME of EXTENSIONS known, beside what extra_model_paths or another pack has set."""
    for name, extensions in EXTENSIONS.items():
        new = name not in folder_paths.folder_names_and_paths
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        folders, known = folder_paths.folder_names_and_paths[name]
        if new or known:  # another pack's empty set stands for all files
            folder_paths.folder_names_and_paths[name] = (folders, set(known) | extensions)


def face_models() -> list[str]:
    """Face model folders: every models/insightface/models/<name> that holds ONNX files, PREFERRED first, then the
    bundled ones."""
    own = sorted(folder.name for folder in _nano_face_models().glob("*") if folder.is_dir())
    users = {
        folder.name
        for root in _users_face_models()
        for folder in root.glob("*")
        if any(folder.glob("*.onnx")) or any(folder.glob("*/*.onnx"))
    }
    return sorted(users - set(own), key=lambda name: (name != PREFERRED, name)) + own


def face_model_folder(name: str) -> Path:
    """Raises RidfrError for a name that `face_models` does not list."""
    roots = [_nano_face_models(), *_users_face_models()]
    if name not in face_models():
        searched = ", ".join(map(str, roots[1:]))
        raise RidfrError(
            f"There is no face model {name[:NAMED]!r} in {searched}: unpack insightface's pack of that name there, or "
            "choose another."
        )
    return next(root / name for root in roots if (root / name).is_dir())


def _nano_face_models() -> Path:
    return WEIGHTS / "insightface" / "models"


def own_recognisers() -> list[Path]:
    """The recognisers that come with the pack, for drawn portraits: nano's first, then nano_judge's."""
    return sorted(_nano_face_models().glob("*/rec_*.onnx"))


def _users_face_models() -> list[Path]:
    return [Path(folder) / "models" for folder in folder_paths.get_folder_paths("insightface")]


def model_files(kind: str) -> list[str]:
    """The user's files of a model folder ("ipadapter", "controlnet"), then the name nano."""
    return [*folder_paths.get_filename_list(kind), NANO]


def model_file(kind: str, name: str) -> Path:
    """Raises RidfrError where it is gone."""
    return WEIGHTS / NANO_FILES[kind] if name == NANO else users_file(kind, name)


def users_file(kind: str, name: str) -> Path:
    """A file of ComfyUI's model folder `kind`. Raises RidfrError where it is gone."""
    if (path := folder_paths.get_full_path(kind, name)) is None:
        searched = ", ".join(folder_paths.get_folder_paths(kind))
        raise RidfrError(f"There is no file {name[:NAMED]!r} in {searched}: put it there, or choose another.")
    return Path(path)


def fingerprint(*files: Path) -> str:
    """Changes when one of the files is written, appears or goes: what a loader's `fingerprint_inputs` returns."""
    known = [file.stat() if file.is_file() else None for file in files]
    return str([stat and (stat.st_mtime_ns, stat.st_size) for stat in known])
