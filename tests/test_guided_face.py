"""Where the face lies that guidance looks at, and how it is found again."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ridfr_core.faces import FFHQ_TEMPLATE, usual_place
from ridfr_core.guided_face import ENOUGH, Sight, guided_face, look_again

REFERENCES = torch.ones(1, 512)


class Detector:
    """Finds a face at each of the points [N,2] of a whole picture of (width, height), whatever part of it it sees."""

    def __init__(self, *points, shape=FFHQ_TEMPLATE * 0.1):
        self.points, self.shape, self.seen = points, shape - shape.mean(0), []

    def detect(self, picture):
        self.seen.append(picture)
        return [SimpleNamespace(landmarks=self.shape + point) for point in self.points]


def enlarge(z):
    return F.interpolate(z[:, :3], scale_factor=8.0, mode="nearest")


def face_at(middle, size, spread=0.1, **how):
    """A face of `spread` times FFHQ's 512 pixels with its landmarks' mean at `middle`, in a latent of `size`."""
    landmarks = (FFHQ_TEMPLATE - FFHQ_TEMPLATE.mean(0)) * spread + torch.tensor(middle)
    return guided_face(Sight(torch.rand(3, size[0] * 8, size[1] * 8), landmarks), REFERENCES, size, **how)


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


def test_the_place_is_the_middle_of_the_face():
    for whole in (True, False):
        place = face_at([200.0, 120.0], (32, 48), whole=whole).place
        torch.testing.assert_close(place * 8, torch.tensor([200.0, 120.0]), rtol=0, atol=8.0)


def test_a_small_face_is_looked_for_in_its_own_neighbourhood_alone():
    """In a large latent: the decoder's work does not grow with the picture. What is found goes back to where it was."""
    size = (120, 160)
    face = face_at([600.0, 500.0], size, spread=0.2)
    top, bottom, left, right = face.box
    detector = Detector()
    assert look_again(enlarge, detector, torch.rand(1, 4, *size), face) is None
    sides = torch.tensor(detector.seen[0].shape[-2:]) / 8
    assert (sides - 3 * torch.tensor([bottom - top, right - left])).abs().max() <= 1

    moved = face_at([620.0, 510.0], size, spread=0.2)
    corner = torch.tensor([left - (right - left), top - (bottom - top)]) * 8
    detector = Detector(torch.tensor([620.0, 510.0]) - corner, shape=FFHQ_TEMPLATE * 0.2)
    same(guided_face(look_again(enlarge, detector, torch.rand(1, 4, *size), face), REFERENCES, size), moved)


def test_a_large_face_is_looked_for_at_half_size():
    size = (2 * ENOUGH, 2 * ENOUGH)
    pixels = 8 * 2 * ENOUGH
    face = guided_face(Sight(torch.rand(3, pixels, pixels), usual_place(pixels, pixels)), REFERENCES, size)
    z0 = torch.rand(1, 4, *size)
    place = usual_place(pixels // 2, pixels // 2)
    sight = look_again(enlarge, Detector(place.mean(0), shape=place), z0, face)
    torch.testing.assert_close(sight.picture, enlarge(F.avg_pool2d(z0, 2))[0])
    same(guided_face(sight, REFERENCES, size), face)


def test_of_several_faces_the_nearest_is_the_one():
    face = face_at([100.0, 130.0], (32, 32), whole=True)
    for points in ([[200.0, 90.0], [95.0, 140.0]], [[95.0, 140.0], [200.0, 90.0]]):
        sight = look_again(enlarge, Detector(*map(torch.tensor, points)), torch.rand(1, 4, 32, 32), face)
        torch.testing.assert_close(sight.landmarks.mean(0), torch.tensor([95.0, 140.0]), rtol=0, atol=1e-3)


def test_a_latent_of_one_pixel():
    face = guided_face(Sight(torch.rand(3, 8, 8), usual_place(8, 8)), REFERENCES, (1, 1))
    assert look_again(enlarge, Detector(), torch.rand(1, 4, 1, 1), face) is None
