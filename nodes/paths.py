"""Where models are found: ComfyUI's model folders, extra_model_paths included, and the pack's own nano files."""

from pathlib import Path

import folder_paths

from ..ridfr_core.nano import WEIGHTS

NANO = "nano"
NANO_FACE_MODELS = WEIGHTS / "insightface" / "models"
NANO_FILES = {
    "ipadapter": WEIGHTS / "identity_adapter.safetensors",
    "controlnet": WEIGHTS / "content_controlnet.safetensors",
}
EXTENSIONS = {"insightface": {".onnx"}, "ipadapter": set(folder_paths.supported_pt_extensions)}


def register_folders() -> None:
    """Make models/insightface and models/ipadapter known, beside what extra_model_paths or another pack has set."""
    for name, extensions in EXTENSIONS.items():
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        folders, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, set(known) | extensions)


def face_models() -> list[str]:
    """Face model folders: the bundled ones, then every models/insightface/models/<name> that holds ONNX files."""
    own = sorted(folder.name for folder in NANO_FACE_MODELS.glob("*") if folder.is_dir())
    users = {
        folder.name
        for root in _insightface_models()
        for folder in root.glob("*")
        if any(folder.glob("*.onnx")) or any(folder.glob("*/*.onnx"))
    }
    return own + sorted(users - set(own))


def face_model_folder(name: str) -> Path:
    roots = [NANO_FACE_MODELS, *_insightface_models()]
    folder = next((root / name for root in roots if (root / name).is_dir()), None)
    if folder is None:
        searched = ", ".join(str(root) for root in roots[1:])
        raise FileNotFoundError(f"There is no face model {name!r} in {searched}: unpack insightface's {name} there.")
    return folder


def _insightface_models() -> list[Path]:
    return [Path(folder) / "models" for folder in folder_paths.get_folder_paths("insightface")]


def model_files(kind: str) -> list[str]:
    """ "nano", then the user's files of a model folder ("ipadapter", "controlnet")."""
    return [NANO, *folder_paths.get_filename_list(kind)]


def model_file(kind: str, name: str) -> Path:
    return NANO_FILES[kind] if name == NANO else Path(folder_paths.get_full_path_or_raise(kind, name))
