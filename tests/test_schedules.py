import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler

from ridfr_core.schedules import diffuse, timesteps

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULERS = {
    "linspace": UniPCMultistepScheduler(**BETAS, timestep_spacing="linspace"),
    "leading": DDPMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
}


@pytest.mark.parametrize("steps", [2, 7, 16, 20, 30, 50, 499])
@pytest.mark.parametrize("grid", SCHEDULERS)
def test_times_are_diffusers(grid, steps):
    SCHEDULERS[grid].set_timesteps(steps)
    assert timesteps(grid, steps).tolist() == SCHEDULERS[grid].timesteps.tolist()


def test_times_of_the_papers():
    assert timesteps("linspace", 20)[[0, 1, 9, 10, 11, 19]].tolist() == [999, 949, 549, 500, 450, 50]
    assert timesteps("leading", 50)[[0, 1, 49]].tolist() == [981, 961, 1]


@pytest.mark.parametrize("grid", SCHEDULERS)
def test_times_never_repeat_nor_leave_the_schedule(grid):
    for train_steps, steps in [(1000, 500), (50, 25), (50, 7)]:
        times = timesteps(grid, steps, train_steps).tolist()
        assert len(times) == steps and times == sorted(set(times), reverse=True)
        assert times[-1] >= 0 and times[0] < train_steps
    with pytest.raises(ValueError, match="26 steps are too many for a model trained on 50 noise levels: ask for 25 at"):
        timesteps(grid, 26, 50)


def test_diffuse_is_the_forward_process():
    scheduler = SCHEDULERS["leading"]
    latent, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sigma = ((1 - scheduler.alphas_cumprod[999]) / scheduler.alphas_cumprod[999]) ** 0.5
    want = scheduler.add_noise(latent, noise, torch.tensor([999, 999]))
    torch.testing.assert_close(diffuse(latent, noise, sigma), want)
