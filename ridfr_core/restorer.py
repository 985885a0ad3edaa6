"""RIDFR's inference on diffusers' networks: content ControlNet, identity adapter, UniPC, guidance on the identity."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .content import ContentSpec

KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Restorer:
    """The frozen networks of one method.

    unet has the identity processors of `let_identity_in`, unless it only ever restores blindly. context: [1,T,D], the
    text tokens of the empty prompt. schedule: config of a diffusers scheduler. scale: the VAE's scaling factor.
    condition: LQ images [B,3,H,W] in [0,1] -> what joins the noisy latents, at their size (see `content.prepare_lq`).
    """

    unet: nn.Module
    vae: nn.Module
    content: nn.Module
    spec: ContentSpec
    context: Tensor
    schedule: dict
    scale: float
    condition: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def restore(self, lq: Tensor, identity: KeysValues | None = None, nobody: KeysValues | None = None,
                guidance: float = 1.0, steps: int = 20, seeds: Tensor | None = None) -> Tensor:
        """Restored faces [B,3,H,W] in [0,1] of LQ faces in [0,1].

        identity: (K', V') of each layer, [B,T,C], or None for the blind restoration; nobody: the same of no one, for a
        guidance other than 1. seeds: [B], of each image's start noise; all 0 if left out.
        """
        condition = self.condition(lq)
        seeds = torch.zeros(len(lq), dtype=torch.long) if seeds is None else seeds
        z = start_noise(seeds, condition.shape[-2:]).to(lq.device)
        latents = self.sample(z, condition, identity, nobody, guidance, steps)
        return (self.vae.decode(latents / self.scale).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(self, z: Tensor, condition: Tensor, identity: KeysValues | None = None,
               nobody: KeysValues | None = None, guidance: float = 1.0, steps: int = 20) -> Tensor:
        """Clean latents from start noise [B,4,h,w], by UniPC (bh2); see `restore`."""
        from diffusers import UniPCMultistepScheduler

        solver = UniPCMultistepScheduler.from_config(self.schedule, solver_type="bh2")
        solver.set_timesteps(steps)
        guided = identity is not None and guidance != 1
        if guided:
            identity = [(torch.cat([k0, k]), torch.cat([v0, v])) for (k0, v0), (k, v) in zip(nobody, identity)]
        context = self.context.to(z).expand(len(z), -1, -1)
        for t in solver.timesteps:
            residuals = self.content(self.spec.concat(z, condition), t, context, torch.zeros(()), return_dict=False)
            guess = self.predict(z, t, context, residuals, identity, guidance if guided else 1.0)
            z = solver.step(guess, t, z).prev_sample
        return z

    def predict(self, z, t, context, residuals, identity, guidance):
        """What the model predicts for z at t. guidance: other than 1, the identity is nobody's and the person's."""
        if guidance == 1:
            return self._unet(z, t, context, residuals, identity)
        twice = self._unet(z.repeat(2, 1, 1, 1), t, context.repeat(2, 1, 1), doubled(residuals), identity)
        without, with_identity = twice.chunk(2)
        return without + guidance * (with_identity - without)

    def _unet(self, z, t, context, residuals, identity):
        down, mid = residuals
        return self.unet(z, t, context, cross_attention_kwargs=None if identity is None else {"identity": identity},
                         down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


def doubled(residuals):
    down, mid = residuals
    return [one.repeat(2, 1, 1, 1) for one in down], mid.repeat(2, 1, 1, 1)


def start_noise(seeds: Tensor, size: tuple[int, int]) -> Tensor:
    """Noise [B,4,h,w], each image's from its own seed alone."""
    return torch.stack([torch.randn(4, *size, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
