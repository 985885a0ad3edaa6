"""The arms of RIDFR's ablations at nano scale: content modules that differ in one thing, trained in WORK/arms.

An arm whose recipe is the bundle's own is the bundle's own network, in WORK.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import nano_diffusion
from .loop import Recipe
from .nano_diffusion import ALIGN, CONTENT, Material, latents_of

LAMBDAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)


class LatentMaterial(Material):
    """Latent concatenation, as in RIDFR's Table 3: the LQ face joins as the VAE's latents instead of pixels."""

    lq_channels = 4

    def lq(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return latents_of(self.vae, self.degraded(rows, generator))


class Arms:
    """Trains an arm, or loads it from its finished run, when it is asked for.

    nano: the `NanoTraining` whose base, adapter and portraits all arms share. content_steps, align_steps: how long
    the two stages last in every arm.
    """

    def __init__(self, nano, content_steps: int = CONTENT.steps, align_steps: int = ALIGN.steps):
        self.nano = nano
        self.content_steps, self.align_steps = content_steps, align_steps
        self.logs: set[Path] = set()

    def content(self, seed: int, latent: bool = False, steps: int | None = None) -> nn.Module:
        """The content stage, Eq. 2; also the baseline of Table 4. steps: content_steps by default."""
        recipe, nano = of_length(CONTENT, steps or self.content_steps, seed), self.nano
        folder = self._folder(recipe, latent)
        material = (LatentMaterial if latent else Material)(nano.portraits, nano.vae, None, None)
        self.logs.add(folder / "content.jsonl")
        return nano_diffusion.train_content(folder, material, nano.unet, recipe)

    def finetuned(self, seed: int, strength: float) -> nn.Module:
        """Alignment Learning, Eq. 4-6, from the content stage of the same seed; strength 0 is naive finetuning."""
        recipe, nano = of_length(ALIGN, self.align_steps, seed), self.nano
        folder = self._folder(of_length(CONTENT, self.content_steps, seed))
        folder = folder if recipe == ALIGN else folder / f"{recipe.steps}-steps"
        content = copy.deepcopy(self.content(seed))
        self.logs.add(folder / f"aligned-{strength:g}.jsonl")
        return nano_diffusion.train_aligned(folder, nano.material, nano.unet, nano.adapter, content, recipe, strength)

    def _folder(self, content: Recipe, latent: bool = False) -> Path:
        """Of a content stage."""
        if content == CONTENT and not latent:
            return self.nano.work
        return self.nano.work / "arms" / f"{'latent' if latent else 'pixel'}-{content.seed}-{content.steps}-steps"

    def minutes(self) -> float:
        """How long the arms that were asked for have been trained, all together; shipped ones have no log."""
        logs = [log for log in self.logs if log.exists()]
        return sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs) / 60


def of_length(recipe: Recipe, steps: int, seed: int) -> Recipe:
    """The recipe with another seed and number of steps; a shorter run warms up over its first third."""
    warmup = recipe.warmup if steps >= recipe.steps else max(1, min(recipe.warmup, steps // 3))
    return replace(recipe, steps=steps, seed=seed, warmup=warmup)
