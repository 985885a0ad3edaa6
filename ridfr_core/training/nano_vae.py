"""The nano VAE: SD's autoencoder at small width, on portraits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nano.config import LATENT_SCALE, VAE
from .loop import Recipe, Run
from .portrait_data import PortraitSet

RECIPE = Recipe(steps=4000, batch=16, lr=1.5e-3, ema=0.998, cooldown=0.5)
WHOLE = 0.85  # from this share of the steps on: whole portraits, in smaller batches, instead of 64-pixel crops


def build() -> nn.Module:
    """An untrained diffusers AutoencoderKL of the nano dimensions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE, scaling_factor=LATENT_SCALE)


def train(run_folder, portraits: PortraitSet, recipe: Recipe = RECIPE) -> nn.Module:
    """Reconstruction (L2 and a little L1) with a weak KL term; the latents are then scaled to unit variance."""
    torch.manual_seed(recipe.seed)
    vae = build()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        whole = step >= WHOLE * recipe.steps
        rows = torch.randint(len(portraits), (recipe.batch // 4 if whole else recipe.batch,), generator=generator)
        images = portraits.batch(rows) * 2 - 1
        if not whole:
            images = _crops(images, 64, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().mean() / images[0].numel()
        return F.mse_loss(decoded, images) + 0.05 * F.l1_loss(decoded, images) + 1e-6 * kl

    Run(run_folder, "vae", vae, recipe).train(loss)
    vae.requires_grad_(False).eval()
    standardise(vae, portraits)
    return vae


def _crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """One random window per image, on the grid of the latents."""
    places = torch.randint((images.shape[-1] - size) // 8 + 1, (len(images), 2), generator=generator) * 8
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, places.tolist())])


@torch.no_grad()
def standardise(vae: nn.Module, portraits: PortraitSet, count: int = 500) -> None:
    """Rescale the 1x1 convolutions round the latent so that latents times SD's 0.18215 have mean 0 and variance 1."""
    rows = torch.linspace(0, len(portraits) - 1, count).long()
    z = torch.cat([vae.encode(portraits.batch(part) * 2 - 1).latent_dist.mean for part in rows.split(50)])
    mean = z.mean((0, 2, 3))
    gain, channels = 1 / (LATENT_SCALE * (z - mean[:, None, None]).std()), len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] *= gain
    into.bias[:channels] = (into.bias[:channels] - mean) * gain
    into.bias[channels:] += 2 * gain.log()  # the log variance
    back.bias += back.weight.squeeze(-1).squeeze(-1) @ mean  # before the weight changes: z = z'/gain + mean
    back.weight /= gain


def psnr(vae: nn.Module, portraits: PortraitSet) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB."""
    values = []
    with torch.no_grad():
        for rows in torch.arange(len(portraits)).split(50):
            images = portraits.batch(rows)
            decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
            values.append(-10 * (decoded.clamp(0, 1) - images).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()
