"""What a restoration is measured by: closeness to the truth, whose face it shows, and how sure that is.

Those metrics that need trained networks of their own (LPIPS, MUSIQ, ...) are in `perceptual`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .color import luma
from .errors import RidfrError
from .packages import need

WINDOW = 11  # px, of SSIM


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of images [B,3,H,W] in [0,1]; infinite where they are equal."""
    return -10 * (image - truth).square().mean((1, 2, 3)).log10()


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity [B] of the luma of images [B,3,H,W] in [0,1], at least 11x11; pyiqa's convention.

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, windows that reach over the border left out.
    Raises RidfrError for smaller images.
    """
    height, width = image.shape[-2:]
    if min(height, width) < WINDOW:
        raise RidfrError(f"The image has {width}x{height} pixels, too few for SSIM: use one of at least "
                         f"{WINDOW}x{WINDOW}.")
    ssim_map = need("kornia.metrics").ssim
    return ssim_map(luma(image.float()), luma(truth.float()), window_size=WINDOW, padding="valid").mean((1, 2, 3))


def landmark_distance(landmarks: Tensor, truth: Tensor) -> Tensor:
    """LMD [B]: mean Euclidean distance, in pixels, of the five landmarks [B,5,2] from where they belong."""
    return (landmarks - truth).norm(dim=-1).mean(-1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """IDS [...]: cosine of unit embeddings [...,512]."""
    return (a * b).sum(-1)


def identity_variance(embeddings: Tensor) -> Tensor:
    """RIDFR section 4.3, for each person [P]; the paper's I.V. is the mean over people.

    embeddings: [P,R,D], unit length, of R >= 2 results for one LQ image, each restored with another reference photo
    of the same person. Returns the trace of their covariance, 1/(R-1) sum_r |e_r - mean(e)|^2, which is 1 minus the
    mean cosine of two different results: 0 where all show one face, about 1 where all show strangers.
    """
    return embeddings.var(dim=1, correction=1).sum(-1)


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % interval that it lies in."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    *measured: Tensor, statistic: Callable[..., Tensor] = lambda mean: mean, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap over people (Efron 1979) of a statistic of means.

    Args:
        measured: one or several quantities, each [P], of the same people in the same order. A resample takes the same
            people from each of them, so differences and ratios are paired.
        statistic: takes the mean of each quantity, and is called with whole tensors of them.
    """
    table = torch.stack(measured).double()
    people = table.shape[1]
    draws = torch.randint(people, (resamples, people), generator=torch.Generator().manual_seed(seed))
    values = statistic(*table[:, draws].mean(-1))
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(statistic(*table.mean(1))), low, high)
