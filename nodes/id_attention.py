"""Decoupled ID attention on ComfyUI's MODEL: Attention(Q, K, V) + strength * Attention(Q, K', V')  (RIDFR, Eq. 3)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..ridfr_core.adapter import decoupled_attention

Place = tuple[str, int, int]  # block ("input", "middle", "output"), its number, transformer block within


class Region:
    """Where an identity acts: masks [M,H,W] in [0,1], one per image or one for all, asked for on `device`.

    The masks stay on the CPU, where they are resized: Apple's GPU cannot pool to sizes that don't divide. All layers of
    a model share one Region, which keeps what it has moved and resized.
    """

    def __init__(self, masks: Tensor, device: torch.device | None = None):
        self.masks, self.device = masks.cpu(), device or torch.device("cpu")
        self._resized: dict[tuple[int, int], Tensor] = {}
        self._moved: dict[torch.device, Region] = {}

    def at(self, height: int, width: int) -> Tensor:
        """The masks at a layer's size, [M, height * width, 1]."""
        if (height, width) not in self._resized:
            small = F.interpolate(self.masks[:, None], size=(height, width), mode="area")
            self._resized[height, width] = small.flatten(2).transpose(1, 2).to(self.device)
        return self._resized[height, width]

    def to(self, device: torch.device) -> "Region":
        if device == self.device:
            return self
        if device not in self._moved:
            self._moved[device] = Region(self.masks, device)
        return self._moved[device]


@dataclass(frozen=True)
class IdentityAttention:
    """Replaces the cross-attention of one layer, after `previous`, a patch that was there before.

    keys, values [people + 1, tokens, channels]: of each person, then of no one (for the negative prompt's half of CFG).
    strength: one for all images, or [images]. bias [people + 1, 1, 1, tokens]: logarithms of the tokens' weights, -inf
    where a person has fewer tokens than others; None where all count the same. region: where it acts, None for
    everywhere. sigmas: (first, last) noise levels between which the identity acts, or None for always.
    """

    keys: Tensor
    values: Tensor
    strength: float | Tensor
    sigmas: tuple[float, float] | None = None
    bias: Tensor | None = None
    region: Region | None = None
    previous: Callable | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads = extra_options["n_heads"]
        if self.previous is None:
            out = optimized_attention(
                q, k, v, heads, attn_precision=extra_options["attn_precision"], transformer_options=extra_options
            )
        else:
            out = self.previous(q, k, v, extra_options)
        chunks = extra_options["cond_or_uncond"]  # a chunk: the latent batch under one conditioning; 0 positive, 1 not
        images = len(q) // len(chunks)
        scale = self._scale(q, extra_options, images, len(chunks))
        keys, values, bias = (self._rows(x, chunks, images) for x in (self.keys, self.values, self.bias))
        return decoupled_attention(out, q, keys, values, heads, scale, bias)

    def _rows(self, x: Tensor | None, chunks: list[int], images: int) -> Tensor | None:
        """[people + 1, ...] -> [len(chunks) * images, ...]: of each image's person, of no one in negative chunks."""
        if x is None:
            return None
        people = per_image(x[:-1], images, "The identity has {} people")
        return torch.cat([x[-1:].expand_as(people) if chunk else people for chunk in chunks])

    def _scale(self, q: Tensor, extra_options: dict, images: int, chunks: int) -> float | Tensor:
        """A number, or a tensor that stays on the device, so that no step waits for it."""
        scale = self.strength
        if isinstance(scale, Tensor):
            scale = per_image(scale, images, "There are {} strengths").repeat(chunks).view(-1, 1, 1)
        if self.region is not None:
            height, width = extra_options["activations_shape"][2:]
            masks = per_image(self.region.at(height, width), images, "There are {} masks")
            scale = scale * masks.repeat(chunks, 1, 1)
        if self.sigmas is not None:
            first, last = self.sigmas
            sigma = extra_options["sigmas"][:1]
            scale = scale * ((sigma <= first) & (sigma >= last)).view(1, 1, 1)
        return scale.to(q) if isinstance(scale, Tensor) else scale

    def to(self, target: torch.device | torch.dtype) -> "IdentityAttention":
        """Moved to a device. A dtype is for `previous` alone: the model's may be fp8; here q's is taken at the call."""
        moved = {"previous": self.previous.to(target) if hasattr(self.previous, "to") else self.previous}
        if not isinstance(target, torch.dtype):
            own = {name: getattr(self, name) for name in ("keys", "values", "strength", "bias", "region")}
            moved |= {name: x.to(target) for name, x in own.items() if hasattr(x, "to")}
        return replace(self, **moved)

    def models(self) -> list[ModelPatcher]:
        return self.previous.models() if hasattr(self.previous, "models") else []


def per_image(x: Tensor, images: int, what: str) -> Tensor:
    """[1 or images, ...] -> [images, ...]. Raises ValueError for other lengths, which `what` names."""
    if len(x) not in (1, images):
        raise ValueError(
            f"{what.format(len(x))} but the latent batch has {images} images: give as many of both, or one for all."
        )
    return x.expand(images, *x.shape[1:])


def cross_attention_widths(model: ModelPatcher) -> dict[Place, int]:
    """Width of every cross-attention layer of a UNet; empty for other architectures."""
    unet = model.get_model_object("diffusion_model")
    blocks = [("input", i, b) for i, b in enumerate(getattr(unet, "input_blocks", ()))]
    blocks += [("middle", 0, getattr(unet, "middle_block", ()))]
    blocks += [("output", i, b) for i, b in enumerate(getattr(unet, "output_blocks", ()))]
    widths = {}
    for name, number, block in blocks:
        for layer in block:
            for index, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                widths[name, number, index] = transformer.attn2.heads * transformer.attn2.dim_head
    return widths


def install(model: ModelPatcher, patches: dict[Place, IdentityAttention]) -> ModelPatcher:
    """A clone of the model with the patches, each called after what already replaces its layer.

    ComfyUI looks for (block, id, index) before (block, id). Most packs use the shorter key where a block has a single
    transformer; the key of the patch that runs now is kept, so that this one runs in its place.
    """
    model = model.clone()
    depth = Counter(place[:2] for place in cross_attention_widths(model))
    for place, patch in patches.items():
        installed = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        key = place if place in installed or depth[place[:2]] > 1 else place[:2]
        previous = installed.get(place) or installed.get(place[:2])
        model.set_model_attn2_replace(replace(patch, previous=previous), *key)
    return model
