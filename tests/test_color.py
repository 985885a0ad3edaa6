import numpy
import pytest
import skimage.data
import torch
import torch.nn.functional as F

from ridfr_core.color import CHROMA, METHODS, adain_transfer, colour, fix_colors, luma, tone_curve, wavelet_transfer
from ridfr_core.degradation import degrade, jpeg
from ridfr_core.nano.portraits import SPLITS, render


def low_pass(image, levels):
    """a-trous low pass of [C,H,W] in float64, one output pixel at a time, with clamped coordinates at the border."""
    kernel = numpy.outer([1, 2, 1], [1, 2, 1]) / 16
    _, height, width = image.shape
    for level in range(levels):
        out = numpy.zeros_like(image)
        for y in range(height):
            for x in range(width):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        yy = min(max(y + dy * 2**level, 0), height - 1)
                        xx = min(max(x + dx * 2**level, 0), width - 1)
                        out[:, y, x] += kernel[dy + 1, dx + 1] * image[:, yy, xx]
        image = out
    return image


@pytest.mark.parametrize("size", [(16, 16), (19, 25), (3, 5)])
@pytest.mark.parametrize("levels", [1, 5])
def test_wavelet_matches_the_definition_in_float64(size, levels):
    torch.manual_seed(0)
    content, style = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    got = wavelet_transfer(content, style, levels)
    for i in range(2):
        c, s = content[i].double().numpy(), style[i].double().numpy()
        want = (c - low_pass(c, levels)) + low_pass(s, levels)
        numpy.testing.assert_allclose(got[i].numpy(), want, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (127, 64)])
def test_wavelet_of_an_image_with_itself_is_that_image(size):
    image = torch.rand(1, 3, *size)
    assert torch.equal(wavelet_transfer(image, image), image)


def test_wavelet_moves_colour_and_keeps_detail():
    content = 0.5 + 0.2 * torch.eye(64).expand(1, 3, -1, -1)
    style = torch.zeros(1, 3, 64, 64) + torch.tensor([0.8, 0.1, 0.3]).view(1, 3, 1, 1)
    got = wavelet_transfer(content, style)
    assert (got.mean((2, 3)) - style.mean((2, 3))).abs().max() < 5e-3
    detail = (got - style) - (content - content.mean())
    assert detail.std() < 0.15 * content.std()


def test_adain_takes_mean_and_deviation_of_each_channel():
    torch.manual_seed(0)
    content, style = torch.rand(2, 3, 20, 30), 0.3 + 0.2 * torch.rand(2, 3, 8, 8)
    got = adain_transfer(content, style).double()
    for statistic in (torch.mean, lambda x, dim: torch.std(x, dim, correction=0)):
        torch.testing.assert_close(statistic(got, dim=(2, 3)), statistic(style.double(), dim=(2, 3)), rtol=1e-5, atol=0)
    assert torch.equal(adain_transfer(content, content), content)


def test_adain_of_a_flat_channel_is_the_mean():
    style = torch.rand(1, 3, 16, 16)
    got = adain_transfer(torch.full((1, 3, 16, 16), 0.3), style)
    torch.testing.assert_close(got, style.mean((2, 3), keepdim=True).expand_as(got))


# Photos of one tone


def people(view=1, count=4):
    return render(torch.tensor(SPLITS["test"][:count]), torch.full((count,), view)).image


TONES = {
    "grey": lambda y: y.expand(-1, 3, -1, -1),
    "cast": lambda y: y * column(1.02, 1, 0.93) + column(0.01, 0, 0.02),
    "sepia": lambda y: y * column(1.351, 1.203, 0.937),  # the usual matrix
    "blue": lambda y: torch.cat([y**1.25, y**1.05, y**0.8], 1),
    "split": lambda y: y + column(0.24, 0.04, -0.24) * (y - 0.4),
}
SPOILT = {
    "clean": lambda x: (x * 255).round() / 255,
    "jpeg 90": lambda x: torch.stack([jpeg(one, 90, "4:2:0") for one in x]),
    "jpeg 30": lambda x: torch.stack([jpeg(one, 30, "4:2:0") for one in x]),
    "noise": lambda x: (x + 10 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1),
    "degraded": lambda x: degrade(x, 2, 4, 5, 80, generator=torch.Generator().manual_seed(3)),
}


def column(*rgb):
    return torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)


def spread(images):
    """max - min of R, G and B [B,H,W], in 1/255 of the clamped image."""
    seen = images.clamp(0, 1) * 255
    return seen.amax(1) - seen.amin(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_grey_original_gives_a_grey_result(method):
    """What is restored is in colour, as nano does it: before, the spread was 10 of 255 in the mean and 36 at places."""
    restored = people()
    lq = degrade(luma(restored).expand(-1, 3, -1, -1), 3, 8, 0, 60)
    assert spread(fix_colors(restored, lq, method, "restored")).mean() > 10
    fixed = fix_colors(restored, lq, method)
    assert spread(fixed).max() < 0.01


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("name", TONES)
@pytest.mark.parametrize("method", METHODS)
def test_a_toned_original_keeps_its_tone(method, name, spoil):
    """The result has the chroma that the tone gives to its luma; that of fine colours (lips, eyes) is gone."""
    restored = people()
    original = SPOILT[spoil](TONES[name](luma(restored)).clamp(0, 1))
    fixed = fix_colors(restored, original, method)
    ramp = TONES[name](torch.linspace(0, 1, 256).view(1, 1, 1, 256)).clamp(0, 1)
    place = torch.searchsorted(luma(ramp).flatten(), luma(fixed).clamp(0, 1)).clamp(max=255)
    wrong = (fixed.clamp(0, 1) - ramp[0, :, 0][:, place[:, 0]].movedim(0, 1)).square().sum(1).sqrt() * 255
    assert wrong.mean() < 4 and wrong.quantile(0.99) < 14
    assert torch.equal(fixed, fix_colors(restored, original, method, "tone")), "not taken for a toned photo"


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("method", METHODS)
def test_a_colour_photo_keeps_the_fine_colours_of_the_restoration(method, spoil):
    restored = people()
    for saturation in (1, 0.7):
        original = SPOILT[spoil](torch.lerp(luma(restored).expand(-1, 3, -1, -1), restored, saturation))
        assert torch.equal(fix_colors(restored, original, method), fix_colors(restored, original, method, "restored"))


PHOTOS = {"astronaut": (150, 20, 300, 170), "coffee": (100, 0, 500, 400), "chelsea": (75, 0, 375, 300)}


@pytest.mark.parametrize("name", PHOTOS)
def test_real_photos(name):
    """Margins on photographs: 5.3 of 255 decides."""
    box = PHOTOS[name]
    photo = torch.from_numpy(getattr(skimage.data, name)()).movedim(-1, 0)[None, :, box[1]:box[3], box[0]:box[2]] / 255

    def colour_of(image):
        return colour(image[0], tone_curve(image[0])) * 255

    for spoil in SPOILT.values():
        assert colour_of(spoil(photo)) > 9
        assert all(colour_of(spoil(tone(luma(photo)).clamp(0, 1))) < 5 for tone in TONES.values())
    framed = F.pad(TONES["sepia"](luma(photo)).clamp(0, 1), (80,) * 4, value=1)  # a print with a white border
    assert colour_of(framed) < 5 < 9 < colour_of(F.pad(photo, (80,) * 4, value=1))


@pytest.mark.parametrize("method", METHODS)
def test_all_chroma_from_the_original(method):
    restored, original = people(), SPOILT["degraded"](people(view=4))
    fixed = fix_colors(restored, original, method, "original")
    torch.testing.assert_close(fixed - luma(fixed), original - luma(original), rtol=0, atol=1e-5)


def test_luma_is_the_methods_whatever_the_chroma():
    restored, original = people(), people(view=4)
    want = luma(wavelet_transfer(restored, original))
    for chroma in CHROMA:
        torch.testing.assert_close(luma(fix_colors(restored, original, "wavelet", chroma)), want, rtol=0, atol=1e-5)


def test_each_image_is_judged_alone():
    restored = people()
    originals = restored.clone()
    originals[::2] = luma(restored[::2]).expand(-1, 3, -1, -1)
    fixed = spread(fix_colors(restored, originals, "wavelet")).mean((1, 2))
    assert (fixed[::2] < 0.01).all() and (fixed[1::2] > 10).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_flat_original(value):
    restored = people()
    for chroma in CHROMA:
        for method in METHODS:
            flat = torch.full_like(restored, value) * column(1, 0.9, 0.8)
            assert torch.isfinite(fix_colors(restored, flat, method, chroma)).all()
    toned = fix_colors(restored, flat, "adain")
    torch.testing.assert_close(toned, flat, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (16, 16), (16, 2)])
def test_many_levels_on_a_tiny_picture(size):
    """Farther out than the border all is padding, so the low pass is the definition's at any size."""
    content, style = torch.rand(1, 3, *size), torch.rand(1, 3, *size)
    got = wavelet_transfer(content, style, 8)[0].numpy()
    want = content[0].double().numpy() + low_pass((style - content)[0].double().numpy(), 8)
    numpy.testing.assert_allclose(got, want, atol=1e-6)
