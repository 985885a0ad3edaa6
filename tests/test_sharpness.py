"""The estimate of degradation: it follows how a face was degraded, in the order that a person would give."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ridfr_core.degradation import degrade
from ridfr_core.nano.portraits import SPLITS, render
from ridfr_core.sharpness import estimate_degradation

# blur, downscale, noise, JPEG quality; from hardly anything to nothing left
LEVELS = [(0.5, 1.5, 2, 95), (1, 2, 4, 90), (2, 4, 6, 80), (3, 6, 8, 70), (4, 8, 10, 60), (6, 12, 15, 40)]


@pytest.fixture(scope="module")
def faces():
    return render(torch.tensor(SPLITS["test"][:4]), torch.full((4,), 2)).image


def estimates(faces, levels):
    """[levels, people]"""
    degraded = [degrade(faces, *level, generator=torch.Generator().manual_seed(3)) for level in levels]
    return torch.stack([estimate_degradation(faces), *map(estimate_degradation, degraded)])


def test_worse_is_never_less_and_both_ends_are_reached(faces):
    found = estimates(faces, LEVELS)
    assert (found.diff(dim=0) >= -0.1).all()  # single faces waver where hardly anything is left
    assert (found.mean(1).diff() >= 0).all()
    assert found[0].max() == 0 and found[1].max() < 0.2 and found[-1].min() > 0.9
    assert (found[3:6] > 0.4).all() and (found[2] < 0.6).all()


@pytest.mark.parametrize(
    "knob",
    [
        [(sigma, 1, 0, 100) for sigma in (0.5, 1, 2, 3)],
        [(0, ratio, 0, 100) for ratio in (2, 4, 8, 16)],
        [(0, 1, noise, 100) for noise in (5, 10, 20, 40)],
    ],
    ids=["blur", "downscale", "noise"],
)
def test_each_knob_counts(faces, knob):
    found = estimates(faces, knob).mean(1)
    assert (found.diff() >= 0).all() and found[-1] > 0.9


def test_size_and_brightness_do_not_matter(faces):
    blurred = degrade(faces, 2.0, 2.0, 0, 100)
    big = torch.nn.functional.interpolate(blurred, scale_factor=3, mode="bilinear", antialias=True)
    torch.testing.assert_close(estimate_degradation(big), estimate_degradation(blurred), rtol=0, atol=0.1)
    torch.testing.assert_close(estimate_degradation(blurred * 0.5), estimate_degradation(blurred), rtol=0, atol=1e-3)


def test_each_image_is_judged_alone(faces):
    together = estimate_degradation(faces)
    torch.testing.assert_close(together, torch.cat([estimate_degradation(face[None]) for face in faces]))


def test_memory_does_not_grow_with_the_batch():
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    images = torch.rand(4, 3, 256, 256)
    with Sizes():
        estimate_degradation(images)
    assert max(made) <= images[0].numel()


def test_a_plain_area_is_a_ruin():
    assert estimate_degradation(torch.full((1, 3, 64, 64), 0.5)).item() == 1


@pytest.mark.parametrize("exposure", [0.3, 0.1, 0.05, 0.02])
def test_a_dark_ruin_is_a_ruin(faces, exposure):
    """Of 8 bits, too, whose rounding looks like detail: 0.0 to 0.5 came out at a tenth of the light and less."""
    for level in [(3, 6, 0, 70), (4, 8, 10, 60), (6, 12, 15, 40), (4, 1, 0, 100)]:
        ruin = degrade(faces, *level, generator=torch.Generator().manual_seed(3))
        bright, dark = estimate_degradation(ruin), estimate_degradation((ruin * exposure * 255).round() / 255)
        assert (dark - bright).abs().mean() < 0.2 and dark.min() > 0.75


@pytest.mark.parametrize("exposure", [0.3, 0.1, 0.05])
def test_a_dark_sharp_face_is_sharp(faces, exposure):
    assert estimate_degradation((faces * exposure * 255).round() / 255).max() < 0.1


@pytest.mark.parametrize("exposure", [0.1, 1e-3, 1e-6, 1e-12])
def test_exposure_alone_changes_nothing(faces, exposure):
    for level in LEVELS:
        lq = degrade(faces, *level, generator=torch.Generator().manual_seed(3)) * 0.99  # off the steps of 8 bits
        torch.testing.assert_close(estimate_degradation(lq * exposure), estimate_degradation(lq), rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1 / 255, 0.5, 1.0, 1e-30])
def test_without_contrast_it_is_a_ruin(value):
    assert estimate_degradation(torch.full((2, 3, 100, 80), value)).tolist() == [1, 1]
