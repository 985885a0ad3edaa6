"""The LoRA of an identity adapter: where it is found, and how it gets into ComfyUI's MODEL."""

import math
from pathlib import Path

import comfy.lora
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..ridfr_core import adapter as adapters
from ..ridfr_core.errors import RidfrError
from . import paths
from .managed import ManagedAdapter

ROUNDING = 0.01  # relative: a LoRA and its copy in half precision are the same


def lora_path(path: Path) -> Path | None:
    """The file with the LoRA of the adapter file: NAME_lora.safetensors beside it, else among the user's LoRAs."""
    beside = adapters.lora_file(path)
    if beside.is_file():
        return beside
    users = [file for file in folder_paths.get_filename_list("loras") if Path(file).name == beside.name]
    return paths.users_file("loras", users[0]) if users else None


def find_lora(path: Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The LoRA of the adapter file and where it was: inside it, else in its `lora_path`.

    Empty if there is none. Raises CheckpointError if that file holds something else.
    """
    if lora := adapters.lora_of(state):
        adapters.lora_pairs(lora, path.name)
        return lora, "in the file"
    file = lora_path(path)
    return (adapters.read_lora(file), file.name) if file else ({}, "none found")


def with_lora(
    model: ModelPatcher, adapter: ManagedAdapter, strength: float, notes: list[str] | None = None
) -> ModelPatcher:
    """A clone of the model with the adapter's LoRA; the model itself where there is none or the strength is 0.

    A LoRA acts once: where its tensors are in the model already, from Apply Identity for another person or from a LoRA
    loader, it stays as it is, and a strength other than wanted is added to the notes.
    Raises RidfrError if the LoRA is incomplete or was made for another model.
    """
    if not adapter.lora or strength == 0:
        return model
    patches = patches_for(model, adapter)
    found = strength_of(model, patches)
    if found is not None:
        if notes is not None and found != strength:
            notes.append(
                f"The LoRA of {adapter.name} is in the model already, with strength {found:g}: it is not added again."
            )
        return model
    model = model.clone()
    model.add_patches(patches, strength)
    return model


def patches_for(model: ModelPatcher, adapter: ManagedAdapter) -> dict:
    """The LoRA as ComfyUI's patches, by the names of the model's weights. Raises RidfrError if it does not fit."""
    wanted = len(adapters.lora_pairs(adapter.lora, f"the LoRA of {adapter.name}"))
    patches = comfy.lora.load_lora(adapter.lora, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    patches = {key: patch for key, patch in patches.items() if hasattr(patch, "weights")}
    weights = model.model.state_dict()
    fitting = sum(fits(patch.weights, weights[key].shape) for key, patch in patches.items())
    if fitting != wanted:
        raise RidfrError(
            f"The LoRA of {adapter.name} changes {wanted} layers but only {fitting} of them are in this model: "
            "load the adapter and the LoRA that were made for it, SD1.5 or SDXL."
        )
    return patches


def fits(lora: tuple, shape: torch.Size) -> bool:
    """Whether up [out,rank] and down [rank,in] belong to a weight [out,in]."""
    up, down = lora[:2]
    return min(up.ndim, down.ndim) > 1 and up.shape[1] == len(down) and (len(up), math.prod(down.shape[1:])) == (
        shape[0],
        math.prod(shape[1:]),
    )


def strength_of(model: ModelPatcher, patches: dict) -> float | None:
    """The strength with which all of these patches are in the model, None where they are not."""
    found = [
        next((strength for strength, patch, *_ in model.patches.get(key, ()) if same(patch, wanted)), None)
        for key, wanted in patches.items()
    ]
    return None if None in found else found[0]


def same(patch, wanted) -> bool:
    """Whether two of ComfyUI's LoRA patches have the same tensors, but for rounding."""
    theirs, ours = getattr(patch, "weights", (None, None))[:2], wanted.weights[:2]
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=ROUNDING, atol=1e-4)
        for a, b in zip(theirs, ours, strict=True)
    )
