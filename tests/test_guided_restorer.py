"""ID-preserving sampling in a Restorer: the guided prediction in diffusers' loop."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ridfr_core.evaluation.guided import Guided
from ridfr_core.guided_face import Sight, guided_face
from ridfr_core.restorer import Restorer

LANDMARKS = torch.tensor([[22.0, 28], [42, 28], [32, 38], [25, 48], [39, 48]])


def face_at(landmarks):
    return guided_face(Sight(torch.zeros(3, 64, 64), landmarks), torch.ones(1, 512), (8, 8), whole=True)


def guided(v, ascend, part, alphas, predicts="v_prediction"):
    """A Guided whose network predicts v."""
    unet = lambda *args, **kwargs: SimpleNamespace(sample=v)  # noqa: E731
    fields = dict.fromkeys(Restorer.__dataclass_fields__) | {"unet": unet, "schedule": {"prediction_type": predicts}}
    return Guided(**fields, ascend=ascend, faces=[face_at(LANDMARKS), None], range=part, alphas=alphas)


@pytest.mark.parametrize("t", [900, 400])
def test_the_predicted_v_follows_the_moved_noise(t):
    """Moving eps by d moves v by d * d(v)/d(eps) at fixed z: v = (eps - sqrt(1 - abar) z) / sqrt(abar)."""
    alphas = torch.linspace(0.999, 0.01, 1000)
    g = torch.Generator().manual_seed(0)
    z, v, move = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    restorer = guided(v, lambda z0, x, sigma, face: (z0 - sigma * move[:1], torch.zeros(1)), (999.0, 0.0), alphas)
    moved = restorer.predict(z, torch.tensor(t), None, (None, None), None, 1.0)
    torch.testing.assert_close(moved[0], v[0] + move[0] / alphas[t].sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[1], v[1], rtol=1e-4, atol=1e-5)


def test_the_predicted_epsilon_is_the_moved_noise():
    alphas = torch.linspace(0.999, 0.01, 1000)
    z, eps, move = (torch.randn(2, 4, 8, 8) for _ in range(3))
    ascend = lambda z0, x, sigma, face: (z0 - sigma * move[:1], torch.zeros(1))  # noqa: E731
    restorer = guided(eps, ascend, (999.0, 0.0), alphas, "epsilon")
    moved = restorer.predict(z, torch.tensor(400), None, (None, None), None, 1.0)
    torch.testing.assert_close(moved, eps + move * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), rtol=1e-4, atol=1e-4)


def test_outside_its_range_nothing_is_guided():
    v = torch.randn(2, 4, 8, 8)
    restorer = guided(v, None, (600.0, 300.0), torch.ones(1000))
    for t in (601, 299):
        assert restorer.predict(v, torch.tensor(t), None, (None, None), None, 1.0) is v


def test_the_face_is_looked_for_every_so_many_steps_and_a_face_unseen_stays_where_it_was():
    alphas = torch.linspace(0.999, 0.01, 1000)
    z, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    used, asked = [], []
    faces = [face_at(LANDMARKS), face_at(LANDMARKS - 3)]
    moved = face_at(LANDMARKS + 3)

    def ascend(z0, x, sigma, face):
        used.append(face)
        return z0, torch.zeros(1)

    def find(number, z0, face):
        assert face is faces[number] or face is moved
        asked.append((len(used), number))
        torch.testing.assert_close(z0, (alphas[500].sqrt() * z - (1 - alphas[500]).sqrt() * v)[number:number + 1])
        return moved if number == 0 else None

    restorer = replace(guided(v, ascend, (999.0, 0.0), alphas), faces=list(faces), find_every=2, find=find)
    for _ in range(5):
        restorer.predict(z, torch.tensor(500), None, (None, None), None, 1.0)
    assert asked == [(0, 0), (0, 1), (4, 0), (4, 1), (8, 0), (8, 1)]
    second = faces[1]
    assert all(a is b for a, b in zip(used, [moved, second] * 5, strict=True))
