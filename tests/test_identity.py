"""References: the one face in each photo, or a sentence that says which is unusable; how several count together."""

from dataclasses import replace

import pytest
import torch

from ridfr_core.face_model import FaceModel
from ridfr_core.faces import ARCFACE_TEMPLATE, Face
from ridfr_core.identity import (
    Identity,
    IdentityError,
    Person,
    Quality,
    best_match,
    check_recogniser,
    describe,
    each_alone,
    join_people,
    join_photos,
    one_photo_each,
    parse_weights,
    reference_faces,
    weighted_mean,
)


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


def identity(*photos, seed=0, weights=None, **changes):
    """People with so many photos each; photo k of person p has thumbnail brightness p + k / 10."""
    g = torch.Generator().manual_seed(seed)
    people = tuple(
        Person(
            torch.nn.functional.normalize(torch.randn(n, 512, generator=g), dim=1),
            torch.randn(n, 3, 8, generator=g),
            torch.ones(n) if weights is None else torch.tensor(weights),
            tuple(Quality(100.0 + k, 0.9, 20.0, 0.5) for k in range(n)),
        )
        for n in photos
    )
    shades = torch.tensor([p + k / 10 for p, n in enumerate(photos) for k in range(n)])
    thumbnails = shades.view(-1, 1, 1, 1).expand(-1, 3, 112, 112)
    return replace(Identity(people, torch.randn(3, 8, generator=g), "a" * 64, thumbnails, "buffalo_l"), **changes)


def shades(identity):
    return [round(shade, 1) for shade in identity.thumbnails[:, 0, 0, 0].tolist()]


def test_joining_people():
    joined = join_people([identity(1), identity(2, 1, seed=1)])
    assert [len(person.embeddings) for person in joined.people] == [1, 2, 1]
    assert shades(joined) == [0, 0, 0.1, 1] and len(joined.crops()[1]) == 2
    assert [len(one.people) for one in each_alone(joined)] == [1, 1, 1]
    assert [shades(one) for one in each_alone(joined)] == [[0], [0, 0.1], [1]]


def test_joining_photos_keeps_each_persons_together():
    a, b = identity(2, 1), identity(1, 1, seed=1)
    joined = join_photos([a, b])
    assert [len(person.embeddings) for person in joined.people] == [3, 2]
    assert shades(joined) == [0, 0.1, 0, 1, 1]
    torch.testing.assert_close(joined.people[1].embeddings, torch.cat([a.people[1].embeddings, b.people[1].embeddings]))
    torch.testing.assert_close(joined.people[0].clip, torch.cat([a.people[0].clip, b.people[0].clip]))
    assert [q.height for q in joined.people[0].quality] == [100, 101, 100]


@pytest.mark.parametrize(
    "other, says",
    [
        (identity(1, 1), "The identities have 1, 2 people"),
        (identity(1, digest="b" * 64, recogniser="antelopev2"), "Identity 2 was made with .* antelopev2 .bbbbbbbb"),
        (identity(1, clip_uncond=None), "Identity 1 and identity 2 .* different CLIP vision models"),
        (identity(1, clip_uncond=torch.zeros(3, 9)), "Identity 1 and identity 2 .* different CLIP vision models"),
    ],
)
def test_what_cannot_be_joined(other, says):
    with pytest.raises(IdentityError, match=says):
        join_photos([identity(1), other])


def test_weighted_mean():
    """Against the formula in float64; the closest photo is shown for all."""
    many = identity(3, weights=[1.0, 0.5, 4.0])
    mean = weighted_mean(many)
    (before,), (after,) = many.people, mean.people
    total = (before.embeddings.double() * torch.tensor([[1.0], [0.5], [4.0]])).sum(0)
    torch.testing.assert_close(after.embeddings[0].double(), total / total.norm(), rtol=0, atol=1e-7)
    clip = (before.clip[0].double() + 0.5 * before.clip[1] + 4 * before.clip[2]) / 5.5
    torch.testing.assert_close(after.clip[0].double(), clip, rtol=0, atol=1e-6)
    assert after.weights.tolist() == [1] and shades(mean) == [0.2]


def test_best_match():
    """Like the degraded face where there is one, else like the mean; half the weight needs more likeness."""
    many = identity(3, 2)
    probe = torch.nn.functional.normalize(many.people[0].embeddings[1] + 0.3 * many.people[0].embeddings[2], dim=0)
    best, photos = best_match(many, [probe, None])
    assert photos[0] == 1 and shades(best) == [0.1, 1 + photos[1] / 10]
    torch.testing.assert_close(best.people[0].embeddings[0], many.people[0].embeddings[1])
    torch.testing.assert_close(best.people[0].clip[0], many.people[0].clip[1])
    assert [q.height for q in best.people[0].quality] == [101]
    light = replace(many.people[0], weights=torch.tensor([1.0, 0.3, 1.0]))
    assert best_match(replace(many, people=(light, many.people[1])), [probe, None])[1][0] == 2


def test_weight_zero_is_never_the_best():
    many = identity(2, weights=[0.0, 1.0])
    assert best_match(many, [many.people[0].embeddings[0]])[1] == [1]


@pytest.mark.parametrize("scale", [3e38, 1e-20, 1e-40, 1e-45])
def test_weights_of_any_size_mean_what_their_ratio_means(scale):
    """Sums of the largest would be infinite, of the smallest nobody's face."""
    wanted, many = identity(3, weights=[1.0, 0.0, 1.0]), identity(3, weights=[scale, 0.0, scale])
    mean = weighted_mean(many)
    torch.testing.assert_close(mean.people[0].embeddings, weighted_mean(wanted).people[0].embeddings)
    torch.testing.assert_close(mean.people[0].clip, weighted_mean(wanted).people[0].clip)
    assert mean.people[0].embeddings.norm().item() == pytest.approx(1, abs=1e-5)
    assert best_match(many, [None])[1] == best_match(wanted, [None])[1]
    assert parse_weights(f"{scale}, 0, {scale}", 3).tolist() == torch.tensor([scale, 0, scale]).tolist()
    assert "nan" not in describe(many)


def test_embeddings_of_any_width():
    narrow = replace(identity(2), people=(Person(torch.eye(2, 128), None, torch.ones(2)),), clip_uncond=None)
    assert weighted_mean(narrow).people[0].embeddings.shape == (1, 128)
    assert best_match(narrow, [torch.eye(2, 128)[1]])[1] == [1]


def test_one_photo_each():
    apart = one_photo_each(identity(3, weights=[1.0, 0.0, 2.0]))
    assert len(apart.people) == 3 and all(person.weights.tolist() == [1] for person in apart.people)
    assert len(apart.crops()) == 3


@pytest.mark.parametrize("text", ["1, 0.5,2", "1 0.5 2", "1\n0.5\n2\n", "1;0.5;2"])
def test_weights_as_text(text):
    assert parse_weights(text, 3).tolist() == [1, 0.5, 2]
    assert parse_weights(" ", 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "text, says", [("1, 2", "Weights: 2, photos: 3"), ("1, x, 2", "not numbers"), ("1, -1, 2", "at least 0"),
                    ("1, 1e39, 2", "finite"), ("nan 1 1", "finite"), ("x " * 500, "^The weights .{60,80} are not")]
)
def test_weights_that_are_none(text, says):
    with pytest.raises(IdentityError, match=says):
        parse_weights(text, 3)


def test_another_recogniser_is_refused():
    check_recogniser(identity(1), "renamed", "a" * 64)
    with pytest.raises(IdentityError, match="made with the face model buffalo_l .a{8}. and this is nano .b{8}.,"):
        check_recogniser(identity(1), "nano", "b" * 64)


def test_report_has_a_line_for_each_photo():
    lines = describe(identity(2, 1)).splitlines()
    assert lines[0] == "person 1" and lines[3] == "person 2" and len(lines) == 5
    assert "face 101 px high" in lines[2] and "sharpness 0.50" in lines[2]
    assert len(describe(identity(2)).splitlines()) == 2
