"""Read weight files, recognise what they hold, and say in one sentence what is wrong with them."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RidfrError, in_one_line
from .files import write_whole

KINDS = {
    "identity-adapter": "an identity adapter (IP-Adapter FaceID, FaceID-Plus, FaceID-PlusV2 or plus-face)",
    "ip-adapter": "an IP-Adapter of another sort than FaceID, FaceID-Plus, FaceID-PlusV2 or plus-face",
    "instantid": "InstantID's adapter (for InstantID's own nodes)",
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

DEEPEST = 8  # levels of nested dicts; published files have two


class CheckpointError(RidfrError):
    """A weight file that can't be used; the message is one sentence a user can act on."""


def read(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or PyTorch file, which is told by its content.

    Nested dicts are flattened with dots, a `state_dict` wrapper is dropped, values that are not tensors are left out.
    Pickles are read weights-only, so code in them never runs. The metadata of a pickle is empty.
    device: "cpu", or "meta" for the tensors' names and shapes alone, which is quick for gigabytes of safetensors.
    Raises CheckpointError: no ordinary file, not a weight file, cut short, a pickle that holds more than weights, and,
    unless device is "meta", NaN, infinite or other numbers than plain ones.
    """
    path = Path(path)
    head = _head(path)
    metadata: dict[str, str] = {}
    if head[8:] == b"{":  # safetensors: eight bytes of header size, then JSON
        tensors, metadata = _read_safetensors(path, device)
    elif head.startswith((b"PK", b"\x80")):  # torch's zip format; its older bare pickle
        tensors = _read_pickle(path, device)
    else:
        raise CheckpointError(
            f"'{path.name}' is neither safetensors nor a PyTorch file (an unfinished download, a saved web page or a "
            "Git LFS pointer can look like this): download it again."
        )
    if device != "meta":
        check_numbers(tensors, path.name)
    return tensors, metadata


def _head(path: Path) -> bytes:
    """The first nine bytes. Raises CheckpointError where they cannot be read; a pipe or a device is not even opened."""
    try:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
            raise CheckpointError(f"'{path}' {found}: check the path, or put the file there.")
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error.strerror}): check its permissions.") from error


def _read_safetensors(path: Path, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            if device == "meta":
                tensors = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in keys}
            else:
                tensors = {key: file.get_tensor(key) for key in keys}
            return tensors, file.metadata() or {}
    except OSError as error:  # the file may be whole: Windows says that its paging file is too small
        why = in_one_line(error)
        raise CheckpointError(f"'{path.name}' cannot be read ({why}): check the disk and the free memory.") from error
    except Exception as error:  # SafetensorError, and what torch makes of impossible shapes
        raise _damaged(path) from error


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _more_than_weights(path) from error
    except Exception as error:  # which one depends on where it ends and on what a wrong byte stands for
        raise _damaged(path) from error
    content = content if isinstance(content, Mapping) else {}
    inner = content.get("state_dict")
    tensors = flatten(inner if isinstance(inner, Mapping) else content)
    for key, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"'{path.name}' says that {brief(key)} is larger than what is stored of it: get the file from its "
                "makers again."
            )
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _check_archive(path: Path) -> None:
    """Raises CheckpointError where PyTorch's zip holds a program, or more than its size, to fill the memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):  # TorchScript
        raise _more_than_weights(path)
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"'{path.name}' is compressed, which PyTorch's own files never are: get the file from its makers again."
        )


def _more_than_weights(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path.name}' holds more than weights, and code in it could run when it is read, so it was refused: "
        "use a safetensors version of it."
    )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"'{path.name}' is damaged or cut short: download it again.")


def check_numbers(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError, which calls the file `name`, for a tensor that is not plain or holds NaN or infinity."""
    for key, tensor in tensors.items():
        if odd := _oddity(tensor):
            raise CheckpointError(
                f"'{name}' holds {brief(key)} as a {odd} tensor, which this pack cannot use: get or save the file with "
                "ordinary tensors."
            )
        if not _finite(tensor):
            raise CheckpointError(
                f"'{name}' holds NaN or infinite numbers in {brief(key)}, which would turn pictures black: get the "
                "file again, or an earlier one if you trained it."
            )


def _oddity(tensor: Tensor) -> str:
    """What keeps a tensor from being used as weights; empty for a plain one."""
    if tensor.is_meta:
        return "missing (meta)"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_quantized or tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 8:
        return "quantised"
    return "complex" if tensor.is_complex() else ""


def _finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite in float32. The extremes tell, in 0.04 s per GB; `isfinite` takes 1 to 2."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:  # 8-bit floats are stored only
        tensor = tensor.float()
    return all(extreme.float().isfinite() for extreme in tensor.aminmax())


def brief(text: str, longest: int = 80) -> str:
    """What a file says, fit for a sentence: one line of printable signs, cut where it is long."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text[: longest + 1]).split())
    return line if len(line) <= longest else f"{line[:longest]}..."


def write(state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises CheckpointError if it cannot be written."""
    path = Path(path)
    own = _apart(state_dict)
    write_whole(path, lambda partial: save_file(own, partial, dict(metadata or {})),
                lambda why: unwritable(path, why),
                (OSError, SafetensorError, ValueError))  # the last: a name that is not text


def _apart(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them; only those that are not so are copied."""
    own: dict[str, Tensor] = {}
    taken = set()
    for key, tensor in state_dict.items():
        tensor = tensor.contiguous()
        if (place := tensor.untyped_storage().data_ptr()) in taken:
            tensor = tensor.clone()
        taken.add(place)
        own[key] = tensor
    return own


def unwritable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"'{path}' cannot be written ({brief(why, 300)}): check the folder and the free space.")


def flatten(nested: Mapping) -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}; values that are not tensors are left out.

    A dict that lies in several places, such as in itself, counts in the first alone; deeper ones than DEEPEST, nowhere.
    """
    flat, seen = {}, set()

    def visit(mapping: Mapping, prefix: str, depth: int) -> None:
        if id(mapping) in seen or depth > DEEPEST:
            return
        seen.add(id(mapping))
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                visit(value, f"{prefix}{key}.", depth + 1)
            elif isinstance(value, Tensor):
                flat[f"{prefix}{key}"] = value

    visit(nested, "", 1)
    return flat


def kind_of(state_dict: Mapping[str, Tensor]) -> str:
    """The key of KINDS that fits the tensors, by their names and shapes alone."""

    def has(*parts: str) -> bool:
        return any(part in key for key in state_dict for part in parts)

    if has("ip_adapter."):
        if _is_instantid(state_dict):
            return "instantid"
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


def _is_instantid(state_dict: Mapping[str, Tensor]) -> bool:
    """It is plus-face's network, but reads a face embedding where plus-face reads CLIP, which is never this narrow."""
    narrow = state_dict.get("image_proj.proj_in.weight")
    return "image_proj.latents" in state_dict and narrow is not None and narrow.shape[1:] == (512,)


def _controlnet_channels(state_dict: Mapping[str, Tensor]) -> int | None:
    names = ("input_blocks.0.0.weight", "control_model.input_blocks.0.0.weight", "conv_in.weight")
    found = next((state_dict[name] for name in names if name in state_dict), None)
    return found.shape[1] if found is not None and found.ndim == 4 else None


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


def strangers(foreign: list[str], kind: str, name: str) -> CheckpointError:
    """The error for a file called `name` with tensors that something of `kind`, one of SOURCES, does not have."""
    return CheckpointError(
        f"'{name}' holds {len(foreign)} tensors, such as {brief(foreign[0])}, that do not belong to {KINDS[kind]} of "
        f"its size: {SOURCES[kind]}."
    )


def misshapen(key: str, tensor: Tensor, wanted: str, kind: str, name: str) -> CheckpointError:
    """The error for a tensor of a wrong shape; wanted: which it should have."""
    return CheckpointError(f"'{name}' has {key} of shape {[*tensor.shape]}, but {wanted}: {SOURCES[kind]}.")


def check_fractions(state_dict: Mapping[str, Tensor], kind: str, name: str) -> None:
    """Raises CheckpointError for a tensor of whole numbers: quantised weights, whose scales lie elsewhere."""
    whole = [key for key, tensor in state_dict.items() if not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(
            f"'{name}' stores {brief(whole[0])} as {str(state_dict[whole[0]].dtype).removeprefix('torch.')}, but the "
            f"weights of {KINDS[kind]} have fractions: get it in float32 or float16."
        )


def check_tensors(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, name: str) -> None:
    """Raise CheckpointError unless the tensors of the file called `name` have the names and shapes of `expected`, and
    fractions. `expected` may be a network's state dict on the device "meta"."""
    if missing := [key for key in expected if key not in state_dict]:
        raise lacks(missing, kind, name)
    if foreign := [key for key in state_dict if key not in expected]:
        raise strangers(foreign, kind, name)
    for key, tensor in expected.items():
        if state_dict[key].shape != tensor.shape:
            wanted = f"by its other tensors it should be {[*tensor.shape]}"
            raise misshapen(key, state_dict[key], wanted, kind, name)
    check_fractions(state_dict, kind, name)
