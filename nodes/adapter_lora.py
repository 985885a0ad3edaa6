"""The LoRA of an identity adapter: where it is found, and how it gets into ComfyUI's MODEL."""

from pathlib import Path

import comfy.lora
import folder_paths
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..ridfr_core import adapter as adapters
from .managed import ManagedAdapter


def find_lora(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of the adapter file: inside it, else in NAME_lora.safetensors beside it or among the user's LoRAs.

    Empty if there is none. Raises CheckpointError if that file holds something else.
    """
    if lora := adapters.find_lora(path, state):
        return lora
    name = adapters.lora_file(path).name
    users = [file for file in folder_paths.get_filename_list("loras") if Path(file).name == name]
    return adapters.read_lora(Path(folder_paths.get_full_path_or_raise("loras", users[0]))) if users else {}


def with_lora(model: ModelPatcher, adapter: ManagedAdapter, strength: float) -> ModelPatcher:
    """A clone of the model with the adapter's LoRA; the model itself where there is none or the strength is 0.

    A LoRA acts once: applying the adapter again, for a second person, leaves what the first has set.
    Raises ValueError if the LoRA was made for another model.
    """
    mark = f"ridfr.lora.{adapter.name}"
    if not adapter.lora or strength == 0 or model.get_attachment(mark) is not None:
        return model
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(adapter.lora, places, log_missing=False)
    wanted = sum(key.endswith("up.weight") for key in adapter.lora)
    if len(patches) != wanted:
        raise ValueError(
            f"The LoRA of {adapter.name} changes {wanted} layers but only {len(patches)} of them are in this model: "
            "load the adapter and the LoRA that were made for it, SD1.5 or SDXL."
        )
    model = model.clone()
    model.add_patches(patches, strength)
    model.set_attachments(mark, strength)
    return model
