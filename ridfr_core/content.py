"""Content injection: how an LQ image enters a ControlNet.

RIDFR (section 3.2) joins the LQ image to the noisy latent, as pixels at latent size (7 input channels); its ablation
and DiffBIR join the LQ image's latent (8). FaceMe has ControlNet's own hint encoder and hints in [-1,1].
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import (
    CheckpointError,
    brief,
    check_fractions,
    expect,
    kind_of,
    lacks,
    misshapen,
    strangers,
)
from .layouts import RESNET, replace_prefix, unet_to_ldm

PREFIX = "ridfr."
CHOICES = {
    "value_range": ("-1..1", "0..1"),
    "kernel": ("bicubic", "bilinear", "area", "nearest-exact"),
    "order": ("z,lq", "lq,z"),
    "base": ("sd15", "sd21", "sdxl", "nano"),
    "kind": ("pixel", "latent", "hint"),
}
KINDS = {4: "hint", 7: "pixel", 8: "latent"}  # by input channels
CONV_IN = "input_blocks.0.0.weight"
TRUNK = "control_model."  # what DiffBIR and others call the ControlNet within a bigger checkpoint
HINT = re.compile(r"controlnet_cond_embedding\.blocks\.(\d{1,2})\.", re.ASCII)
ZERO_CONV = re.compile(r"^controlnet_down_blocks\.(\d{1,2})\.", re.ASCII)

# All names that a ControlNet has in the ldm layout; numbers have two digits, so that nobody counts to a billion.
RESNETS = "|".join(map(re.escape, RESNET.values()))
LAYERS = r"attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123]"
TRANSFORMERS = rf"norm|proj_in|proj_out|transformer_blocks\.\d{{1,2}}\.({LAYERS})"
NAMES = re.compile(
    rf"(input_blocks\.(0\.0|\d{{1,2}}\.(0\.(op|{RESNETS})|1\.({TRANSFORMERS})))"
    rf"|middle_block\.([02]\.({RESNETS})|1\.({TRANSFORMERS}))|middle_block_out\.0|zero_convs\.\d{{1,2}}\.0"
    r"|time_embed\.[02]|label_emb\.0\.[02]|input_hint_block\.\d{1,2})\.(weight|bias)",
    re.ASCII,
)
DIMENSIONS = {  # of the tensors that the network's sizes are read off
    re.compile(r"input_blocks\.0\.0\.weight|.+\.out_layers\.3\.weight"): 4,
    re.compile(r".+\.attn2\.to_k\.weight|label_emb\.0\.0\.weight"): 2,
}
GROUPS = 32  # of channels in a group norm: every width is a multiple


@dataclass(frozen=True)
class ContentSpec:
    """How a content ControlNet wants its LQ image; saved as `ridfr.*` metadata of the safetensors file.

    The paper gives the 64x64 bicubic size and z before LQ; it does not give the value range.
    `kernel` is a mode of torch's `interpolate` without antialiasing, as ComfyUI's upscale algorithm of that name.
    `kind`: the LQ image as pixels or as a latent beside z, or through ControlNet's hint encoder.
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
                    f"The content ControlNet's metadata says {PREFIX}{name} = '{brief(value)}', but this version of "
                    f"the pack knows only {', '.join(choices)}: update the pack."
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "ContentSpec":
        """Read from safetensors metadata; what is not said there keeps its default. Raises CheckpointError."""
        return cls(**_said(metadata))

    def to_metadata(self) -> dict[str, str]:
        return {PREFIX + name: value for name, value in asdict(self).items()}

    def to_range(self, image: Tensor) -> Tensor:
        """Image in [0,1] -> the value range the network was trained on."""
        return image * 2 - 1 if self.value_range == "-1..1" else image

    def concat(self, z: Tensor, lq: Tensor) -> Tensor:
        """Noisy latent [B,4,h,w] and prepared LQ [B,3 or 4,h,w] -> network input [B,7 or 8,h,w]."""
        return torch.cat((z, lq) if self.order == "z,lq" else (lq, z), dim=1)


def _said(metadata: Mapping[str, str] | None) -> dict[str, str]:
    names = (field.name for field in fields(ContentSpec))
    return {name: metadata[PREFIX + name] for name in names if PREFIX + name in (metadata or {})}


def understand(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str], name: str, choices: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], ContentSpec]:
    """What a content ControlNet's file holds: its tensors under ldm keys, and how it wants its LQ image.

    choices: fields of the ContentSpec that the user sets; else the metadata says them, else the tensors tell kind and
    base, and the rest has its default. name: of the file, for errors.
    A ControlNet with a hint encoder looks like any other, canny or depth, so it counts only if metadata or choices say
    the value range. Raises CheckpointError: the file holds something else, or its metadata belongs to another kind.
    """
    choices, said = choices or {}, _said(metadata)
    if kind_of(state_dict) != "controlnet":
        expect(state_dict, "content-controlnet", name)
    elif "value_range" not in {**said, **choices}:
        raise CheckpointError(
            f"'{name}' holds an ordinary ControlNet (for the node Load ControlNet Model), but this needs one that was "
            "trained on degraded faces: if it is one, such as FaceMe's, set the value range here to -1..1."
        )
    state = controlnet_to_ldm(state_dict)
    if CONV_IN not in state:
        raise lacks([CONV_IN], "content-controlnet", name)
    kind = KINDS.get(state[CONV_IN].shape[1]) if state[CONV_IN].ndim == 4 else None
    if kind is None:
        raise misshapen(CONV_IN, state[CONV_IN], "its input has 4, 7 or 8 channels", "content-controlnet", name)
    if said.get("kind", kind) != kind:
        raise CheckpointError(
            f"'{name}' has {state[CONV_IN].shape[1]} input channels, but its metadata says {PREFIX}kind = "
            f"'{brief(said['kind'])}': it was put together wrongly, so get it again from whoever made it."
        )
    return state, ContentSpec(**{"base": _base_of(state), "kind": kind} | said | dict(choices))


def _base_of(state: Mapping[str, Tensor]) -> str:
    """SDXL reads a second, pooled prompt; SD2.1 projects with linear layers; SD1.5 with 1x1 convolutions."""
    if "label_emb.0.0.weight" in state:
        return "sdxl"
    linear = any(key.endswith(".1.proj_in.weight") and weight.ndim == 2 for key, weight in state.items())
    return "sd21" if linear else "sd15"


def check_layout(state: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError where the tensors of the file called `name`, in ldm keys, are no ControlNet's.

    After it ComfyUI can read the network's sizes off them without harm: nothing in them is far larger than the file.
    """
    if foreign := [key for key in state if not NAMES.fullmatch(key)]:
        raise strangers(foreign, "content-controlnet", name)
    check_fractions(state, "content-controlnet", name)
    if CONV_IN not in state:
        raise lacks([CONV_IN], "content-controlnet", name)
    for key, tensor in state.items():
        dimensions = next((count for names, count in DIMENSIONS.items() if names.fullmatch(key)), tensor.ndim)
        if tensor.ndim != dimensions or tensor.numel() == 0:
            wanted = f"it should have {dimensions} dimensions, each of at least 1"
            raise misshapen(key, tensor, wanted, "content-controlnet", name)
    width = len(state[CONV_IN])
    for key in (CONV_IN, *(key for key in state if key.endswith(".out_layers.3.weight"))):
        if len(state[key]) % width or width % GROUPS:
            wanted = f"a ControlNet's widths are multiples of {GROUPS} and of its first"
            raise misshapen(key, state[key], wanted, "content-controlnet", name)


def prepare_lq(image: Tensor, size: tuple[int, int], spec: ContentSpec) -> Tensor:
    """LQ image [B,3,H,W] in [0,1] -> [B,3,h,w] at latent size (h, w), in the value range of `spec`."""
    return spec.to_range(F.interpolate(image, size=size, mode=spec.kernel))


def controlnet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers ControlNetModel -> ldm ControlNet keys; any width and number of levels.

    Keys that are in the ldm layout already stay. Of a bigger checkpoint only `control_model.` is taken, without that
    prefix.
    """
    if any(key.startswith(TRUNK) for key in state_dict):
        state_dict = {k.removeprefix(TRUNK): weight for k, weight in state_dict.items() if k.startswith(TRUNK)}
    hints = len({match[1] for key in state_dict if (match := HINT.match(key))})
    table = {
        "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * hints + 2}",
        **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(hints)},
    }
    out = {}
    for key, weight in unet_to_ldm(state_dict).items():
        out[replace_prefix(ZERO_CONV.sub(r"zero_convs.\1.0.", key), table)] = weight
    return out
