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


def wrong(node, **inputs):
    """The sentence with which a node refuses its inputs."""
    with pytest.raises(ValueError) as failure:
        node.execute(**inputs)
    said = str(failure.value)
    assert type(failure.value).__name__ == "RidfrError" and said[0].isupper() and said.endswith("."), said
    return said


def grey(photos):
    return photos[..., 1:2].expand(-1, -1, -1, 3)


SEPIA = torch.tensor([1.2, 1.0, 0.7])


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_black_and_white_stays_so(nodes, method):
    """The spread of R, G and B is 10 of 255 in the mean before, and 0 now, without any setting."""
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    fixed = nodes["RIDFR_ColorFix"].execute(photos, grey(photos), method, 5)[0]
    assert (fixed.amax(-1) - fixed.amin(-1)).max() * 255 < 0.1
    assert fixed.std() > 0.05
    sepia = nodes["RIDFR_ColorFix"].execute(photos, grey(photos) * SEPIA.clamp(max=1), method, 5)[0]
    shown = sepia[sepia.amax(-1) < 0.99]
    off = (shown[:, 2] - 0.7 * shown[:, 1]).abs()
    assert off.mean() < 0.01 and off.quantile(0.99) < 0.03


def test_chroma_is_a_choice(nodes):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    colours = nodes["RIDFR_NanoPortraits"].execute(2, 2, 5)[0]

    def fixed(chroma, color_from):
        return nodes["RIDFR_ColorFix"].execute(photos, color_from, "wavelet", 5, chroma=chroma)[0]

    assert torch.equal(fixed("auto", colours), fixed("restored", colours))
    assert torch.equal(fixed("auto", grey(colours)), fixed("tone", grey(colours)))
    assert (fixed("restored", grey(colours)).amax(-1) - fixed("restored", grey(colours)).amin(-1)).mean() * 255 > 5
    assert (fixed("original", colours) - fixed("restored", colours)).abs().mean() > 0.01


@pytest.mark.parametrize("size", [(128, 96), (64, 128), (200, 1), (64, 48)])
def test_another_shape_is_not_stretched(nodes, size):
    other = torch.rand(1, *size, 3)
    said = wrong(nodes["RIDFR_ColorFix"], image=torch.rand(2, 128, 128, 3), color_from=other, method="adain", levels=5)
    assert f"{size[1]}x{size[0]} pixels" in said and "128x128" in said and "crop" in said


@pytest.mark.parametrize("size, rounded", [((100, 130), (392, 512)), ((90, 67), (688, 512)), ((71, 64), (64, 64))])
def test_sizes_rounded_to_multiples_of_8_are_one_shape(nodes, size, rounded):
    image = torch.rand(1, *rounded, 3)
    fixed = nodes["RIDFR_ColorFix"].execute(image, torch.rand(1, *size, 3), "adain", 5)[0]
    assert fixed.shape == image.shape


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (16, 16), (2, 400)])
@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_color_fix_of_tiny_and_long_pictures(nodes, method, size):
    image = torch.rand(1, *size, 3)
    fixed = nodes["RIDFR_ColorFix"].execute(image, image.flip(1), method, 8)[0]
    assert fixed.shape == image.shape and torch.isfinite(fixed).all()


BOUNDS = {f"{name}_{end}": value for name, value in (("blur", 2.0), ("scale", 4.0), ("noise", 5.0), ("quality", 60.0))
          for end in ("min", "max")}


@pytest.mark.parametrize("name, label", [("blur", "blur"), ("scale", "downscale"), ("noise", "noise"),
                                         ("quality", "JPEG quality")])
def test_least_above_most(nodes, name, label):
    changed = BOUNDS | {f"{name}_min": BOUNDS[f"{name}_max"] + 1}
    said = wrong(nodes["RIDFR_DegradeFace"], image=torch.rand(1, 64, 64, 3), seed=1, **changed)
    assert f"{label}, least is" in said and f"{label}, most" in said


def test_degrading_small_and_long_pictures(nodes):
    degrade = nodes["RIDFR_DegradeFace"].execute
    hard = BOUNDS | {"scale_min": 64.0, "scale_max": 64.0, "blur_min": 20.0, "blur_max": 20.0}
    for size in [(32, 32), (32, 6400)]:
        degraded = degrade(torch.rand(1, *size, 3), 1, **hard)[0]
        assert degraded.shape[1:3] == size and torch.isfinite(degraded).all()
    said = wrong(nodes["RIDFR_DegradeFace"], image=torch.rand(1, 1, 40, 3), seed=1, **BOUNDS)
    assert "40x1 pixels, too small to degrade" in said


def test_one_picture_for_all_is_resized_once(nodes, pack, monkeypatch):
    module, batches = pack.nodes.images, []
    fit = module.fit_to
    monkeypatch.setattr(module, "fit_to", lambda images, *args: batches.append(len(images)) or fit(images, *args))
    restored, degraded = torch.rand(3, 64, 64, 3), torch.rand(1, 32, 32, 3)
    together = nodes["RIDFR_ColorFix"].execute(restored, degraded, "wavelet", 5)[0]
    assert batches == [1]
    for one, alone in zip(together, restored):
        torch.testing.assert_close(one[None], nodes["RIDFR_ColorFix"].execute(alone[None], degraded, "wavelet", 5)[0])
