"""At which predictions guidance acts, whatever noise levels a solver asks for, and what it makes of odd schedules."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")
BETWEEN = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_2s_ancestral", "seeds_2", "seeds_3", "dpm_adaptive")


@pytest.fixture
def watched(guided, nano, pack, monkeypatch):
    """watched(**settings) -> guided MODEL, record, and the levels of all its predictions and of the guided ones."""
    from comfy.patcher_extension import WrappersMP

    levels = SimpleNamespace(asked=[], guided=[])

    def predict(executor, x, timestep, *args, **kw):
        levels.asked.append(float(timestep[0]))
        return executor(x, timestep, *args, **kw)

    guide = pack.nodes.guided_run.Run.guide

    def counted(self, x, denoised, sigma):
        levels.guided.append(float(sigma[0]))
        return guide(self, x, denoised, sigma)

    monkeypatch.setattr(pack.nodes.guided_run.Run, "guide", counted)

    def watched(**settings):
        model, record = guided(**settings)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", predict)
        return model, record, levels

    return watched


@pytest.fixture
def run(nano):
    """run(model, sampler, sigmas) -> latents."""
    from comfy.sample import prepare_noise, sample_custom
    from comfy.samplers import sampler_object

    def run(model, sampler, sigmas):
        latent = torch.zeros(2, 4, 16, 16)
        noise, solver = prepare_noise(latent, 1), sampler_object(sampler)
        return sample_custom(model, noise, 1.0, solver, torch.tensor(sigmas), nano.prompt, nano.prompt, latent)

    return run


@pytest.mark.parametrize("sampler", BETWEEN)
def test_the_range_holds_for_every_prediction(watched, run, nano, sampler):
    model, _, levels = watched(start_percent=0.3, end_percent=0.7)
    sampling = nano.model.get_model_object("model_sampling")
    first, last = map(sampling.percent_to_sigma, (0.3, 0.7))
    run(model, sampler, [3 * first, 0.95 * first, 1.05 * last, 0.3 * last, 0.0])  # both ends lie between two steps
    assert levels.guided == [level for level in levels.asked if first >= level >= last]
    assert 0 < len(levels.guided) < len(levels.asked)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde", "seeds_3", "uni_pc_bh2"])
def test_the_curve_has_each_step_once(watched, run, pack, monkeypatch, sampler):
    """Of its own prediction, not of one between the steps; here the last step has such, too."""
    model, record, levels = watched()
    seen = []  # the similarities of all predictions
    count = pack.nodes.guided_run.Run.count
    monkeypatch.setattr(
        pack.nodes.guided_run.Run,
        "count",
        lambda self, step, x0: seen.append((levels.guided[-1], self.latest.tolist())) or count(self, step, x0),
    )
    sigmas = [8.0, 4.2, 2.1, 1.1]
    curve = record.of(run(model, sampler, sigmas))
    assert list(curve.similarity) == [0, 1, 2] and curve.steps == 3
    assert [level for level, _ in seen] == pytest.approx(sigmas[:-1])
    assert list(curve.similarity.values()) == [values for _, values in seen]


def test_a_range_that_the_run_does_not_reach_is_noted(guided, nano, nodes, shown):
    """Denoise 0.7 begins at 0.3 of the schedule."""
    from nodes import common_ksampler

    def sampled(model):
        latent = {"samples": torch.zeros(2, 4, 16, 16)}
        return common_ksampler(model, 1, 3, 1.0, "euler", "normal", nano.prompt, nano.prompt, latent, denoise=0.7)[0]

    model, record = guided(end_percent=0.2)
    latent = sampled(model)
    assert torch.equal(latent["samples"], sampled(nano.model)["samples"])
    note = "ID-Preserving Sampling does nothing in this run: its steps lie between 0.3"
    assert shown["RIDFR_IDPreservingSampling"].startswith(note)
    report = nodes["RIDFR_GuidancePlot"].execute(record, latent)[1].splitlines()
    assert report[0].startswith(note) and report[1] == "No step was guided."
    model, record = guided(end_percent=0.5)
    assert not record.of(sampled(model)["samples"]).notes


def test_start_and_end_are_of_the_model_that_is_sampled(guided, nano, run):
    """A node behind may replace the noise schedule."""
    import comfy.model_sampling as kinds

    class Sampling(kinds.ModelSamplingDiscrete, kinds.V_PREDICTION):
        pass

    flat = Sampling()
    flat.set_sigmas(torch.linspace(0.03, 100.0, 1000))
    model, record = guided(end_percent=0.5)
    model.add_object_patch("model_sampling", flat)
    assert list(record.of(run(model, "euler", [80.0, 60.0, 40.0, 0.0])).similarity) == [0, 1]


@pytest.mark.parametrize("sigmas", [[5.0, 5.0, 0.0], [2.0, 5.0, 1.0], [5.0, 2.0], [5.0], [], [0.0, 0.0], [3.0, 0, 0]])
def test_odd_schedules(guided, nano, nodes, run, sigmas):
    """They work as far as they do without guidance."""
    model, record = guided()
    moved, plain = run(model, "euler", sigmas), run(nano.model, "euler", sigmas)
    assert torch.equal(moved.isfinite(), plain.isfinite())
    assert nodes["RIDFR_GuidancePlot"].execute(record, {"samples": moved.nan_to_num()})[0].isfinite().all()


def test_guiders_with_several_prompts_or_models(guided, nano, nodes):
    """The guided model's own guider guides. As another's negative model ComfyUI never asks it: the plot says so."""
    from comfy.sample import prepare_noise
    from comfy.samplers import sampler_object
    from comfy_extras.nodes_custom_sampler import DualCFGGuider, DualModelGuider

    model, record = guided()
    prompt, latent = nano.prompt, torch.zeros(2, 4, 16, 16)
    guiders = {
        "dual cfg": lambda model: DualCFGGuider.execute(model, prompt, prompt, prompt, 2.0, 1.5, "regular")[0],
        "dual model": lambda model: DualModelGuider.execute(model, prompt, 2.0, nano.model, prompt)[0],
    }
    sigmas, noise = torch.tensor([8.0, 2.0, 0.0]), prepare_noise(latent, 1)

    def sampled(guider):
        return guider.sample(noise, latent, sampler_object("euler"), sigmas)

    for guider in guiders.values():
        moved = sampled(guider(model))
        assert len(record.of(moved).similarity) == 2 and not torch.equal(moved, sampled(guider(nano.model)))
    negative = sampled(DualModelGuider.execute(nano.model, prompt, 2.0, model, prompt)[0])
    assert nodes["RIDFR_GuidancePlot"].execute(record, {"samples": negative})[1].startswith("This latent is not the")


def test_context_windows(guided, run):
    """The model sees a part of the batch at a time, guidance all of it."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    def windowed(model):
        return ContextWindowsManualNode.execute(model, 1, 0, "standard_static", 1, False, "flat", 0, False)[0]

    model, record = guided()
    moved = run(windowed(model), "euler", [8.0, 2.0, 0.0])
    torch.testing.assert_close(moved, run(model, "euler", [8.0, 2.0, 0.0]), rtol=1e-3, atol=1e-3)
    assert record.of(moved).faces == [1, 2] and len(record.of(moved).similarity) == 2


def test_levels_that_are_no_numbers(guided, run):
    with pytest.raises(ValueError, match="noise levels .* are not all numbers: look at the node that made them"):
        run(guided()[0], "euler", [5.0, float("nan"), 0.0])


def test_a_model_that_becomes_a_flow_behind_the_node(guided, run):
    import comfy.model_sampling as kinds

    class Flow(kinds.ModelSamplingDiscreteFlow, kinds.CONST):
        pass

    model = guided()[0]
    model.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="moves the predicted noise, and this model .*: use one that does, such as"):
        run(model, "euler", [1.0, 0.5, 0.0])
