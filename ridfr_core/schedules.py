"""When the papers' samplers call the network, and what they start from."""

import torch
from torch import Tensor

from .errors import RidfrError

GRIDS = ("linspace", "leading")


def timesteps(grid: str, steps: int, train_steps: int = 1000) -> Tensor:
    """Times [steps] at which the network is called, whole numbers from noisy to clean.

    Named as in Table 2 of arXiv:2305.08891, and numbered as in diffusers. For 1000 training steps:
        linspace: 20 steps are 999, 949, ..., 50. UniPC's, which has one interval more, down to time 0. RIDFR's.
        leading: 50 steps are 981, 961, ..., 1. DDPM's with an offset of 1, as SDXL's files have it. FaceMe's.
    Raises RidfrError for more than `train_steps / 2` steps, which would repeat times or leave the schedule.
    """
    if steps > train_steps // 2:
        raise RidfrError(
            f"{steps} steps are too many for a model trained on {train_steps} noise levels: "
            f"ask for {train_steps // 2} at most."
        )
    count = torch.arange(steps, dtype=torch.float64).flip(0)
    if grid == "linspace":
        times = ((count + 1) * ((train_steps - 1) / steps)).round()
    else:
        times = count * (train_steps // steps) + 1
    return times.long()


def diffuse(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_t of the forward process (DDPM, Eq. 4): sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise.

    sigma: the noise level of time t as k-diffusion counts it, sqrt((1 - abar_t) / abar_t). Shapes broadcast.
    """
    return (latent + sigma * noise) / (1 + sigma**2).sqrt()
