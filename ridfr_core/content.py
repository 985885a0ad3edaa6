"""Content injection (RIDFR section 3.2): the LQ image joins the noisy latent as pixels, in a 7-channel ControlNet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import CheckpointError
from .layouts import replace_prefix, unet_to_ldm

PREFIX = "ridfr."
CHOICES = {
    "value_range": ("-1..1", "0..1"),
    "kernel": ("bicubic", "bilinear", "area", "nearest-exact"),
    "order": ("z,lq", "lq,z"),
    "base": ("sd15", "nano"),
    "kind": ("pixel",),
}


@dataclass(frozen=True)
class ContentSpec:
    """How a content ControlNet wants its LQ image; saved as `ridfr.*` metadata of the safetensors file.

    The paper gives the 64x64 bicubic size and z before LQ; it does not give the value range.
    `kernel` is a mode of torch's `interpolate` without antialiasing, as ComfyUI's upscale algorithm of that name.
    """

    value_range: str = "-1..1"
    kernel: str = "bicubic"
    order: str = "z,lq"
    base: str = "sd15"
    kind: str = "pixel"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise CheckpointError(
                    f"The content ControlNet's metadata says {PREFIX}{name} = '{value}', but this version of the pack "
                    f"knows only {', '.join(choices)}: update the pack."
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "ContentSpec":
        """Read from safetensors metadata; what is not said there keeps its default. Raises CheckpointError."""
        metadata = metadata or {}
        return cls(**{f.name: metadata[PREFIX + f.name] for f in fields(cls) if PREFIX + f.name in metadata})

    def to_metadata(self) -> dict[str, str]:
        return {PREFIX + name: value for name, value in asdict(self).items()}

    def to_range(self, image: Tensor) -> Tensor:
        """Image in [0,1] -> the value range the network was trained on."""
        return image * 2 - 1 if self.value_range == "-1..1" else image

    def concat(self, z: Tensor, lq: Tensor) -> Tensor:
        """Noisy latent [B,4,h,w] and prepared LQ [B,3,h,w] -> network input [B,7,h,w]."""
        return torch.cat((z, lq) if self.order == "z,lq" else (lq, z), dim=1)


def prepare_lq(image: Tensor, size: tuple[int, int], spec: ContentSpec) -> Tensor:
    """LQ image [B,3,H,W] in [0,1] -> [B,3,h,w] at latent size (h, w), in the value range of `spec`."""
    return spec.to_range(F.interpolate(image, size=size, mode=spec.kernel))


def controlnet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers ControlNetModel without its hint encoder -> ldm ControlNet keys; any width and number of levels.

    Keys that are in the ldm layout already only lose the prefix `control_model.`, which some files have.
    """
    out = {}
    for key, weight in unet_to_ldm(state_dict).items():
        key = key.removeprefix("control_model.")
        if key.startswith("controlnet_down_blocks."):
            _, i, parameter = key.split(".")
            key = f"zero_convs.{i}.0.{parameter}"
        out[replace_prefix(key, {"controlnet_mid_block": "middle_block_out.0"})] = weight
    return out
