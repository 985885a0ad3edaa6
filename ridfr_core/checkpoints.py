"""Read weight files, recognise what they hold, and say in one sentence what is wrong with them."""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RidfrError

KINDS = {
    "identity-adapter": "an identity adapter (IP-Adapter FaceID, FaceID-Plus, FaceID-PlusV2 or plus-face)",
    "ip-adapter": "an IP-Adapter of another sort than FaceID, FaceID-Plus, FaceID-PlusV2 or plus-face",
    "content-controlnet": "a content ControlNet (7 or 8 input channels, no hint encoder)",
    "controlnet": "an ordinary ControlNet (for the node Load ControlNet Model)",
    "sd-checkpoint": "a Stable Diffusion checkpoint (for the node Load Checkpoint)",
    "clip-vision": "a CLIP vision encoder (for the node Load CLIP Vision)",
    "recogniser": "an ArcFace recogniser that `ridfr convert` made from insightface's ONNX file",
    "lora": "a LoRA (for the node Load LoRA)",
    "unknown": "nothing this pack knows",
}
SOURCES = {
    "identity-adapter": "get ip-adapter-faceid-plusv2_sd15.bin of h94/IP-Adapter-FaceID on Hugging Face, or use nano",
    "content-controlnet": "RIDFR's authors have published none, so train one, or use DiffBIR's v1_face.pth of "
    "lxq007/DiffBIR-v2 on Hugging Face (for SD2.1), or nano",
    "recogniser": "run `ridfr convert w600k_r50.onnx` of insightface's buffalo_l, or use the ONNX file itself",
    "lora": "get ip-adapter-faceid-plusv2_sd15_lora.safetensors of h94/IP-Adapter-FaceID on Hugging Face, or move the "
    "file away to do without",
}


class CheckpointError(RidfrError):
    """A weight file that can't be used; the message is one sentence a user can act on."""


def read(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or PyTorch file, which is told by its content.

    Nested dicts are flattened with dots, a `state_dict` wrapper is dropped, values that are not tensors are left out.
    Pickles are read weights-only, so code in them never runs. The metadata of a pickle is empty.
    device: "cpu", or "meta" for the tensors' names and shapes alone, which is quick for gigabytes of safetensors.
    Raises CheckpointError: not found, not a weight file, cut short, or a pickle that holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist: check the path, or put the file there.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: eight bytes of header size, then JSON
        return _read_safetensors(path, device)
    if head.startswith((b"PK", b"\x80")):  # torch's zip format; its older bare pickle
        return _read_pickle(path, device), {}
    raise CheckpointError(
        f"'{path.name}' is neither safetensors nor a PyTorch file (an unfinished download, a saved web page or a Git "
        "LFS pointer can look like this): download it again."
    )


def _read_safetensors(path: Path, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            if device == "meta":
                tensors = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}
            else:
                tensors = {key: file.get_tensor(key) for key in keys}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"'{path.name}' is damaged or cut short: download it again.") from error


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path.name}' holds more than weights, and code in it could run when it is read, so it was refused: "
            "use a safetensors version of it."
        ) from error
    except (RuntimeError, EOFError, OSError, IndexError, struct.error) as error:  # which one depends on where it ends
        raise CheckpointError(f"'{path.name}' is damaged or cut short: download it again.") from error
    return flatten(content.get("state_dict", content) if isinstance(content, Mapping) else {})


def write(state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises CheckpointError if it cannot be written."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    own = {key: weight.clone().contiguous() for key, weight in state_dict.items()}  # it refuses shared memory
    try:
        save_file(own, partial, dict(metadata or {}))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' cannot be written ({error}): check the folder and the free space.") from error
    finally:
        partial.unlink(missing_ok=True)


def flatten(nested: Mapping) -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}; values that are not tensors are left out."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        elif isinstance(value, Tensor):
            flat[str(key)] = value
    return flat


def kind_of(state_dict: Mapping[str, Tensor]) -> str:
    """The key of KINDS that fits the tensors, by their names and shapes alone."""

    def has(*parts: str) -> bool:
        return any(part in key for key in state_dict for part in parts)

    if has("ip_adapter."):
        known = has("image_proj.perceiver_resampler.") or "image_proj.latents" in state_dict or _is_faceid(state_dict)
        return "identity-adapter" if known else "ip-adapter"
    if has("zero_convs.0.0.", "controlnet_down_blocks.0."):
        hint = has("input_hint_block.", "controlnet_cond_embedding.")
        return "controlnet" if hint or _controlnet_channels(state_dict) not in (7, 8) else "content-controlnet"
    if has("model.diffusion_model."):
        return "sd-checkpoint"
    if any(key.startswith(("vision_model.", "visual.")) for key in state_dict):
        return "clip-vision"
    if {"stem.weight", "features.scale"} & state_dict.keys() and has("blocks."):
        return "recogniser"
    if has("lora_down.", "lora.down.", "lora_A.", "_lora.down."):
        return "lora"
    return "unknown"


def _is_faceid(state_dict: Mapping[str, Tensor]) -> bool:
    """FaceID's projection has two linear layers and a norm of its own; full-face has the norm as proj.3."""
    return "image_proj.proj.2.weight" in state_dict and "image_proj.proj.3.weight" not in state_dict


def _controlnet_channels(state_dict: Mapping[str, Tensor]) -> int | None:
    names = ("input_blocks.0.0.weight", "control_model.input_blocks.0.0.weight", "conv_in.weight")
    return next((state_dict[name].shape[1] for name in names if name in state_dict), None)


def expect(state_dict: Mapping[str, Tensor], kind: str, name: str) -> None:
    """Raise CheckpointError unless the tensors of the file called `name` are of `kind`, one of SOURCES."""
    found = kind_of(state_dict)
    if found != kind:
        raise CheckpointError(f"'{name}' holds {KINDS[found]}, but this needs {KINDS[kind]}: {SOURCES[kind]}.")


def lacks(missing: list[str], kind: str, name: str) -> CheckpointError:
    """The error for a file called `name` without the tensors `missing`; kind: what it should be, one of SOURCES."""
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return CheckpointError(
        f"'{name}' lacks {missing[0]}{others}, which belongs to {KINDS[kind]}: the file is incomplete; {SOURCES[kind]}."
    )


def check_tensors(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, name: str) -> None:
    """Raise CheckpointError unless the tensors of the file called `name` have the names and shapes of `expected`."""
    if missing := [key for key in expected if key not in state_dict]:
        raise lacks(missing, kind, name)
    if foreign := [key for key in state_dict if key not in expected]:
        raise CheckpointError(
            f"'{name}' holds {len(foreign)} tensors, such as {foreign[0]}, that do not belong to {KINDS[kind]} of its "
            f"size: {SOURCES[kind]}."
        )
    for key, tensor in expected.items():
        if state_dict[key].shape != tensor.shape:
            raise CheckpointError(
                f"'{name}' has {key} of shape {[*state_dict[key].shape]}, but by its other tensors it should be "
                f"{[*tensor.shape]}: {SOURCES[kind]}."
            )
