"""The nano VAE: SD's autoencoder at small width, on portraits."""

import torch
from torch import Tensor, nn

from ..nano.config import LATENT_SCALE, PORTRAIT, VAE
from .loop import Recipe, Run
from .portrait_data import PortraitSet

RECIPE = Recipe(steps=7000, batch=16, lr=1.5e-3, ema=0.998, cooldown=0.5)
DECODER = Recipe(steps=500, batch=4, lr=4e-4, ema=0.99, cooldown=0.8, warmup=20)
WINDOW = 64
WHOLE = 0.93  # from this share of the steps on: whole portraits, in smaller batches, instead of windows


def build() -> nn.Module:
    """An untrained diffusers AutoencoderKL of the nano dimensions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE, scaling_factor=LATENT_SCALE)


def train(run_folder, portraits: PortraitSet, recipe: Recipe = RECIPE) -> nn.Module:
    """Reconstruction with a weak KL term; the latents are then scaled to unit variance."""
    torch.manual_seed(recipe.seed)
    vae = build()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        whole = step >= WHOLE * recipe.steps
        images, weight, landmarks = batch(portraits, recipe.batch // 4 if whole else recipe.batch, generator)
        if not whole:
            images, weight = windows(images, weight, landmarks, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().mean() / images[0].numel()
        return difference(decoded, images, weight) + 1e-6 * kl

    Run(run_folder, "vae", vae, recipe).train(loss)
    vae.requires_grad_(False).eval()
    standardise(vae, portraits)
    return vae


def train_decoder(run_folder, portraits: PortraitSet, vae: nn.Module, recipe: Recipe = DECODER) -> nn.Module:
    """Train the decoder on, with the encoder as it is: whatever was trained on the latents stays valid.

    On whole portraits alone: 1,200 steps on windows cost 1.3 dB, perhaps since group norms measure the whole picture.
    """
    halves = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images, weight, _ = batch(portraits, recipe.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mode()
            decoded = vae.decode(latents).sample.float()
        return difference(decoded, images, weight)

    Run(run_folder, "decoder", halves, recipe).train(loss)
    return vae.requires_grad_(False)


def batch(portraits: PortraitSet, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Portraits in [-1,1], the weights of their pixels, and landmarks.

    At eight pixels to a latent an eye is hardly more than one latent wide, and a plain mean error spends the latents on
    hair and background. So what is near the five landmarks counts more.
    """
    rows = torch.randint(len(portraits), (count,), generator=generator)
    landmarks = portraits.landmarks[rows]
    return portraits.batch(rows) * 2 - 1, near(landmarks, PORTRAIT, radius=9), landmarks


def difference(decoded: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Weighted L2 with a little L1 and a little of the contours."""
    error = decoded - images
    return (weight * (error.square() + 0.1 * error.abs())).mean() + 0.1 * edges(error, weight)


def near(landmarks: Tensor, size: int, radius: float) -> Tensor:
    """Weights [B,1,size,size]: 1 far from the landmarks [B,5,2], 7 on them."""
    axis = torch.arange(size, dtype=torch.float32)
    x, y = landmarks[..., 0, None] - axis, landmarks[..., 1, None] - axis
    bells = torch.exp(-(y.square()[..., :, None] + x.square()[..., None, :]) / (2 * radius**2))
    return 1 + 6 * bells.amax(1, keepdim=True)


def edges(error: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean absolute difference of neighbouring errors: what is left of the contours."""
    across, down = error.diff(dim=3).abs() * weight[..., 1:], error.diff(dim=2).abs() * weight[..., 1:, :]
    return across.mean() + down.mean()


def windows(images: Tensor, weight: Tensor, landmarks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One window per portrait of images and weights, on the grid of the latents: two of three on the face."""
    last = (images.shape[-1] - WINDOW) // 8
    anywhere = torch.randint(last + 1, (len(images), 2), generator=generator)
    jitter = torch.randint(-1, 3, (len(images), 2), generator=generator)
    on_face = ((landmarks.mean(1) - WINDOW / 2) / 8).floor().long() + jitter
    face = torch.rand(len(images), 1, generator=generator) < 2 / 3
    places = torch.where(face, on_face.clamp(0, last), anywhere) * 8
    both = torch.cat([images, weight], 1)
    cut = torch.stack([one[:, y : y + WINDOW, x : x + WINDOW] for one, (x, y) in zip(both, places.tolist())])
    return cut[:, :3], cut[:, 3:]


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
