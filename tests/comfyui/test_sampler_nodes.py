"""Paper Sampler, Paper Schedule and LQ Start Noise, apart from whole runs (see parity/test_run.py)."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def schedule(nodes):
    return nodes["RIDFR_PaperSchedule"].execute


def test_schedule_is_the_models_levels(nano, schedule):
    levels = nano.model.get_model_object("model_sampling").sigmas
    sigmas = schedule(nano.model, "linspace", 20)[0]
    assert len(sigmas) == 21 and sigmas[-1] == 0
    assert torch.equal(sigmas[:-1], levels[[999, 949, 899, 849, 799, 749, 699, 649, 599, 549,
                                            500, 450, 400, 350, 300, 250, 200, 150, 100, 50]])


def test_schedule_survives_unipc(nano, nodes, sample_custom, schedule):
    """ComfyUI's own uni_pc writes its last level into the tensor that it is given."""
    sigmas = schedule(nano.model, "linspace", 2)[0]
    before = sigmas.clone()
    sample_custom(nodes["RIDFR_PaperSampler"].execute("UniPC (RIDFR)")[0], sigmas)
    assert torch.equal(sigmas, before)


@pytest.fixture
def sample_custom(nano):
    """sample_custom(sampler, sigmas) -> latents of the nano model."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    def run(sampler, sigmas):
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        prompt = nano.prompt
        return SamplerCustom.execute(nano.model, True, 1, 1.0, prompt, prompt, sampler, sigmas, latent)[0]["samples"]

    return run


def test_one_step_of_unipc(nano, nodes, sample_custom, schedule):
    sampler, sigmas = nodes["RIDFR_PaperSampler"].execute("UniPC (RIDFR)")[0], schedule(nano.model, "linspace", 2)[0]
    with pytest.raises(ValueError, match="UniPC needs at least 2 steps"):
        sample_custom(sampler, sigmas[1:])


def test_too_many_steps(nano, schedule):
    with pytest.raises(ValueError, match="Paper Schedule: steps is 501, but it can be 2 to 500"):
        schedule(nano.model, "leading", 501)


def test_start_is_the_lq_in_noise(nano, nodes, schedule):
    """sqrt(abar_999) z + sqrt(1 - abar_999) noise, as a sampler scales it whose first time is 981."""
    latent = 5 * torch.randn(2, 4, 16, 16)
    sigmas = schedule(nano.model, "leading", 50)[0]
    start = nodes["RIDFR_LQStartNoise"].execute(nano.model, {"samples": latent}, sigmas, 3)[0]["samples"]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    noise = torch.randn(latent.shape, generator=torch.manual_seed(3))
    want = alphas[999].sqrt() * latent * 0.18215 + (1 - alphas[999]).sqrt() * noise
    torch.testing.assert_close(start * 0.18215, want / alphas[981].sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("node", ["schedule", "start"])
def test_a_flow_model_is_refused(nano, nodes, schedule, node):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    flow = ModelSamplingSD3().patch(nano.model, 3.0)[0]
    with pytest.raises(ValueError, match="for models with a table of noise levels, as SD1.5 and SDXL, but this"):
        if node == "schedule":
            schedule(flow, "linspace", 20)
        else:
            nodes["RIDFR_LQStartNoise"].execute(flow, {"samples": torch.zeros(1, 4, 16, 16)}, torch.ones(2), 0)


SIGMAS = {
    "one": [14.6],
    "equal": [3.0, 3.0, 3.0, 0.0],
    "zeros": [0.0, 0.0, 0.0],
    "rising": [0.0, 1.0, 14.6],
    "negative": [14.6, 1.0, -1.0],
    "from below zero": [-3.0, -4.0, -5.0],
}


@pytest.mark.parametrize("kind", SIGMAS)
def test_noise_levels_that_do_not_fall(nano, nodes, sample_custom, kind):
    """For both who take them. SamplerCustom hands them on as they are."""
    sigmas = torch.tensor(SIGMAS[kind])
    says = "needs noise levels that fall at every step|needs at least"
    with pytest.raises(ValueError, match=f"LQ Start Noise ({says})"):
        nodes["RIDFR_LQStartNoise"].execute(nano.model, {"samples": torch.zeros(1, 4, 16, 16)}, sigmas, 0)
    with pytest.raises(ValueError, match=f"UniPC ({says})"):
        sample_custom(nodes["RIDFR_PaperSampler"].execute("UniPC (RIDFR)")[0], sigmas)


@pytest.mark.parametrize("sigmas", [[14.6, 1.0, 1e-5, 1e-6, 0.0], [14.6, torch.nan, 0.0], [1e30, 1.0, 0.0]])
def test_noise_levels_that_the_solver_cannot_tell_apart(nodes, sample_custom, sigmas):
    """They gave a picture of NaN."""
    with pytest.raises(ValueError, match="UniPC needs noise levels that"):
        sample_custom(nodes["RIDFR_PaperSampler"].execute("UniPC (RIDFR)")[0], torch.tensor(sigmas))


def test_a_start_at_a_huge_noise_level_is_finite(nano, nodes):
    sigmas = torch.tensor([1e30, 1.0, 0.0])
    start = nodes["RIDFR_LQStartNoise"].execute(nano.model, {"samples": torch.ones(1, 4, 16, 16)}, sigmas, 0)[0]
    assert torch.isfinite(start["samples"]).all()


def test_small_and_large_noise_levels_are_taken(nodes, sample_custom):
    for sigmas in ([4518.0, 14.6, 1.0, 0.01, 0.0], [14.6, 5.0, 1.0, 0.5]):
        latent = sample_custom(nodes["RIDFR_PaperSampler"].execute("UniPC (RIDFR)")[0], torch.tensor(sigmas))
        assert torch.isfinite(latent).all()


@pytest.mark.parametrize(
    "latent, says",
    [
        ({"samples": torch.zeros(1, 16, 16, 16)}, "has the size 1x16x16x16, but this model's are batch x 4 x"),
        ({"samples": torch.zeros(1, 4, 3, 16, 16)}, "has the size 1x4x3x16x16"),
        ({"samples": torch.zeros(2, 4, 16, 16), "batch_index": [1]}, "batch_index does not fit"),
        ({"samples": torch.zeros(2, 4, 16, 16), "batch_index": [-1, -2]}, "batch_index does not fit"),
        ({"samples": torch.zeros(2, 4, 16, 16), "batch_index": "ab"}, "batch_index does not fit"),
        ({"samples": torch.zeros(1, 4, 16, 16), "batch_index": [10**9]}, "batch_index does not fit"),
    ],
)
def test_odd_latents(nano, nodes, schedule, latent, says):
    with pytest.raises(ValueError, match=says):
        nodes["RIDFR_LQStartNoise"].execute(nano.model, latent, schedule(nano.model, "linspace", 4)[0], 0)


def test_what_else_a_latent_holds_is_kept(nano, nodes, schedule):
    latent = {"samples": torch.ones(2, 4, 16, 16), "batch_index": [5, 2], "noise_mask": torch.ones(1, 1, 128, 128)}
    sigmas = schedule(nano.model, "linspace", 4)[0]
    start = nodes["RIDFR_LQStartNoise"].execute(nano.model, latent, sigmas, 0)[0]
    assert start.keys() == latent.keys() and start["noise_mask"] is latent["noise_mask"]
    whole = {"samples": torch.ones(6, 4, 16, 16)}
    both = nodes["RIDFR_LQStartNoise"].execute(nano.model, whole, sigmas, 0)[0]["samples"]
    torch.testing.assert_close(start["samples"], both[[5, 2]])  # pictures 5 and 2 of a batch keep their noise
