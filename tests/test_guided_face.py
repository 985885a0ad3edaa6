"""Where the face lies that guidance looks at, and how it is found again."""

import pytest
import torch
import torch.nn.functional as F

from ridfr_core.faces import FFHQ_TEMPLATE, Face, usual_place
from ridfr_core.guided_face import ENOUGH, Sight, guided_face, look_again, searched

REFERENCES = torch.ones(1, 512)


class Detector:
    """Sees a face of `spread` times FFHQ's 512 pixels with its landmarks' mean at each point, the largest first."""

    def __init__(self, *faces):
        self.faces, self.seen = faces, []

    def detect(self, picture):
        self.seen.append(picture)
        return [Face(box_of(points), points, 1.0) for points in (landmarks_at(*face) for face in self.faces)]


def landmarks_at(middle, spread):
    return (FFHQ_TEMPLATE - FFHQ_TEMPLATE.mean(0)) * spread + torch.tensor(middle)


def box_of(landmarks):
    """As detectors draw it: twice the landmarks' extent."""
    low, high = landmarks.amin(0), landmarks.amax(0)
    return torch.cat([low - (high - low) / 2, high + (high - low) / 2])


def enlarge(z):
    return F.interpolate(z[:, :3], scale_factor=8.0, mode="nearest")


def face_at(middle, spread, size, **how):
    sight = Sight(torch.rand(3, size[0] * 8, size[1] * 8), landmarks_at(middle, spread))
    return guided_face(sight, REFERENCES, size, **how)


def same(a, b):
    assert a.box == b.box
    torch.testing.assert_close(a.grid, b.grid, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [(4, 24, 10, 40), (0, 32, 0, 48)])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_sight_of_a_part_at_any_size_is_a_sight_of_the_whole(window, factor):
    size, landmarks = (32, 48), FFHQ_TEMPLATE * 0.2 + torch.tensor([130.0, 40.0])
    top, bottom, left, right = window
    picture = torch.rand(3, (bottom - top) * 8 // factor, (right - left) * 8 // factor)
    local = (landmarks + 0.5 - torch.tensor([left, top]) * 8) / factor - 0.5
    part = guided_face(Sight(picture, local, window), REFERENCES, size)
    same(part, guided_face(Sight(torch.rand(3, 256, 384), landmarks), REFERENCES, size))


def test_the_place_is_the_middle_of_the_landmarks():
    for whole in (True, False):
        place = face_at([200.0, 120.0], 0.2, (32, 48), whole=whole).place
        torch.testing.assert_close(place * 8, torch.tensor([200.0, 120.0]), rtol=0, atol=1.0)


@pytest.mark.parametrize("size, box, window, shrink", [
    ((64, 64), (38, 45, 15, 23), (0, 64, 0, 64), 1),  # 512 pixels: always all of it
    ((128, 128), (32, 96, 32, 96), (0, 128, 0, 128), 2),
    ((120, 160), (60, 71, 70, 82), (33, 97, 44, 108), 1),
    ((120, 161), (40, 66, 0, 26), (14, 92, 0, 78), 2),
    ((97, 65), (20, 70, 10, 50), (0, 96, 0, 64), 2),  # even, for the averaging
    ((1, 1), (0, 1, 0, 1), (0, 1, 0, 1), 1),
])
def test_the_window_that_is_searched(size, box, window, shrink):
    assert searched(box, size) == (window, shrink)


def test_a_face_that_is_found_in_a_part_of_a_large_picture():
    size = (120, 160)
    face = face_at([600.0, 500.0], 0.2, size)
    (top, bottom, left, right), _ = searched(face.box, size)
    detector = Detector(([620.0 - left * 8, 510.0 - top * 8], 0.2))
    sight = look_again(enlarge, detector, torch.rand(1, 4, *size), face)
    assert detector.seen[0].shape[-2:] == ((bottom - top) * 8, (right - left) * 8)
    same(guided_face(sight, REFERENCES, size), face_at([620.0, 510.0], 0.2, size))


def test_a_large_face_is_looked_for_at_half_size():
    size, pixels = (2 * ENOUGH, 2 * ENOUGH), 8 * 2 * ENOUGH
    face = guided_face(Sight(torch.rand(3, pixels, pixels), usual_place(pixels, pixels)), REFERENCES, size)
    z0, half = torch.rand(1, 4, *size), usual_place(pixels // 2, pixels // 2)
    sight = look_again(enlarge, Detector((half.mean(0).tolist(), pixels / 2 / 512)), z0, face)
    torch.testing.assert_close(sight.picture, enlarge(F.avg_pool2d(z0, 2))[0])
    same(guided_face(sight, REFERENCES, size), face)


def seen(face, *faces):
    """The middle of the landmarks that are taken, of a 512 pixel picture's faces."""
    sight = look_again(enlarge, Detector(*faces), torch.rand(1, 4, 64, 64), face)
    return sight and sight.landmarks.mean(0).round().tolist()


def test_which_of_several_faces_is_taken():
    face = face_at([256.0, 307.0], 1.0, (64, 64))
    assert seen(face, ([256.0, 307.0], 1.0), ([256.0, 250.0], 0.1)) == [256, 307], "a spot between the eyes is none"
    small = face_at([100.0, 300.0], 0.3, (64, 64))
    assert seen(small, ([300.0, 280.0], 0.5), ([104.0, 298.0], 0.3)) == [104, 298], "a larger neighbour is another's"
    assert seen(small, ([300.0, 280.0], 0.5)) is None, "unseen for once, it stays where it was"
    false = face_at([150.0, 330.0], 0.08, (64, 64))
    guessed = guided_face(Sight(torch.rand(3, 512, 512), usual_place(512, 512), guessed=True), REFERENCES, (64, 64))
    assert seen(guessed, ([60.0, 60.0], 0.2)) == [60, 60], "no face was seen at first"
    assert seen(false, ([256.0, 307.0], 1.0), ([150.0, 330.0], 0.08)) == [256, 307], "the first place was wrong"


def test_a_latent_of_one_pixel():
    face = guided_face(Sight(torch.rand(3, 8, 8), usual_place(8, 8)), REFERENCES, (1, 1))
    assert look_again(enlarge, Detector(), torch.rand(1, 4, 1, 1), face) is None
