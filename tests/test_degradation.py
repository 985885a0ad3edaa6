import io

import cv2
import numpy
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ridfr_core.degradation import DegradationRange, degrade


def photo(size=(96, 80), seed=0):
    """Smooth coloured blobs with some texture, [1,3,H,W]."""
    torch.manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 5), size=size, mode="bicubic").clamp(0, 1)
    return (0.9 * coarse + 0.1 * torch.rand(1, 3, *size)).clamp(0, 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def to_numpy(image):
    return image[0].permute(1, 2, 0).numpy()


def test_whole_chain_matches_scipy_opencv_and_pillow():
    image, sigma, ratio, quality = photo(), 1.7, 3.2, 60
    blurred = gaussian_filter(to_numpy(image).astype(numpy.float64), (sigma, sigma, 0), mode="nearest", truncate=4.2)
    small = cv2.resize(blurred, (25, 30), interpolation=cv2.INTER_LINEAR)
    file = io.BytesIO()
    pixels = numpy.rint(small.clip(0, 1) * 255).astype(numpy.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    decoded = cv2.imdecode(numpy.frombuffer(file.getvalue(), numpy.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    want = cv2.resize(decoded.astype(numpy.float64) / 255, (80, 96), interpolation=cv2.INTER_LINEAR)
    got = to_numpy(degrade(image, sigma, ratio, 0, quality))
    assert numpy.abs(got - want).max() < 1 / 255


def test_nothing_to_do_leaves_the_image_but_for_jpeg_rounding():
    image = photo()
    got = degrade(image, 0, 1, 0, 100)
    assert got.shape == image.shape
    assert (got - image).abs().mean() < 1 / 255


def test_noise_is_in_grey_levels_of_255():
    image = torch.full((1, 3, 256, 256), 0.5)
    got = degrade(image, 0, 1, 12.0, 100, seeded(0))
    assert (got - image).std().item() * 255 == pytest.approx(12, rel=0.05)


def test_each_parameter_makes_it_worse():
    image = photo((128, 128))

    def loss(**change):
        mild = {"sigma": 0.5, "ratio": 2.0, "noise": 2.0, "quality": 95} | change
        return (degrade(image, **mild, generator=seeded(0)) - image).square().mean()

    changes = {"sigma": 4, "ratio": 8, "noise": 20, "quality": 5}
    assert all(loss(**{name: value}) > 1.05 * loss() for name, value in changes.items())


def test_same_seed_same_images():
    image, parameters = photo().expand(2, -1, -1, -1), (1.0, 2.0, 10.0, 50)
    assert torch.equal(degrade(image, *parameters, seeded(3)), degrade(image, *parameters, seeded(3)))
    assert not torch.equal(degrade(image, *parameters, seeded(3)), degrade(image, *parameters, seeded(4)))
    first, second = degrade(image, *parameters, seeded(3))
    assert not torch.equal(first, second)


def test_an_image_does_not_depend_on_its_batch():
    images = torch.cat([photo(seed=s) for s in range(3)])
    parameters = DegradationRange().draw(3, seeded(5))
    whole = degrade(images, **parameters, generator=seeded(7))
    part = degrade(images[:2], **{name: p[:2] for name, p in parameters.items()}, generator=seeded(7))
    assert torch.equal(whole[:2], part)


def test_colour_survives_at_the_size_of_a_latent():
    """A red and a blue half, down to 8x8 at quality 30: chroma subsampling mixes them, the default doesn't."""
    image = torch.zeros(1, 3, 128, 128)
    image[:, 0, :, :56] = 0.8
    image[:, 2, :, 56:] = 0.8
    kept, mixed = (degrade(image, 0, 16, 0, 30, subsampling=s)[0, :, 64, 50] for s in ("4:4:4", "4:2:0"))
    assert kept[0] - kept[2] > mixed[0] - mixed[2] + 0.1


def test_ranges_are_drawn_uniformly_and_reproducibly():
    ranges = DegradationRange(sigma=(1, 3), ratio=(4, 4), noise=(0, 15), quality=(30, 70))
    drawn = ranges.draw(2000, seeded(0))
    for name, values in drawn.items():
        low, high = getattr(ranges, name)
        assert values.shape == (2000,) and values.min() >= low and values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, rel=0.05)
    few = ranges.draw(5, seeded(0))
    assert all(torch.equal(few[name], drawn[name][:5]) for name in few)


def test_input_is_left_alone():
    image = photo()
    before = image.clone()
    degrade(image, 1, 2, 5, 50)
    assert torch.equal(image, before)


def test_too_small_an_image():
    with pytest.raises(ValueError, match=r"16x40 pixels, too small to degrade: use one of at least 32x32\."):
        degrade(torch.rand(1, 3, 40, 16), 1, 2, 5, 50)


def test_nan_names_the_image():
    images = torch.rand(3, 3, 40, 40)
    images[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="Image 2 has NaN"):
        degrade(images, 1, 2, 5, 50)
