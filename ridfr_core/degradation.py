"""Synthetic degradation of face photos: RIDFR Eq. 7, FaceMe Eq. 6."""

import io
import math
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import RidfrError
from .packages import need

MIN_SIZE = 32


@dataclass(frozen=True)
class DegradationRange:
    """Ranges (low, high) that degradations are drawn from, uniformly. The defaults are FaceMe's, for 512 px faces."""

    sigma: tuple[float, float] = (0.2, 10.0)
    ratio: tuple[float, float] = (1.0, 16.0)
    noise: tuple[float, float] = (0.0, 15.0)
    quality: tuple[float, float] = (30.0, 100.0)

    def draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Arguments of `degrade` for `n` images, each [n]; the first ones don't depend on `n`."""
        low, high = torch.tensor([self.sigma, self.ratio, self.noise, self.quality]).T
        drawn = low + (high - low) * torch.stack([torch.rand(4, generator=generator) for _ in range(n)])
        return dict(zip(("sigma", "ratio", "noise", "quality"), drawn.unbind(1), strict=True))


def degrade(
    image: Tensor,
    sigma: Tensor | float,
    ratio: Tensor | float,
    noise: Tensor | float,
    quality: Tensor | float,
    generator: torch.Generator | None = None,
    subsampling: str = "4:4:4",
) -> Tensor:
    """{[(I * k_sigma) down_r + n_delta]_JPEG_q} up_r: RIDFR Eq. 7, scaled back to the size of I as in FaceMe Eq. 6.

    Args:
        image: [B,3,H,W] in [0,1], at least 32x32.
        sigma: Gaussian blur in pixels of `image`, >= 0; the border is replicated.
        ratio: downscaling r >= 1, need not be an integer. Down and up are bilinear without antialiasing, as in GFPGAN.
        noise: standard deviation of the Gaussian noise, in units of 1/255.
        quality: JPEG quality, rounded to an integer 1..100, by a real codec.
        generator: CPU generator of the noise. Image i of a batch depends on the seed and i alone.
        subsampling: JPEG chroma subsampling. Most photos have 4:2:0, but at the size of a strongly downscaled face
            that wipes out all colour; "4:4:4" keeps a face's colours at any size.
        sigma, ratio, noise and quality are numbers or tensors [B], one per image.
    Returns: [B,3,H,W] float32 in [0,1] on the device of `image`.
    Raises RidfrError: smaller than 32x32, NaN or infinite values.
    """
    _check(image)
    seeds = torch.randint(2**62, (len(image),), generator=generator)
    parameters = [torch.as_tensor(p).expand(len(image)).tolist() for p in (sigma, ratio, noise, quality, seeds)]
    each = zip(image.float().cpu(), *parameters, strict=True)
    return torch.stack([_degrade_one(*one, subsampling) for one in each]).to(image.device)


def _degrade_one(
    image: Tensor, sigma: float, ratio: float, noise: float, quality: float, seed: int, subsampling: str
) -> Tensor:
    height, width = image.shape[-2:]
    small = (max(1, round(height / ratio)), max(1, round(width / ratio)))
    x = F.interpolate(blur(image[None], sigma), size=small, mode="bilinear")
    x = x + noise / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    x = jpeg(x[0], round(quality), subsampling)[None]
    return F.interpolate(x, size=(height, width), mode="bilinear")[0]


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B,C,H,W], cut off at 4 sigma; sigma 0 leaves the image as it is."""
    if sigma == 0:
        return image
    gaussian_blur2d = need("kornia.filters").gaussian_blur2d
    return gaussian_blur2d(image, 2 * math.ceil(4 * sigma) + 1, (sigma, sigma), border_type="replicate")


def jpeg(image: Tensor, quality: int, subsampling: str) -> Tensor:
    """[3,H,W] in [0,1] (clamped) through JPEG in memory."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    decoded = numpy.asarray(Image.open(file), dtype=numpy.float32)
    return torch.from_numpy(decoded / 255).permute(2, 0, 1)


def _check(image: Tensor) -> None:
    height, width = image.shape[-2:]
    if min(height, width) < MIN_SIZE:
        raise RidfrError(
            f"The image is {width}x{height} pixels, too small to degrade: use one of at least {MIN_SIZE}x{MIN_SIZE}."
        )
    for i, one in enumerate(image, 1):
        if not torch.isfinite(one).all():
            raise RidfrError(f"Image {i} has NaN or infinite values: check the node that made it.")
