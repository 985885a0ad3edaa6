"""References: the one face in each photo, or a sentence that says which photo is unusable."""

import pytest
import torch

from ridfr_core.face_model import FaceModel
from ridfr_core.faces import ARCFACE_TEMPLATE, Face
from ridfr_core.identity import IdentityError, reference_faces


def face(size: float, at: float = 0.0) -> Face:
    box = torch.tensor([at, at, at + 0.8 * size, at + size])
    return Face(box, ARCFACE_TEMPLATE * size / 112 + at, 0.9)


class Script:
    """A detector that answers what it was told, one list of faces per image."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def detect(self, image):
        return self.answers.pop(0)


def landmarks(*answers, **options):
    model = FaceModel("script", Script(*answers), torch.nn.Identity(), "0" * 64)
    found = reference_faces(model, torch.zeros(len(answers), 3, 256, 256), **options)
    return torch.stack([face.landmarks for face in found])


def test_one_face_each():
    found = landmarks([face(100)], [face(64, 20)])
    torch.testing.assert_close(found, torch.stack([face(100).landmarks, face(64, 20).landmarks]))


def test_passers_by_are_ignored():
    torch.testing.assert_close(landmarks([face(200), face(60, 150)])[0], face(200).landmarks)


@pytest.mark.parametrize("second, says", [
    ([], "No face was found in reference image 2"),
    ([face(100), face(90, 120)], "2 faces were found in reference image 2"),
    ([face(20)], "reference image 2 is only 20 pixels"),
])
def test_errors_name_the_image(second, says):
    with pytest.raises(IdentityError, match=says):
        landmarks([face(100)], second)


def test_errors_use_the_callers_word():
    with pytest.raises(IdentityError, match="photo of Ann 1"):
        landmarks([], what="photo of Ann")
