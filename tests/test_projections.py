"""Every kind of `image_proj` against diffusers' own class, which diffusers makes from the published keys."""

import pytest
import torch

from ridfr_core.projections import FaceIdPlusProjection, FaceIdProjection, PlusProjection


def random_weights(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return module.eval()


def diffusers_projection(ours):
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
    return convert(ours.state_dict(), low_cpu_mem_usage=False)


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(("dim", "clip_dim"), [(128, 128), (768, 1280)])
@pytest.mark.parametrize("shortcut", [False, True])
@torch.inference_mode()
def test_faceid_plus_matches_diffusers(dim, clip_dim, shortcut):
    ours = random_weights(FaceIdPlusProjection(dim, clip_dim))
    theirs = diffusers_projection(ours)
    assert type(theirs).__name__ == "IPAdapterFaceIDPlusImageProjection"
    embedding, clip = torch.nn.functional.normalize(torch.randn(2, 512), dim=1), torch.randn(2, 33, clip_dim)
    theirs.clip_embeds, theirs.shortcut, theirs.shortcut_scale = clip[:, None], shortcut, 0.7
    got = ours(embedding, clip, shortcut, s_scale=0.7)
    assert got.shape == (2, 4, dim)
    assert relative_error(got, theirs(embedding)) < 1e-5


@pytest.mark.parametrize("tokens", [4, 16])  # FaceID, FaceID-portrait
@torch.inference_mode()
def test_faceid_matches_diffusers(tokens):
    ours = random_weights(FaceIdProjection(96, tokens=tokens))
    theirs = diffusers_projection(ours)
    assert type(theirs).__name__ == "IPAdapterFaceIDImageProjection"
    embedding = torch.nn.functional.normalize(torch.randn(3, 512), dim=1)
    got = ours(embedding, None, True, 1.0)
    assert got.shape == (3, tokens, 96)
    assert relative_error(got, theirs(embedding)) < 1e-5


@pytest.mark.parametrize(("dim", "width"), [(128, 128), (128, 192)])  # SD1.5's has dim = width, SDXL's 2048 and 1280
@torch.inference_mode()
def test_plus_matches_diffusers(dim, width):
    ours = random_weights(PlusProjection(dim, clip_dim=96, width=width))
    theirs = diffusers_projection(ours)
    assert type(theirs).__name__ == "IPAdapterPlusImageProjection"
    clip = torch.randn(2, 33, 96)
    got = ours(None, clip, False, 1.0)
    assert got.shape == (2, 16, dim)
    assert relative_error(got, theirs(clip)) < 1e-5


def published_resampler_keys(prefix=""):
    both = [prefix + name for name in ("proj_in", "proj_out", "norm_out")]
    both += [f"{prefix}layers.{i}.{name}" for i in range(4) for name in ("0.norm1", "0.norm2", "1.0")]
    weights = [f"{prefix}layers.{i}.0.{name}" for i in range(4) for name in ("to_q", "to_kv", "to_out")]
    weights += [f"{prefix}layers.{i}.1.{j}" for i in range(4) for j in (1, 3)]
    return {f"{key}.{kind}" for key in both for kind in ("weight", "bias")} | {f"{key}.weight" for key in weights}


PUBLISHED_FACEID = {f"{name}.{kind}" for name in ("proj.0", "proj.2", "norm") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("projection", "keys", "count"),
    [
        (FaceIdProjection, PUBLISHED_FACEID, 6),
        (FaceIdPlusProjection, PUBLISHED_FACEID | published_resampler_keys("perceiver_resampler."), 56),
        (PlusProjection, {"latents"} | published_resampler_keys(), 51),
    ],
)
def test_projections_have_the_published_keys(projection, keys, count):
    assert set(projection(64).state_dict()) == keys
    assert len(keys) == count


def test_published_size():
    """FaceID-Plus for SD1.5 has 33.58M parameters."""
    with torch.device("meta"):
        assert sum(p.numel() for p in FaceIdPlusProjection(768).parameters()) == pytest.approx(33.58e6, rel=1e-3)
