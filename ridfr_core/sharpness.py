"""How degraded a face is, told from the picture alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .degradation import blur

SIZE = 128  # px: about what a recogniser sees of a face; detail finer than this says little about who it is
SHARP, RUIN = 0.33, 0.07  # detail ratio of an untouched photograph, and of a face without any features left
LUMA = (0.299, 0.587, 0.114)


def estimate_degradation(images: Tensor) -> Tensor:
    """Estimate [B] in [0,1] for face crops [B,3,H,W], RGB in [0,1]: 0 is a sharp photograph, 1 a ruin.

    With the luminance at 128x128 split into octaves b1 (finest) to b4 by Gaussians of 1, 2, 4 and 8 px,

        detail ratio r = sqrt((rms(b1)^2 - n1^2) / (rms(b4)^2 + 4 n1^2 + 4 n2^2)),   n = 1.4826 median|b|
        estimate       = log(SHARP / r) / log(SHARP / RUIN), clamped.

    Edges are sparse and grain is everywhere, so the median of an octave measures its grain n, which counts as
    degradation, not as detail. SHARP and RUIN were read off the portraits of nano and seven faces in photographs, each
    degraded in seven steps from untouched (r 0.33 to 0.42, drawings up to 1.3) to blur 6, downscale 12, noise 15 and
    JPEG 40 (r 0.06 to 0.07). What it can't tell: grain that was enlarged with the picture looks like detail where it is
    strong (more than about 20 of 255), and JPEG blocks alone hardly count.
    """
    finest, second, _, coarsest = _octaves(_luminance(images.float()))
    grain = 4 * (_grain(finest) + _grain(second))
    detail = (_energy(finest) - _grain(finest)).clamp(min=0)
    ratio = (detail / (_energy(coarsest) + grain).clamp(min=1e-10)).sqrt().clamp(min=1e-5)
    low, high = torch.tensor([RUIN, SHARP]).log()
    return ((high - ratio.log()) / (high - low)).clamp(0, 1)


def _luminance(images: Tensor) -> Tensor:
    small = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (small * small.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _octaves(luminance: Tensor) -> list[Tensor]:
    """Four differences of Gaussians, finest first, each [B,1,SIZE,SIZE]."""
    levels = [luminance, *(blur(luminance, sigma) for sigma in (1.0, 2.0, 4.0, 8.0))]
    return [fine - coarse for fine, coarse in zip(levels, levels[1:])]


def _energy(octave: Tensor) -> Tensor:
    return octave.square().mean((1, 2, 3))


def _grain(octave: Tensor) -> Tensor:
    """Variance [B] of the noise in an octave, from its median absolute value as if that noise were Gaussian."""
    return (1.4826 * octave.abs().flatten(1).median(1).values).square()
