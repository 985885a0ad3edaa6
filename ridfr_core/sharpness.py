"""How degraded a face is, told from the picture alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import luma
from .degradation import blur

SIZE = 128  # px: about what a recogniser sees of a face; detail finer than this says little about who it is
SHARP, RUIN = 0.33, 0.07  # detail ratio of an untouched photograph, and of a face without any features left
STEPS = 1 / 8  # of the variance of 8-bit rounding: the part that its sparse steps add to the finest octave


def estimate_degradation(images: Tensor) -> Tensor:
    """Estimate [B] in [0,1] for face crops [B,3,H,W], RGB in [0,1]: 0 is a sharp photograph, 1 a ruin.

    With the luminance at 128x128 split into octaves b1 (finest) to b4 by Gaussians of 1, 2, 4 and 8 px,

        detail ratio r = sqrt((rms(b1)^2 - n1^2 - q^2) / (rms(b4)^2 + 4 n1^2 + 4 n2^2)),   n = 1.4826 median|b|
        estimate       = log(SHARP / r) / log(SHARP / RUIN), clamped.

    Exposure cancels out. In a dark picture of 8 bits, though, the steps of rounding look like edges, so q takes them
    off where all values are multiples of 1/255; detail that was lost between them counts as lost. A picture without
    any contrast is a 1.

    Edges are sparse and grain is everywhere, so the median of an octave measures its grain n, which counts as
    degradation, not as detail. SHARP and RUIN were read off the portraits of nano and seven faces in photographs, each
    degraded in seven steps from untouched (r 0.33 to 0.42, drawings up to 1.3) to blur 6, downscale 12, noise 15 and
    JPEG 40 (r 0.06 to 0.07). What it can't tell: grain that was enlarged with the picture looks like detail where it is
    strong (more than about 20 of 255), JPEG blocks alone hardly count, and a dark picture (below a tenth of full
    exposure) that was enlarged after its rounding counts as sharper than it is.
    """
    return torch.cat([_estimate(one.float()) for one in images.split(1)])  # one by one: that bounds the memory


def _estimate(images: Tensor) -> Tensor:
    luminance = _luminance(images)
    finest, second, _, coarsest = _octaves(luminance)
    grain = 4 * (_grain(finest) + _grain(second))
    detail = (_energy(finest) - _grain(finest) - _steps(images)).clamp(min=0)
    contrast = _energy(coarsest) + grain
    flat = contrast <= 1e-10 * _energy(luminance)  # what is left is the rounding of float32
    ratio = torch.where(flat, 0, detail / contrast).sqrt().clamp(min=1e-5)
    low, high = torch.tensor([RUIN, SHARP]).log()
    return ((high - ratio.log()) / (high - low)).clamp(0, 1)


def _luminance(images: Tensor) -> Tensor:
    return luma(F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True))


def _steps(images: Tensor) -> Tensor:
    """What rounding to 8 bits adds to the energy of the finest octave [B]; shrinking a picture averages it out."""
    levels = images * 255
    rounded = (levels - levels.round()).abs().amax((1, 2, 3)) < 1e-5 * levels.amax((1, 2, 3))
    height, width = images.shape[-2:]
    return rounded * (STEPS / 12 / 255**2 * min(1, SIZE**2 / (height * width)))


def _octaves(luminance: Tensor) -> list[Tensor]:
    """Four differences of Gaussians, finest first, each [B,1,SIZE,SIZE]."""
    levels = [luminance, *(blur(luminance, sigma) for sigma in (1.0, 2.0, 4.0, 8.0))]
    return [fine - coarse for fine, coarse in zip(levels, levels[1:])]


def _energy(octave: Tensor) -> Tensor:
    return octave.square().mean((1, 2, 3))


def _grain(octave: Tensor) -> Tensor:
    """Variance [B] of the noise in an octave, from its median absolute value as if that noise were Gaussian."""
    return (1.4826 * octave.abs().flatten(1).median(1).values).square()
