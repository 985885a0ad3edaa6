"""The nodes from IMAGE to IMAGE, and what they make of grey and transparent pictures."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_degrade_face(nodes):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    knobs = {"blur": (1, 3), "scale": (2, 8), "noise": (0, 10), "quality": (50, 90)}
    bounds = {f"{name}_{end}": v for name, pair in knobs.items() for end, v in zip(("min", "max"), pair, strict=True)}
    first, again, other = (nodes["RIDFR_DegradeFace"].execute(photos, seed=s, **bounds)[0] for s in (1, 1, 2**64 - 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == photos.shape and first.min() >= 0 and first.max() <= 1
    assert 0.01 < (first - photos).square().mean().sqrt() < 0.3


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_color_fix(nodes, method):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    fix = nodes["RIDFR_ColorFix"].execute
    torch.testing.assert_close(fix(photos, photos, method, 5)[0], photos, rtol=0, atol=1e-5)
    small = F.interpolate(photos.movedim(-1, 1), size=(32, 32), mode="area").movedim(1, -1)
    fixed = fix(photos * 0.7, small[:1], method, 5)[0]
    assert fixed.shape == photos.shape
    assert fixed[0].mean().item() == pytest.approx(photos[0].mean().item(), abs=0.02)


def test_nano_portraits_of_the_test_split(nodes, pack):
    people = pack.ridfr_core.nano.portraits.SPLITS["test"]
    a, b = (nodes["RIDFR_NanoPortraits"].execute(first, 2, 3)[0] for first in (0, 1))
    assert a.shape == (2, 128, 128, 3) and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    with pytest.raises(ValueError, match=f"There are {len(people)} people"):
        nodes["RIDFR_NanoPortraits"].execute(len(people) - 1, 2, 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba(nodes, channels):
    """Grey counts as RGB with equal channels, an alpha channel is left out."""
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 1, 5)[0]
    rgb = photos if channels == 4 else photos.mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    odd = torch.cat([rgb, torch.rand(1, 128, 128, 1)], -1) if channels == 4 else rgb[..., :1]
    fixed = [nodes["RIDFR_ColorFix"].execute(image, photos, "wavelet", 5)[0] for image in (rgb, odd)]
    assert torch.equal(*fixed)
