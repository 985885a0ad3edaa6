"""Alignment and detection against insightface's own, which computes with OpenCV, scikit-image and onnxruntime."""

import subprocess
import sys
import time

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from insightface.model_zoo.scrfd import SCRFD
from insightface.utils import face_align
from onnx import helper, numpy_helper
from skimage.transform import SimilarityTransform

from ridfr_core.degradation import DegradationRange, degrade
from ridfr_core.face_model import FaceModelError, load_face_model
from ridfr_core.faces import ARCFACE_TEMPLATE, FFHQ_TEMPLATE, Detector, align, similarity_transform, warp
from ridfr_core.nano import WEIGHTS
from ridfr_core.nano.portraits import SPLITS, render
from ridfr_core.scrfd import letterbox
from tests.onnx_graphs import save
from tests.real_faces import photos, real

NANO = WEIGHTS / "insightface" / "models" / "nano" / "det_nano.onnx"


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


def test_align_of_many_is_align_of_each():
    images, points = photo(200, 248).expand(70, -1, -1, -1), landmarks(70)
    together = align(images, points)
    assert together.shape == (70, 3, 112, 112)
    torch.testing.assert_close(together[66], align(images[66:67], points[66:67])[0])


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


# Against insightface


def insightface(path, threshold=0.5):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = SCRFD(model_file=str(path), session=session)
    model.det_thresh = threshold
    return model


def as_bytes(image):
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1])


def assert_same_faces(detector, yardstick, image, size, margin=0):
    """As many, boxes and landmarks within a twentieth of a pixel; returns how many."""
    padded = F.pad(image, [margin] * 4)
    boxes, points = yardstick.detect(as_bytes(padded), input_size=size)
    found = detector._search(image, margin, size)
    assert len(found) == len(boxes)
    for face, box, landmarks in zip(found, boxes, points):
        np.testing.assert_allclose(face.box + margin, box[:4], atol=0.05)
        np.testing.assert_allclose(face.landmarks + margin, landmarks, atol=0.05)
        assert face.score == pytest.approx(box[4], abs=1e-3)
    return len(found)


def portraits(count):
    return render(torch.arange(count) + SPLITS["test"].start, torch.arange(count) % 5).image


DAMAGE = DegradationRange(sigma=(1, 2), ratio=(2, 4), noise=(5, 10), quality=(40, 80))


def test_nanos_detector_finds_what_insightface_finds(detector):
    noise, yardstick = torch.Generator().manual_seed(0), insightface(NANO)
    whole = portraits(6)
    pictures = [*whole, *degrade(whole, **DAMAGE.draw(6, noise), generator=noise)]
    pictures.append(torch.cat([torch.cat([*whole[:3]], 2), torch.cat([*whole[3:]], 2)], 1))
    pictures.append(F.interpolate(whole[:1], (301, 177), mode="bicubic")[0].clamp(0, 1))
    found = [assert_same_faces(detector, yardstick, picture, size) for picture in pictures
             for size in ((128, 128), (320, 320))]
    assert sum(found) > 20


@pytest.mark.parametrize("margin", [32, 61])
def test_a_margin_is_as_if_the_picture_were_padded(detector, margin):
    yardstick = insightface(NANO)
    found = [assert_same_faces(detector, yardstick, picture, (160, 160), margin) for picture in portraits(4)]
    assert sum(found) >= 3


@pytest.mark.parametrize("name, sizes", [
    ("scrfd_2.5g_bnkps.onnx", ((640, 640), (320, 320), (160, 160))),
    ("scrfd_500m_bnkps.onnx", ((640, 640),)),
])
def test_real_detectors_find_what_insightface_finds(name, sizes):
    detector, yardstick = Detector(real(name)), insightface(real(name))
    pictures = photos()
    for size in sizes:
        found = {key: assert_same_faces(detector, yardstick, picture, size) for key, picture in pictures.items()}
        if size == (640, 640):
            assert found == {"people": 6, "astronaut": 1}
    assert len(detector.detect(pictures["people"])) == 6


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("strides, anchors", [((8, 16, 32), 2), ((8, 16, 32, 64, 128), 1)])
@pytest.mark.parametrize("size", [(256, 256), (384, 128)])
def test_every_layout_is_decoded_as_insightface_decodes_it(tmp_path, strides, anchors, batched, size):
    """Constants for outputs: random boxes at random places, many of which overlap."""
    noise, maps = np.random.default_rng(len(strides)), []
    for width, scale in ((1, 1.0), (4, 6.0), (10, 4.0)):
        for stride in strides:
            shape = (anchors * (size[0] // stride) * (size[1] // stride), width)
            values = noise.uniform(0 if width < 10 else -1, 1, shape) * scale
            values = values ** 3 if width == 1 else values
            maps.append((values[None] if batched else values).astype(np.float32))
    names = [f"o{i}" for i in range(len(maps))]
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
             for name, value in zip(names, maps)]

    def shapes(model):
        for output, value in zip(model.graph.output, maps):
            output.CopyFrom(helper.make_tensor_value_info(output.name, 1, value.shape))

    path = save(tmp_path / "det.onnx", nodes, size=(1, 3, size[1], size[0]), outputs=names, tweak=shapes)
    detector = Detector(path)
    assert detector.fixed == size
    found = [assert_same_faces(detector, insightface(path), torch.rand(3, 211, side), size) for side in (100, 300)]
    assert min(found) > 10


@pytest.mark.parametrize("size", [(720, 1280), (500, 333), (3000, 2000), (33, 400), (77, 100), (640, 640), (16, 4096)])
def test_letterbox_is_opencvs(size):
    """To the bit where a picture is shrunk; where it is enlarged, one of 255 apart in some places."""
    noise = np.random.default_rng(0).integers(0, 256, (*(-(-side // 3) for side in size), 3), dtype=np.uint8)
    picture = cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
    new = (int(320 * size[0] / size[1]), 320) if size[0] <= size[1] else (320, int(320 * size[1] / size[0]))
    theirs = np.zeros((320, 320, 3), np.uint8)
    theirs[:new[0], :new[1]] = cv2.resize(picture, new[::-1])
    ours, scale = letterbox(torch.from_numpy(picture).permute(2, 0, 1) / 255, (320, 320))
    apart = np.abs((ours[0] * 128 + 127.5).round().permute(1, 2, 0).numpy() - theirs)
    assert apart.max() <= (0 if max(size) > 320 else 1) and (apart > 0).mean() < 0.01
    assert scale == new[0] / size[0]


# Odd pictures and files


@pytest.mark.parametrize("size", [(0, 128), (128, 0), (1, 1), (1, 4096), (4096, 1), (32, 8192), (2, 2)])
def test_pictures_of_odd_sizes(detector, size):
    assert detector.detect(torch.rand(3, *size, generator=torch.Generator().manual_seed(0))) == []


def test_a_large_picture_costs_what_a_small_one_does(detector):
    """Of 24 megapixels without a face: what the network takes, and a fraction of the picture's own memory."""
    seconds = {}
    for side in (640, 4900):
        picture = torch.full((3, side, side), 0.5)
        start = time.process_time()
        assert detector.detect(picture) == []
        seconds[side] = time.process_time() - start
    assert seconds[4900] < 1.5 * seconds[640] + 1
    picture, size = torch.full((3, 4900, 4900), 0.5), (640, 640)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        letterbox(picture, size, 2450)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < picture.numel() * 4 / 2


def test_a_search_goes_on_with_margins_at_any_size(detector):
    """A face that fills a large picture is found as in a small one: at the same place."""
    person = torch.tensor([SPLITS["test"].start + 3])
    tight = render(person, torch.zeros(1, dtype=torch.long), size=256)
    x, y = tight.landmarks[0].mean(0).round().long().tolist()
    crop = tight.image[:, :, y - 50:y + 50, x - 50:x + 50]
    small = detector.detect(crop[0])[0]
    large = detector.detect(F.interpolate(crop, scale_factor=20, mode="bilinear")[0])[0]
    distance = (large.landmarks / 20 - small.landmarks).norm(dim=-1)
    assert distance.max() < 0.15 * eye_distance(small.landmarks[None])


def fake_detector(path, scores=2, outputs=9, size=(1, 3, 64, 64)):
    """Nine constants; so many scores for each place of the maps."""
    maps = [np.zeros((scores * (64 // stride) ** 2, width), np.float32)
            for width in (1, 4, 10) for stride in (8, 16, 32)][:outputs]
    names = [f"o{i}" for i in range(outputs)]
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
             for name, value in zip(names, maps)]
    return save(path, nodes, size=size, outputs=names)


def test_a_detector_without_faces(tmp_path):
    detector = Detector(fake_detector(tmp_path / "det.onnx"))
    assert detector.fixed == (64, 64) and detector.detect(torch.rand(3, 500, 300)) == []


@pytest.mark.parametrize("options", [dict(scores=3), dict(outputs=6), dict(size=(1, 3, 64)), dict(outputs=3)])
def test_what_is_no_scrfd(tmp_path, options):
    with pytest.raises(FaceModelError, match="odd.onnx is not an SCRFD detector"):
        Detector(fake_detector(tmp_path / "odd.onnx", **options))


WITHOUT = """
import sys
for name in ("insightface", "onnx", "onnxruntime", "cv2", "skimage", "google.protobuf"):
    sys.modules[name] = None
import torch
from ridfr_core.face_model import face_model_of
from ridfr_core.faces import align
from ridfr_core.nano.portraits import SPLITS, render
from ridfr_core.recognition import embed
image = render(torch.tensor([SPLITS["test"].start]), torch.tensor([0])).image
for name in ("nano", "nano_judge"):
    model = face_model_of(name)
    (face,) = model.detector.detect(image[0])
    assert embed(model.recogniser, align(image, face.landmarks[None])).shape == (1, 512)
"""


def test_nothing_but_torch_is_needed():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
