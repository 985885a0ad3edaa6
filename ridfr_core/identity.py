"""Identities: what is known of the people to be restored, from their reference photos."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .face_model import FaceModel
from .faces import Face

SMALLEST_FACE = 32  # px of box height: below it ArcFace's 112 px crop is mostly interpolation
BYSTANDER = 0.25  # a second face is taken for a passer-by if its area is below this share of the largest


class IdentityError(ValueError):
    """A reference photo cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Person:
    """One person's N reference photos.

    embeddings: [N,512], unit length. clip: [N,T,D], penultimate CLIP hidden states of the aligned 224 px crops, or None
    where no CLIP was given. weights: [N], how much each photo counts.
    """

    embeddings: Tensor
    clip: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Identity:
    """The people of a batch, one per image.

    clip_uncond: [T,D], CLIP hidden states of the zero image, or None. digest: FaceModel.digest of the embeddings.
    thumbnails: [sum of N,3,112,112], the aligned crops in [0,1], person by person.
    """

    people: tuple[Person, ...]
    clip_uncond: Tensor | None
    digest: str
    thumbnails: Tensor


def reference_faces(face_model: FaceModel, images: Tensor, what: str = "reference image") -> Tensor:
    """Landmarks [B,5,2] of the one face in each image [B,3,H,W], RGB in [0,1].

    Faces much smaller than the largest (passers-by) are ignored.
    Raises IdentityError for no face, several faces or one too small; it names the image by `what` and its index from 1.
    """
    return torch.stack([_one_face(face_model.detector.detect(image), f"{what} {index}")
                        for index, image in enumerate(images, 1)])


def _one_face(faces: list[Face], what: str) -> Tensor:
    if not faces:
        raise IdentityError(f"No face was found in {what}: use a sharper photo of the face, upright and unobstructed.")
    largest = faces[0]
    people = sum(face.area >= BYSTANDER * largest.area for face in faces)
    if people > 1:
        raise IdentityError(f"{people} faces were found in {what}: crop it to the one person.")
    height = float(largest.box[3] - largest.box[1])
    if height < SMALLEST_FACE:
        raise IdentityError(f"The face in {what} is only {height:.0f} pixels high: use a photo where it has at least "
                            f"{SMALLEST_FACE}.")
    return largest.landmarks
