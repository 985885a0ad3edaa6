"""What each stage of RIDFR learns, and by which loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import IdentityAdapter
from ..content import ContentSpec, prepare_lq
from .base import Base
from .losses import Noised, control, error, misalignment, predict, repeated


@dataclass(frozen=True)
class Frozen:
    """What a stage computes with but does not train; a plain class, so that it is not part of a module's state."""

    base: Base
    spec: ContentSpec | None = None
    adapter: IdentityAdapter | None = None
    shortcut: bool = True

    def condition(self, lq: Tensor) -> Tensor:
        """LQ images [B,3,H,W] in [0,1] -> what is concatenated with z: [B,3,h,w] pixels or [B,4,h,w] latents."""
        if self.spec.kind == "latent":
            return self.base.latents(lq)
        return prepare_lq(lq, (lq.shape[-2] // 8, lq.shape[-1] // 8), self.spec)

    def noised(self, batch: dict[str, Tensor]) -> Noised:
        latents = self.base.latents(batch["hq"], batch["posterior"])
        return Noised.of(latents, batch["noise"], batch["t"], self.base.schedule)

    def keys_values(self, batch: dict[str, Tensor], adapter: IdentityAdapter) -> list[tuple[Tensor, Tensor]]:
        """(K', V') of each layer for all references [K*B,...]: the first of each photo, then the second, ..."""
        embedding, clip = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("embedding", "clip"))
        return adapter.keys_values(adapter.tokens(embedding, clip, self.shortcut))


class ContentStage(nn.Module):
    """RIDFR Eq. 2: the content module learns to restore without any identity."""

    def __init__(self, frozen: Frozen, content: nn.Module):
        super().__init__()
        self.frozen, self.content = frozen, content

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: see `draws.Draws`, each with a first dimension B. Returns scalars; "loss" is the one to minimise."""
        base, noised = self.frozen.base, self.frozen.noised(batch)
        context = base.context(len(noised.z))
        residuals = control(self.content, noised, self.frozen.condition(batch["lq"]), context, self.frozen.spec)
        return {"loss": error(predict(base.unet, noised, context, residuals), noised.target)}


class AlignStage(ContentStage):
    """RIDFR Eq. 4-6, Alignment Learning: one LQ face, one z_t, two references of the person, one answer.

    strength: lambda; 0 is naive finetuning on the same data.
    """

    def __init__(self, frozen: Frozen, content: nn.Module, strength: float):
        super().__init__(frozen, content)
        self.strength = strength

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        base, noised = self.frozen.base, self.frozen.noised(batch)
        context, twice = base.context(len(noised.z)), noised.repeat(2)
        residuals = control(self.content, noised, self.frozen.condition(batch["lq"]), context, self.frozen.spec)
        with torch.no_grad():
            identity = self.frozen.keys_values(batch, self.frozen.adapter)
        guess = predict(base.unet, twice, context.repeat(2, 1, 1), repeated(residuals, 2), identity)
        diffusion, alignment = error(guess, twice.target), misalignment(guess)
        loss = diffusion + self.strength * alignment
        return {"loss": loss, "diffusion": diffusion.detach(), "alignment": alignment.detach()}


class AdapterStage(nn.Module):
    """IP-Adapter's training: every photo is its own reference, and the UNet is frozen."""

    def __init__(self, frozen: Frozen, adapter: IdentityAdapter):
        super().__init__()
        self.frozen, self.adapter = frozen, adapter

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        base, noised = self.frozen.base, self.frozen.noised(batch)
        identity = self.frozen.keys_values(batch, self.adapter)
        return {"loss": error(predict(base.unet, noised, base.context(len(noised.z)), identity=identity),
                              noised.target)}
