"""Identities: what is known of the people to be restored, from their reference photos."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RidfrError
from .face_model import FaceModel
from .faces import Face

SMALLEST_FACE = 32  # px of box height: below it ArcFace's 112 px crop is mostly interpolation
BYSTANDER = 0.25  # a second face is taken for a passer-by if its area is below this share of the largest


class IdentityError(RidfrError):
    """Reference photos or an identity cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Quality:
    """What was measured of a reference photo.

    height: of the detected face's box, in pixels. score: the detector's certainty in [0,1]. norm: length of the raw
    ArcFace embedding, which falls with the photo's quality (Kim et al., "AdaFace", CVPR 2022); its scale is the
    recogniser's own, so only photos seen by the same one compare. sharpness: 1 - sharpness.estimate_degradation.
    """

    height: float
    score: float
    norm: float
    sharpness: float


@dataclass(frozen=True)
class Person:
    """One person's N reference photos.

    embeddings: [N,D], unit length; 512 wide where an identity adapter shall read them. clip: [N,T,D], penultimate CLIP
    hidden states of the aligned 224 px crops, or None where no CLIP was given. weights: [N], at least 0, how much each
    photo counts beside the person's others; one of them is above 0. quality: N entries, or none where it is unknown.
    """

    embeddings: Tensor
    clip: Tensor | None
    weights: Tensor
    quality: tuple[Quality, ...] = ()


@dataclass(frozen=True)
class Identity:
    """The people of a batch, one per image.

    clip_uncond: [T,D], CLIP hidden states of the zero image, or None. digest: FaceModel.digest of the embeddings.
    thumbnails: [sum of N,3,112,112], the aligned crops in [0,1], person by person. recogniser: FaceModel.name.
    """

    people: tuple[Person, ...]
    clip_uncond: Tensor | None
    digest: str
    thumbnails: Tensor
    recogniser: str = ""

    def crops(self) -> tuple[Tensor, ...]:
        """Each person's thumbnails [N,3,112,112]."""
        return self.thumbnails.split([len(person.embeddings) for person in self.people])


def reference_faces(face_model: FaceModel, images: Iterable[Tensor], what: str = "reference image") -> list[Face]:
    """The one face in each image [3,H,W], RGB in [0,1].

    Faces much smaller than the largest (passers-by) are ignored.
    Raises IdentityError for no face, several faces or one too small; it names the image by `what` and its index from 1.
    """
    return [
        _one_face(face_model.detector.detect(image), f"{what} {index}", face_model)
        for index, image in enumerate(images, start=1)
    ]


def _one_face(faces: list[Face], what: str, face_model: FaceModel) -> Face:
    if not faces:
        hint = f" ({face_model.name} finds only drawn faces)" if face_model.drawn else ""
        raise IdentityError(
            f"No face was found in {what}{hint}: use a sharper photo of the face, upright and unobstructed."
        )
    largest = faces[0]
    people = sum(face.area >= BYSTANDER * largest.area for face in faces)
    if people > 1:
        raise IdentityError(f"{people} faces were found in {what}: crop it to the one person.")
    if largest.height < SMALLEST_FACE:
        raise IdentityError(
            f"The face in {what} is only {largest.height:.0f} pixels high: use a photo where it has at least "
            f"{SMALLEST_FACE}."
        )
    return largest


def parse_weights(text: str, photos: int) -> Tensor:
    """[photos] from numbers separated by commas, spaces or lines; 1 for each where the text is empty.

    Raises IdentityError for anything but `photos` numbers of at least 0.
    """
    said = repr(text if len(text) < 60 else f"{text[:57]}...")
    words = [word for word in re.split(r"[,;\s]+", text) if word]
    try:
        weights = torch.tensor([float(word) for word in words] or [1.0] * photos)
    except ValueError:
        raise IdentityError(f"The weights {said} are not numbers: write one for each photo: 1, 0.5.") from None
    if len(weights) != photos:
        raise IdentityError(f"Weights: {len(weights)}, photos: {photos}. Write one for each, or none.")
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise IdentityError(f"The weights {said} must be at least 0, and finite.")
    return weights


def check_weights(weights: Tensor, whose: str) -> None:
    """Raises IdentityError where no photo of a person counts."""
    if not (weights > 0).any():
        raise IdentityError(f"All photos of {whose} have weight 0: give one of them more.")


def check_recogniser(identity: Identity, name: str, digest: str, what: str = "The identity") -> None:
    """Raises IdentityError where the identity was made with another recogniser than the one of this name and digest."""
    if identity.digest != digest:
        raise IdentityError(
            f"{what} was made with the face model {_made_with(identity)} and this is {name} ({digest[:8]}), "
            "whose embeddings mean something else: use the same face model for both."
        )


def _made_with(identity: Identity) -> str:
    return f"{identity.recogniser or 'unknown'} ({identity.digest[:8]})"


def one_photo_each(identity: Identity) -> Identity:
    """Every photo of an identity as a person of its own; weights, which compare a person's photos, become 1."""
    people = tuple(_only(person, photo) for person in identity.people for photo in range(len(person.embeddings)))
    return replace(identity, people=people)


def _only(person: Person, photo: int) -> Person:
    """A person with one of the photos, which then counts fully."""
    return Person(
        person.embeddings[[photo]],
        None if person.clip is None else person.clip[[photo]],
        torch.ones(1),
        person.quality[photo : photo + 1],
    )


def each_alone(identity: Identity) -> list[Identity]:
    """The people of an identity, each as an identity of one."""
    return [
        replace(identity, people=(person,), thumbnails=crops)
        for person, crops in zip(identity.people, identity.crops())
    ]


def join_people(identities: Sequence[Identity], numbers: Sequence[int] = (1, 2, 3, 4)) -> Identity:
    """One identity with the people of all, in their order. Arguments and errors as of `join_photos`."""
    _check_alike(identities, numbers)
    return replace(
        identities[0],
        people=tuple(person for identity in identities for person in identity.people),
        thumbnails=torch.cat([identity.thumbnails for identity in identities]),
    )


def join_photos(identities: Sequence[Identity], numbers: Sequence[int] = (1, 2, 3, 4)) -> Identity:
    """One identity in which person i has the photos that person i has in each of them.

    numbers: what errors call the identities. Raises IdentityError where the numbers of people, the recognisers or the
    CLIP vision models differ.
    """
    _check_alike(identities, numbers)
    counts = [len(identity.people) for identity in identities]
    if len(set(counts)) > 1:
        raise IdentityError(
            f"The identities have {', '.join(map(str, counts))} people: to add photos, each must have the same people."
        )
    people = tuple(map(_join_person, zip(*(identity.people for identity in identities))))
    crops = [crop for person in zip(*(identity.crops() for identity in identities)) for crop in person]
    return replace(identities[0], people=people, thumbnails=torch.cat(crops))


def _join_person(parts: Sequence[Person]) -> Person:
    known = all(part.quality for part in parts)
    return Person(
        torch.cat([part.embeddings for part in parts]),
        None if parts[0].clip is None else torch.cat([part.clip for part in parts]),
        torch.cat([part.weights for part in parts]),
        tuple(quality for part in parts for quality in part.quality) if known else (),
    )


def _check_alike(identities: Sequence[Identity], numbers: Sequence[int]) -> None:
    first, *others = identities
    for number, other in zip(numbers[1:], others):
        if other.digest != first.digest:
            raise IdentityError(
                f"Identity {number} was made with the face model {_made_with(other)} and identity {numbers[0]} with "
                f"{_made_with(first)}, whose embeddings mean something else: use the same face model for both."
            )
        if _clip_shape(other) != _clip_shape(first):
            raise IdentityError(
                f"Identity {numbers[0]} and identity {number} were extracted with different CLIP vision models: "
                "extract both with the same one."
            )


def _clip_shape(identity: Identity) -> torch.Size | None:
    return None if identity.clip_uncond is None else identity.clip_uncond.shape


def relative_weights(person: Person) -> Tensor:
    """[N], the largest is 1: a sum of weights of 3e38 would be infinite, one of 1e-40 nothing."""
    return (person.weights.double() / person.weights.double().max()).float()


def mean_embedding(person: Person) -> Tensor:
    """[D], unit length: the direction of the weighted sum of the embeddings."""
    return F.normalize(relative_weights(person) @ person.embeddings, dim=0)


def weighted_mean(identity: Identity) -> Identity:
    """Each person's photos become one: mean embedding (unit length) and mean CLIP features, both by weight.

    The thumbnail is the photo that is most similar to the mean; a mean has no quality.
    """
    people = tuple(map(_average, identity.people))
    nearest = [crops[best_photo(person)] for person, crops in zip(identity.people, identity.crops())]
    return replace(identity, people=people, thumbnails=torch.stack(nearest))


def _average(person: Person) -> Person:
    share = relative_weights(person)
    share = share / share.sum()
    clip = None if person.clip is None else torch.einsum("n,ntd->td", share, person.clip)[None]
    return Person(mean_embedding(person)[None], clip, torch.ones(1))


def best_match(identity: Identity, probes: Sequence[Tensor | None]) -> tuple[Identity, list[int]]:
    """Each person's one photo that fits best, and its index.

    probes: for each person the unit embedding [D] to be like, such as that of the degraded face (ID-PreFeR takes
    the reference that is most similar to it), or None for the person's mean.
    """
    chosen = [best_photo(person, probe) for person, probe in zip(identity.people, probes, strict=True)]
    people = tuple(_only(person, i) for person, i in zip(identity.people, chosen))
    thumbnails = torch.stack([crops[i] for crops, i in zip(identity.crops(), chosen)])
    return replace(identity, people=people, thumbnails=thumbnails), chosen


def best_photo(person: Person, probe: Tensor | None = None) -> int:
    """Index of the photo with the largest weight * (1 + cosine) / 2, the cosine to `probe` or to the person's mean."""
    probe = mean_embedding(person) if probe is None else probe
    return int((relative_weights(person) * (1 + person.embeddings @ probe) / 2).argmax())


def describe(identity: Identity) -> str:
    """A line for each photo, under a line for each person where there are several."""
    if len(identity.people) == 1:
        return "\n".join(_describe_photos(identity.people[0]))
    return "\n".join(
        line
        for number, person in enumerate(identity.people, start=1)
        for line in (f"person {number}", *(f"  {line}" for line in _describe_photos(person)))
    )


def _describe_photos(person: Person) -> list[str]:
    """Weight of each photo, its similarity to the person's mean, its quality where that is known."""
    similarity = (person.embeddings @ mean_embedding(person)).tolist()
    lines = [
        f"photo {number}: weight {weight:g}, {cosine:.2f} like the mean of all"
        for number, (weight, cosine) in enumerate(zip(person.weights.tolist(), similarity), start=1)
    ]
    if person.quality:
        lines = [
            f"{line}; face {q.height:.0f} px high, detected with {q.score:.2f}, sharpness {q.sharpness:.2f}, "
            f"embedding norm {q.norm:.1f}"
            for line, q in zip(lines, person.quality)
        ]
    return lines
