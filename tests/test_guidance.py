"""Eq. 7: its gradient against finite differences, and what the update does to whom."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ridfr_core.faces import ARCFACE_TEMPLATE, FFHQ_TEMPLATE, align
from ridfr_core.guidance import (
    AUTO,
    BEST,
    LARGEST,
    MEAN,
    Ascent,
    FaceSimilarity,
    GuidanceError,
    checkpoint_blocks,
    guide,
    references_of,
)
from ridfr_core.guided_face import Sight, guided_face
from ridfr_core.identity import Person
from ridfr_core.recognition import IResNet, embed

SCALE = 8


class Decoder(nn.Module):
    """A small VAE's decoder, whose blocks are made of layers as the real ones are."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, channels), nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return x + self.conv(F.silu(self.norm(x)))

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.blocks = nn.ModuleList(self.Block(8) for _ in range(4))

    def forward(self, z):
        h = self.first(z)
        for block in self.blocks[:3]:
            h = F.interpolate(block(h), scale_factor=2.0)
        return self.last(self.blocks[3](h)) * 0.2 + 0.5


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    recogniser = IResNet((1, 1, 1, 1), (4, 4, 4, 4))
    return FaceSimilarity(Decoder(), recogniser).double().requires_grad_(False)


@pytest.fixture
def scene():
    """x, denoised, sigma of two elements 16x16, and the pictures' faces: tilted, in different places."""
    g = torch.Generator().manual_seed(1)
    x, denoised = torch.randn(2, 4, 16, 16, generator=g).double() * 3, torch.randn(2, 4, 16, 16, generator=g).double()
    pictures = torch.rand(2, 3, 128, 128, generator=g).double()
    turn = torch.tensor([[0.55, 0.1], [-0.1, 0.55]])
    places = [ARCFACE_TEMPLATE @ turn + shift for shift in (torch.tensor([30.0, 25.0]), torch.tensor([45.0, 30.0]))]
    references = F.normalize(torch.randn(2, 3, 512, generator=g).double(), dim=-1)
    faces = [guided_face(Sight(p, q), r, (16, 16), SCALE) for p, q, r in zip(pictures, places, references, strict=True)]
    return x, denoised, torch.tensor([2.5, 1.5]).double(), [face.to(torch.float64) for face in faces]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_of_the_whole_chain_in_float64(networks, scene, checkpointed):
    """eps -> z0 -> crop -> decoder -> warp -> ArcFace -> cosine, against central differences in random directions: the
    change of eps is the gradient by eps."""
    x, denoised, sigma, faces = scene
    face = faces[0]
    x, z0 = x[:1][face.window], denoised[:1][face.window]
    eps = (x - z0) / sigma[0]
    step = 0.01
    moved, similarity = Ascent(networks, step, relative=False, checkpointed=checkpointed)(z0, x, sigma[0], face)
    gradient = ((x - moved) / sigma[0] - eps) / step

    def cosine(eps):
        return networks(x - sigma[0] * eps, face)

    torch.testing.assert_close(similarity, cosine(eps))
    for seed in range(5):
        along = torch.randn(eps.shape, generator=torch.Generator().manual_seed(seed)).double()
        h = 1e-7  # small, as PReLU has kinks
        slope = (cosine(eps + h * along) - cosine(eps - h * along)) / (2 * h)
        torch.testing.assert_close((gradient * along).sum()[None], slope, rtol=1e-4, atol=1e-8)


def test_several_small_steps_raise_the_similarity(networks, scene):
    x, denoised, sigma, faces = scene
    ascend = Ascent(networks, 0.02, iterations=5)
    guided, before = guide(ascend, x, denoised, sigma, faces)
    _, after = guide(ascend, x, guided, sigma, faces)
    assert (before.diff(dim=1) > 0).all() and (after[:, 0] > before[:, -1]).all()


def test_raw_and_relative_steps(networks, scene):
    """A relative step moves the noise by that share of its RMS; the raw one by the gradient as it stands."""
    x, denoised, sigma, faces = scene
    window = faces[0].window
    x, z0 = x[:1][window], denoised[:1][window]
    eps = (x - z0) / sigma[0]

    def moved(step, relative):
        return (x - Ascent(networks, step, relative)(z0, x, sigma[0], faces[0])[0]) / sigma[0] - eps

    raw, relative = moved(0.1, False), moved(0.1, True)
    torch.testing.assert_close(F.cosine_similarity(raw.flatten(), relative.flatten(), 0), torch.ones(()).double())
    torch.testing.assert_close(relative.square().mean(), 0.01 * eps.square().mean())
    torch.testing.assert_close(moved(0.2, False), 2 * raw)


@pytest.mark.parametrize("sigma", [0.1, 14.6, 80.0, 4518.0])
@pytest.mark.parametrize("step, relative, iterations", [(0.1, True, 1), (0.1, True, 4), (3, True, 1), (1e3, False, 2)])
def test_the_change_of_z0_is_bounded(networks, scene, sigma, step, relative, iterations):
    _, denoised, _, faces = scene
    noise = torch.randn(denoised.shape, generator=torch.Generator().manual_seed(3)).double()
    x, sigma = denoised + sigma * noise, torch.full((2,), sigma).double()
    guided, _ = guide(Ascent(networks, step, relative, iterations), x, denoised, sigma, faces)
    for i, face in enumerate(faces):
        moved, z0, eps = (latents[i][face.window] for latents in (guided - denoised, denoised, noise))
        share = moved.square().mean().sqrt() / z0.square().mean().sqrt()
        assert 0 < share <= LARGEST * (1 + 1e-6)
        if relative and iterations == 1:  # up to there it is the share of the noise
            expected = step * sigma[i] * eps.square().mean().sqrt() / z0.square().mean().sqrt()
            torch.testing.assert_close(share, expected.clamp_max(LARGEST))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_a_high_sigma(networks, scene, dtype):
    """4518 squared is beyond float16, and x - sigma * eps would cancel: what is given is all that is lost."""
    _, denoised, _, faces = scene
    single, sigma = networks.float(), torch.full((2,), 4518.0)
    try:
        faces = [face.to(torch.float32) for face in faces]
        half = denoised.to(dtype)
        noise = torch.randn(denoised.shape, generator=torch.Generator().manual_seed(4))
        x = (denoised + 4518 * noise).to(dtype)
        guided, similarity = guide(Ascent(single, 0.1), x, half, sigma.to(dtype), faces)
        exact, _ = guide(Ascent(single, 0.1), x.float(), half.float(), sigma, faces)
    finally:
        networks.double()
    assert guided.dtype == dtype and guided.isfinite().all() and similarity.isfinite().all()
    torch.testing.assert_close(guided, exact.to(dtype))
    assert not torch.equal(guided, half)


@pytest.mark.parametrize("sigma", [0.0, 1e-6])
def test_no_noise_is_no_change(networks, scene, sigma):
    _, denoised, _, faces = scene
    x = denoised + sigma * torch.randn(denoised.shape, generator=torch.Generator().manual_seed(4)).double()
    guided, _ = guide(Ascent(networks, 0.1), x, denoised, torch.full((2,), sigma).double(), faces)
    torch.testing.assert_close(guided, denoised, rtol=0, atol=1e-5)


def test_a_batch_is_its_elements(networks, scene):
    """Each element has its own face and person; without a face, an element stays to the bit, and so does the rest of a
    picture."""
    x, denoised, sigma, faces = scene
    ascend = Ascent(networks, 0.1, iterations=2)
    both, similarities = guide(ascend, x, denoised, sigma, faces)
    for i in range(2):
        rows = slice(i, i + 1)
        alone, similarity = guide(ascend, x[rows], denoised[rows], sigma[rows], faces[rows])
        assert torch.equal(both[rows], alone) and torch.equal(similarities[rows], similarity)
    one, similarity = guide(ascend, x, denoised, sigma, [None, faces[1]])
    assert torch.equal(one[0], denoised[0]) and torch.equal(one[1], both[1]) and similarity.shape == (1, 2)
    outside = torch.ones_like(denoised[0], dtype=torch.bool)
    outside[faces[0].window] = False
    assert outside.any() and torch.equal(both[0][outside], denoised[0][outside])
    assert not torch.equal(both[0], denoised[0])


def test_the_target_stops_and_nan_is_left_alone(networks, scene):
    x, denoised, sigma, faces = scene
    _, before = guide(Ascent(networks, 0.1), x, denoised, sigma, faces)
    target = float(before.mean())  # one of the two is above it
    guided, _ = guide(Ascent(networks, 0.1, target=target), x, denoised, sigma, faces)
    for i in range(2):
        assert torch.equal(guided[i], denoised[i]) == bool(before[i, 0] >= target)
    broken = denoised.clone()
    broken[0, 0, 8, 8] = float("nan")
    guided, similarity = guide(Ascent(networks, 0.1), x, broken, sigma, faces)
    assert similarity[0].isnan().all() and torch.equal(guided[0].isnan(), broken[0].isnan())
    assert torch.equal(guided[1], guide(Ascent(networks, 0.1), x, denoised, sigma, faces)[0][1])


def test_the_crop_is_the_aligned_face(networks):
    """Decoder swapped for enlargement: the recogniser sees the picture's own aligned face, wherever it is decoded."""

    class Enlarge(nn.Module):
        def forward(self, z):
            return F.interpolate(z, scale_factor=8.0, mode="nearest")

    small = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    picture = F.interpolate(small, scale_factor=8.0, mode="nearest")
    expected = embed(networks.recogniser, align(picture, FFHQ_TEMPLATE[None].double()))
    similarity = FaceSimilarity(Enlarge(), networks.recogniser)
    for whole in (True, False):
        face = guided_face(Sight(picture[0], FFHQ_TEMPLATE), expected, (64, 64), whole=whole).to(torch.float64)
        cosine = similarity(small[face.window], face)
        torch.testing.assert_close(cosine, torch.ones(1).double(), rtol=0, atol=1e-5)  # landmarks in float32
        height, width = face.box[1] - face.box[0], face.box[3] - face.box[2]
        assert (height, width) == (64, 64) if whole else 30 <= height <= 40 and 30 <= width <= 40


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (8, 8)])
def test_a_latent_smaller_than_the_crop(networks, size):
    picture = torch.rand(3, *(8 * side for side in size)).double()
    landmarks = FFHQ_TEMPLATE * (torch.tensor(size[::-1]) * 8 / 512)
    face = guided_face(Sight(picture, landmarks), torch.ones(1, 512), size).to(torch.float64)
    x = torch.randn(1, 4, *size).double()
    guided, _ = guide(Ascent(networks, 0.1), x * 2, x, torch.ones(1).double(), [face])
    assert guided.shape == x.shape and guided.isfinite().all()


def test_a_face_outside_the_picture(networks):
    sight = Sight(torch.rand(3, 64, 64), ARCFACE_TEMPLATE + 500)
    face = guided_face(sight, torch.ones(1, 512), (8, 8)).to(torch.float64)
    x = torch.randn(1, 4, 8, 8).double()
    guided, _ = guide(Ascent(networks, 0.1), x * 2, x, torch.ones(1).double(), [face])
    torch.testing.assert_close(guided, x)


def test_the_part_that_passes_no_gradient_is_named(networks, scene):
    x, denoised, sigma, faces = scene

    class Cut(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        @torch.no_grad()
        def forward(self, x):
            return self.network(x)

    for chain, part in ((FaceSimilarity(Cut(networks.decoder), networks.recogniser), "decoder"),
                        (FaceSimilarity(networks.decoder, Cut(networks.recogniser)), "recogniser")):
        with pytest.raises(GuidanceError, match=f"{part} passes no gradient: use"):
            guide(Ascent(chain, 0.1), x, denoised, sigma, faces)


def test_references():
    photos = F.normalize(torch.randn(3, 512, generator=torch.Generator().manual_seed(5)), dim=1)
    person = Person(photos, None, torch.tensor([1.5, 1.0, 1.0]))
    mean = F.normalize(1.5 * photos[0] + photos[1] + photos[2], dim=0)
    torch.testing.assert_close(references_of(person, MEAN)[0], mean)
    assert torch.equal(references_of(person, BEST), photos)
    assert torch.equal(references_of(person, AUTO, photos[2]), photos[2:])
    assert torch.equal(references_of(person, AUTO), references_of(person, MEAN)), "no face to be like"


def test_checkpointing_keeps_less_and_leaves_the_network_as_it_was(networks):
    decoder = networks.decoder

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            decoder(torch.randn(1, 4, 8, 8).double().requires_grad_())
        return sum(sizes)

    everything = kept()
    with checkpoint_blocks(decoder):
        assert kept() < 0.6 * everything
    assert kept() == everything and "forward" not in vars(decoder.blocks[0])


def test_checkpointing_gives_back_a_forward_that_others_have_set(networks):
    """accelerate's hooks, and packs that trace or speed up a network, put one on the instance."""
    block, calls = networks.decoder.blocks[1], []

    def forward(x):
        calls.append(1)
        return type(block).forward(block, x)

    block.forward = forward
    try:
        with checkpoint_blocks(networks.decoder):
            networks.decoder(torch.randn(1, 4, 8, 8).double().requires_grad_()).sum().backward()
        assert len(calls) == 2 and block.forward is forward
        with pytest.raises(ZeroDivisionError), checkpoint_blocks(networks.decoder):
            raise ZeroDivisionError
        assert block.forward is forward
    finally:
        del block.forward
