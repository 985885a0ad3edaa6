import numpy
import pytest
import torch

from ridfr_core.color import adain_transfer, wavelet_transfer


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
