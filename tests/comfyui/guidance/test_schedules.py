"""Guidance on every noise schedule: with the shipped weights, on validation people, it helps or leaves alone."""

import importlib

import pytest
import torch

from ridfr_core.nano import WEIGHTS

pytestmark = pytest.mark.usefixtures("inference_mode")
STEPS = 6


@pytest.fixture(scope="module")
def weights():
    return WEIGHTS


@pytest.fixture(scope="module")
def people(pack, nodes, nano, face_model):
    """restored(model, sampler) -> latents of three severely degraded people; judged(latents) -> similarity to the
    truth by a recogniser that does not guide [3]; guided(model, **settings) -> the guided model."""
    from nodes import ControlNetApplyAdvanced, common_ksampler

    core = f"{pack.__name__}.ridfr_core"
    portraits, faces, degradation = (
        importlib.import_module(f"{core}.{name}") for name in ("nano.portraits", "faces", "degradation")
    )
    with torch.inference_mode():
        who = torch.arange(3) + portraits.SPLITS["val"].start
        truth, other = (portraits.render(who, torch.full_like(who, view)) for view in (0, 1))
        severe = degradation.DegradationRange(sigma=(2.0, 4.0), ratio=(6.0, 10.0), noise=(5.0, 15.0), quality=(40, 80))
        drawn = torch.Generator().manual_seed(1)
        lq = degradation.degrade(truth.image, **severe.draw(3, drawn), generator=drawn).movedim(1, -1)
        judge = nodes["RIDFR_LoadFaceModel"].execute("nano_judge")[0]
        content = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
        each = "each photo is another person"
        identity = nodes["RIDFR_ExtractIdentity"].execute(face_model, other.image.movedim(1, -1), each, nano.vision)[0]
        prompts = ControlNetApplyAdvanced().apply_controlnet(nano.prompt, nano.prompt, content, lq, 1.0, 0.0, 1.0)

    def restored(model, sampler, steps=STEPS):
        latent = {"samples": torch.zeros(3, 4, 16, 16)}
        return common_ksampler(model, 1, steps, 1.0, sampler, "normal", *prompts, latent)[0]["samples"]

    def judged(latents):
        pictures = nano.vae.decode(latents).movedim(-1, 1)
        seen, true = (judge.embed(faces.align(images, truth.landmarks)) for images in (pictures, truth.image))
        return (seen * true).sum(1)

    def guided(model, step_kind="relative to the noise", step_size=0.1, iterations=1):
        return nodes["RIDFR_IDPreservingSampling"].execute(
            model, nano.vae, face_model, identity, lq, "auto", "take the usual place", step_kind, step_size, iterations,
            0.0, 1.0, 1.0, "face", 0,
        )[0]  # fmt: skip

    return restored, judged, guided


def plain(sigmas):
    return sigmas


def ztsnr(sigmas):
    """To 4518: the next is 36 at most."""
    from comfy.model_sampling import rescale_zero_terminal_snr_sigmas

    return rescale_zero_terminal_snr_sigmas(sigmas)


def edm(sigmas):
    """To 80, by further levels."""
    return torch.cat([sigmas, torch.logspace(*sigmas[-1:].log10().tolist(), 1.9, 201)[1:]])


def with_schedule(nano, change, kind):
    """nano's v model, called another kind where only that differs: guidance sees z0 alone."""
    import comfy.model_sampling as kinds

    class Sampling(kinds.ModelSamplingDiscrete, getattr(kinds, kind)):
        calculate_denoised = kinds.V_PREDICTION.calculate_denoised

        def timestep(self, sigma):
            return super().timestep(sigma).clamp_max(999)  # of the times that nano has learnt

    sampling = Sampling()
    sampling.set_sigmas(change(sampling.sigmas.clone()))
    model = nano.model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


@pytest.mark.parametrize(
    "change, kind, sampler, steps",
    [
        (plain, "EPS", "euler", STEPS),
        (ztsnr, "V_PREDICTION", "euler", STEPS),
        (ztsnr, "V_PREDICTION", "uni_pc_bh2", STEPS),
        (ztsnr, "V_PREDICTION", "dpmpp_2m", 3),
        (ztsnr, "X0", "dpm_2", 3),
        (edm, "EDM", "euler", STEPS),
    ],
)
def test_guidance_helps_or_leaves_alone(people, nano, change, kind, sampler, steps):
    restored, judged, guided = people
    model = with_schedule(nano, change, kind)
    before, after = restored(model, sampler, steps), restored(guided(model), sampler, steps)
    assert judged(after).mean() >= judged(before).mean()
    assert (after.flatten(1).std(1) <= 1.05 * before.flatten(1).std(1)).all(), "noise where the face was"


@pytest.mark.parametrize("settings", [{"step_kind": "raw, as in the paper", "step_size": 10.0}, {"iterations": 3}])
def test_other_steps_are_bounded_too(people, nano, settings):
    restored, judged, guided = people
    model = with_schedule(nano, ztsnr, "V_PREDICTION")
    before, after = restored(model, "euler", 4), restored(guided(model, **settings), "euler", 4)
    assert judged(after).mean() >= judged(before).mean()
    assert (after.flatten(1).std(1) <= 1.1 * before.flatten(1).std(1)).all()
