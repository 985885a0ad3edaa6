"""Decoupled ID attention on ComfyUI's MODEL: Attention(Q, K, V) + strength * Attention(Q, K', V')  (RIDFR, Eq. 3)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..ridfr_core.adapter import decoupled_attention

Place = tuple[str, int, int]  # block ("input", "middle", "output"), its number, transformer block within


@dataclass(frozen=True)
class IdentityAttention:
    """Replaces the cross-attention of one layer, after `previous`, a patch that was there before.

    keys, values [people + 1, tokens, channels]: of each person, then of no one (for the negative prompt's half of CFG).
    sigmas: (first, last) noise levels between which the identity acts, or None for always.
    """

    keys: Tensor
    values: Tensor
    strength: float
    sigmas: tuple[float, float] | None = None
    previous: Callable | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads = extra_options["n_heads"]
        if self.previous is None:
            out = optimized_attention(
                q, k, v, heads, attn_precision=extra_options["attn_precision"], transformer_options=extra_options
            )
        else:
            out = self.previous(q, k, v, extra_options)
        chunks = extra_options["cond_or_uncond"]
        keys, values = (self._rows(x, chunks, len(q)) for x in (self.keys, self.values))
        return decoupled_attention(out, q, keys, values, heads, self._scale(q, extra_options["sigmas"]))

    def _rows(self, x: Tensor, chunks: list[int], batch: int) -> Tensor:
        """[batch, tokens, channels]; a chunk is the latent batch under one conditioning: 0 positive, 1 negative."""
        size, people = batch // len(chunks), len(x) - 1
        if people not in (1, size):
            raise ValueError(
                f"The identity has {people} people but the latent batch has {size} images: give as many "
                "images as people, or one person for all."
            )
        return torch.cat([(x[-1:] if chunk else x[:-1]).expand(size, -1, -1) for chunk in chunks])

    def _scale(self, q: Tensor, sigma: Tensor) -> float | Tensor:
        if self.sigmas is None:
            return self.strength
        first, last = self.sigmas
        acts = (sigma[:1] <= first) & (sigma[:1] >= last)  # stays on the device: no step waits for it
        return (self.strength * acts).to(q).view(1, 1, 1)

    def to(self, target: torch.device | torch.dtype) -> "IdentityAttention":
        """Moved to a device. A dtype is for `previous` alone: the model's may be fp8; here q's is taken at the call."""
        previous = self.previous.to(target) if hasattr(self.previous, "to") else self.previous
        if isinstance(target, torch.dtype):
            return replace(self, previous=previous)
        return replace(self, previous=previous, keys=self.keys.to(target), values=self.values.to(target))

    def models(self) -> list[ModelPatcher]:
        return self.previous.models() if hasattr(self.previous, "models") else []


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
    depth = Counter(place[:2] for place in patches)
    for place, patch in patches.items():
        installed = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        key = place if place in installed or depth[place[:2]] > 1 else place[:2]
        previous = installed.get(place) or installed.get(place[:2])
        model.set_model_attn2_replace(replace(patch, previous=previous), *key)
    return model
