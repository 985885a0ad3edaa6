"""Decoupled ID attention on ComfyUI's MODEL: Attention(Q, K, V) + strength * Attention(Q, K', V')  (RIDFR, Eq. 3)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..ridfr_core.adapter import decoupled_attention
from . import id_rows
from .id_rows import KEY, rows_of
from .noise_range import NoiseRange

Place = tuple[str, int, int]  # block ("input", "middle", "output"), its number, transformer block within


class Region:
    """Where an identity acts: masks [M,H,W] in [0,1], one per image or one for all.

    The masks stay on the CPU, where they are resized to the latents: Apple's GPU cannot pool to sizes that don't
    divide. All layers of a model share one Region, which keeps what it has resized and moved.
    """

    def __init__(self, masks: Tensor):
        self.masks = masks.cpu()
        self._resized: dict[tuple[int, int, torch.device], Tensor] = {}

    def at(self, height: int, width: int, device: torch.device) -> Tensor:
        """The masks at the size of the latents, [M, height, width]."""
        if (height, width, device) not in self._resized:
            small = F.interpolate(self.masks[:, None], size=(height, width), mode="area")[:, 0]
            self._resized[height, width, device] = small.to(device)
        return self._resized[height, width, device]

    def cleanup(self) -> None:
        self._resized.clear()


@dataclass(eq=False)
class IdentityAttention:
    """Replaces the cross-attention of one layer, after `previous`, a patch that was there before.

    keys, values [people + 1, tokens, channels]: of each person, then of no one (for negative prompts).
    strength: one for all images, or [images]. bias [people + 1, 1, 1, tokens]: logarithms of the tokens' weights, -inf
    where a person has fewer tokens than others; None where all count the same. region: where it acts, None for
    everywhere. part: of the model's noise schedule in which it acts, None for all of it. sigmas: the part's noise
    levels (first, last) where the model is called outside a sampler run.

    ComfyUI copies a model's options before it moves their patches, so nothing is moved ahead: tensors go where they are
    needed at the first call, and come back after the run (`cleanup`).
    """

    keys: Tensor
    values: Tensor
    strength: float | Tensor
    sigmas: tuple[float, float] | None = None
    bias: Tensor | None = None
    region: Region | None = None
    previous: Callable | None = None
    part: NoiseRange | None = None
    added: list[tuple[Callable, dict]] = field(default_factory=list, init=False)
    _placed: dict[tuple, list] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads = extra_options["n_heads"]
        if self.previous is None:
            out = optimized_attention(
                q, k, v, heads, attn_precision=extra_options["attn_precision"], transformer_options=extra_options
            )
        else:
            out = self.previous(q, k, v, extra_options)
        rows = rows_of(extra_options, q)
        keys, values, bias, strength = self._on(q)
        person = rows.person(len(keys) - 1)
        keys, values, bias = (None if x is None else x.index_select(0, person) for x in (keys, values, bias))
        out = decoupled_attention(out, q, keys, values, heads, self._scale(strength, rows, extra_options, q), bias)
        for callback, options in self.added:
            term = callback(out, q, k, v, extra_options, **options)
            acts = rows.within(None, (options["sigma_start"], options["sigma_end"])) if "sigma_start" in options else 1
            out = out + acts * term
        return out

    def _on(self, q: Tensor) -> list:
        """keys, values, bias and strength, where and as q is."""
        place = (q.device, q.dtype)
        if place not in self._placed:
            parts = (self.keys, self.values, self.bias, self.strength)
            self._placed[place] = [x.to(q) if isinstance(x, Tensor) else x for x in parts]
        return self._placed[place]

    def _scale(self, strength, rows, extra_options: dict, q: Tensor) -> float | Tensor:
        """A number, or a tensor that stays on the device, so that no step waits for it."""
        scale = strength
        if isinstance(scale, Tensor):
            scale = rows.each(scale, "There are {} strengths").view(-1, 1, 1)
        if self.region is not None:
            scale = scale * rows.mask(self.region, *extra_options["activations_shape"][2:])
        acts = rows.within(self.part, self.sigmas)
        if acts is not None:
            scale = scale * acts
        return scale.to(q) if isinstance(scale, Tensor) else scale

    def add(self, callback: Callable, **options) -> None:
        """Another pack's attention on top, by the protocol of IPAdapter_plus, InstantID and PuLID.

        They call this on the patch that they find in a layer. The callback gives what is added to the result, between
        the noise levels sigma_start and sigma_end of the options.
        """
        self.added.append((callback, options))

    def twin(self) -> "IdentityAttention":
        """A patch of its own for a clone of the model, since others add to patches in place."""
        twin = replace(self)
        twin.added, twin._placed = [*self.added], self._placed
        return twin

    def to(self, target: torch.device | torch.dtype) -> "IdentityAttention":
        """Moves the patch that was there before, in place."""
        if hasattr(self.previous, "to"):
            self.previous = self.previous.to(target)
        return self

    def cleanup(self) -> None:
        """ComfyUI calls this after a run."""
        self._placed.clear()
        for part in (self.region, self.previous):
            if hasattr(part, "cleanup"):
                part.cleanup()

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
    depth = Counter(place[:2] for place in cross_attention_widths(model))
    for place, patch in patches.items():
        installed = attention_patches(model)
        key = place if place in installed or depth[place[:2]] > 1 else place[:2]
        previous = installed.get(place) or installed.get(place[:2])
        model.set_model_attn2_replace(replace(patch, previous=previous), *key)
    id_rows.install(model)
    if not model.get_callbacks(CallbacksMP.ON_CLONE, KEY):
        model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, own_patches)
    return model


def attention_patches(model: ModelPatcher) -> dict[tuple, Callable]:
    """What replaces cross-attention in a model, by ComfyUI's keys."""
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


def own_patches(_: ModelPatcher, clone: ModelPatcher) -> None:
    """Gives a clone patches of its own."""
    patches = attention_patches(clone)
    patches.update({key: patch.twin() for key, patch in patches.items() if isinstance(patch, IdentityAttention)})
