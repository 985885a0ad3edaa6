"""Alignment against insightface's own (scikit-image and OpenCV), and detection with the shipped nano detector."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from insightface.utils import face_align
from skimage.transform import SimilarityTransform

from ridfr_core.face_model import load_face_model
from ridfr_core.faces import ARCFACE_TEMPLATE, FFHQ_TEMPLATE, align, similarity_transform, warp
from ridfr_core.nano import WEIGHTS
from ridfr_core.nano.portraits import SPLITS, render


def landmarks(batch: int, seed: int = 0) -> torch.Tensor:
    """Turned, scaled and distorted faces within about 250 x 200 pixels."""
    noise = torch.Generator().manual_seed(seed)
    angle = (torch.rand(batch, generator=noise) - 0.5) * 1.5
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    points = (ARCFACE_TEMPLATE - 56) @ turn * (0.8 + torch.rand(batch, 1, 1, generator=noise))
    return points + torch.tensor([125.0, 100.0]) + 3 * torch.randn(batch, 5, 2, generator=noise)


def photo(height: int, width: int) -> torch.Tensor:
    noise = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("template", [ARCFACE_TEMPLATE, FFHQ_TEMPLATE])
def test_similarity_transform_is_umeyama(template):
    source = landmarks(8)
    found = similarity_transform(source, template)
    for points, matrix in zip(source, found):
        reference = SimilarityTransform()
        reference.estimate(points.numpy(), template.numpy())
        np.testing.assert_allclose(matrix, reference.params[:2], atol=2e-3)


@pytest.mark.parametrize("size", [112, 224])
def test_align_is_norm_crop(size):
    image, points = photo(200, 248), landmarks(4)
    ours = align(image.expand(4, -1, -1, -1), points, size)
    for crop, one in zip(ours, points):
        array = image[0].permute(1, 2, 0).numpy()
        theirs = face_align.norm_crop(array, one.numpy(), image_size=size)
        # OpenCV rounds source positions to 1/32 pixel
        assert np.abs(crop.permute(1, 2, 0).numpy() - theirs).max() < 1e-2


def test_warp_has_opencvs_pixel_convention_and_zero_border():
    image = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(2))
    matrix = torch.tensor([[[1.0, 0, -7], [0, 1, 5]]])
    theirs = cv2.warpAffine(image[0].permute(1, 2, 0).numpy(), matrix[0].numpy(), (64, 64))
    np.testing.assert_allclose(warp(image, matrix, 64)[0].permute(1, 2, 0), theirs, atol=1e-5)


def test_align_is_differentiable():
    image, points = photo(200, 248).requires_grad_(), landmarks(1).requires_grad_()
    align(image, points).square().mean().backward()
    assert image.grad.abs().sum() > 0
    assert points.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def detector():
    return load_face_model(WEIGHTS / "insightface" / "models" / "nano").detector


def eye_distance(points):
    return (points[:, 1] - points[:, 0]).norm(dim=-1, keepdim=True)


def landmark_error(detector) -> float:
    """Mean distance from the truth over the distance of the eyes, on held-out portraits with one face found in each."""
    people = torch.arange(12) + SPLITS["test"].start
    portraits = render(people, torch.zeros(12, dtype=torch.long))
    faces = [detector.detect(image) for image in portraits.image]
    assert [len(found) for found in faces] == [1] * 12
    found = torch.stack([one[0].landmarks for one in faces])
    return ((found - portraits.landmarks).norm(dim=-1) / eye_distance(portraits.landmarks)).mean().item()


def test_detector_finds_landmarks_of_portraits(detector):
    assert landmark_error(detector) < 0.06


def test_detector_finds_landmarks_as_well_as_it_should(detector):
    assert landmark_error(detector) <= 0.04


def test_detector_orders_by_size_and_maps_back_to_the_image(detector):
    people = torch.arange(2) + SPLITS["test"].start + 50
    portraits = render(people, torch.zeros(2, dtype=torch.long))
    small, large = portraits.image[:1], F.interpolate(portraits.image[1:], scale_factor=2, mode="bilinear")
    image = torch.zeros(3, 256, 384)
    image[:, 64:192, :128], image[:, :, 128:] = small[0], large[0]
    first, second = detector.detect(image)
    assert first.area > second.area
    truth = portraits.landmarks[0] + torch.tensor([0.0, 64.0])
    assert (second.landmarks - truth).norm(dim=-1).mean() < 0.15 * eye_distance(truth[None])


def test_detector_finds_a_face_that_fills_the_frame(detector):
    person = torch.tensor([SPLITS["test"].start + 3])
    tight = render(person, torch.zeros(1, dtype=torch.long), size=256)
    x, y = tight.landmarks[0].mean(0).round().long().tolist()
    crop = tight.image[0, :, y - 64:y + 64, x - 64:x + 64]
    truth = tight.landmarks[0] - torch.tensor([x - 64, y - 64])
    faces = detector.detect(crop)
    assert len(faces) == 1
    assert (faces[0].landmarks - truth).norm(dim=-1).mean() < 0.15 * eye_distance(truth[None])


def test_detector_finds_nothing_where_nothing_is(detector):
    assert detector.detect(torch.full((3, 128, 128), 0.5)) == []
