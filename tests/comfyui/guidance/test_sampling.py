"""ID-Preserving Sampling: what it computes, alone and beside other patches, and what the user sees of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ridfr_core.faces import FFHQ_TEMPLATE, Face

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("settings", [{"step_size": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}])
def test_no_strength_or_no_range_is_no_node(guided, nano, settings):
    assert guided(**settings)[0] is nano.model


def test_a_range_without_a_step_is_no_change_to_the_bit(guided, nano, sample):
    """The only step of a one-step run lies at the start."""
    plain = sample(nano.model, nano.prompt, steps=1, sampler="euler")
    late, early = (guided(start_percent=a, end_percent=b)[0] for a, b in ((0.5, 1.0), (0.0, 0.5)))
    assert torch.equal(sample(late, nano.prompt, steps=1, sampler="euler"), plain)
    assert not torch.equal(sample(early, nano.prompt, steps=1, sampler="euler"), plain)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["uni_pc_bh2", "euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_solvers(guided, nano, sample, sampler, cfg):
    model, record = guided()
    moved, plain = (sample(m, nano.prompt, steps=2, sampler=sampler, cfg=cfg) for m in (model, nano.model))
    assert moved.isfinite().all() and not torch.equal(moved, plain)
    curve = record.of(moved)
    assert list(curve.similarity) == [0, 1] and curve.steps == 2 and curve.faces == [1, 2]


def test_the_same_again(guided, nano, sample):
    model = guided()[0]
    assert torch.equal(sample(model, nano.prompt), sample(model, nano.prompt))


def test_a_solver_with_steps_of_its_own(guided, nano, sample):
    assert sample(guided()[0], nano.prompt, steps=3, sampler="dpm_fast").isfinite().all()


def test_each_picture_has_its_person(guided, nano, sample, people):
    both = sample(guided()[0], nano.prompt)
    for i in range(2):
        alone = sample(guided(who=replace(people, people=people.people[i : i + 1]))[0], nano.prompt)
        torch.testing.assert_close(both[i], alone[i])
        assert (both[i] - alone[1 - i]).abs().max() > 0.01


def test_a_face_that_is_similar_enough_is_left_alone_to_the_bit(guided, nano, sample):
    """Euler, for ComfyUI's UniPC makes no use of its only prediction in a run of one step."""

    def run(model):
        return sample(model, nano.prompt, steps=1, sampler="euler")

    model, record = guided()
    values = record.of(run(model)).similarity[0]
    target = max(sum(values) / 2, 0.0)  # one of the two is above it
    met = [value >= target for value in values]
    assert sorted(met) == [False, True]
    assert [torch.equal(a, b) for a, b in zip(run(nano.model), run(guided(target=target)[0]), strict=True)] == met


def test_decode_modes(guided, nano, sample):
    """Computing blocks again changes nothing; the others look at the picture in another way, and move it, too."""
    moved = {
        decode: sample(guided(decode=decode)[0], nano.prompt)
        for decode in ("face", "face, checkpointed", "face, checkpointed, bf16", "whole picture")
    }
    torch.testing.assert_close(moved["face, checkpointed"], moved["face"], rtol=1e-3, atol=1e-3)
    plain = sample(nano.model, nano.prompt)
    assert all(x.isfinite().all() and not torch.equal(x, plain) for x in moved.values())
    assert not torch.equal(moved["face"], moved["whole picture"])


def test_taesd(guided, nano, sample, pack, tmp_path, monkeypatch):
    import folder_paths
    from comfy.taesd.taesd import TAESD

    with pytest.raises(ValueError, match="There is no TAESD decoder for this model: choose another decode mode"):
        guided(decode="face, TAESD")
    monkeypatch.setattr(nano.model.model.latent_format, "taesd_decoder_name", "taesd_decoder")
    with pytest.raises(ValueError, match=r"'face, TAESD' needs taesd_decoder.safetensors in .*: get it from"):
        guided(decode="face, TAESD")
    shapes = TAESD().taesd_decoder.state_dict()  # ComfyUI leaves the values unset
    weights = {k: torch.randn(x.shape) * x[0].numel() ** -0.5 for k, x in shapes.items()}
    torch.save(weights, tmp_path / "taesd_decoder.pth")
    folder_paths.add_model_folder_path("vae_approx", str(tmp_path))
    try:
        moved = sample(guided(decode="face, TAESD")[0], nano.prompt)
        assert moved.isfinite().all() and not torch.equal(moved, sample(nano.model, nano.prompt))
    finally:
        folder_paths.folder_names_and_paths["vae_approx"][0].remove(str(tmp_path))
        folder_paths.filename_list_cache.pop("vae_approx", None)


def test_find_the_face_again(guided, nano, sample, face_model, pack, monkeypatch):
    """The faces are looked for at once and every second step, in the decoded estimates, and guided where they are
    found."""
    seen, places = [], []
    model = guided(find_every=2)[0]

    def found(self, image):
        landmarks = FFHQ_TEMPLATE / 4 + torch.tensor([len(seen) - 8.0, 5.0])
        seen.append(image)
        return [Face(torch.tensor([20.0, 20.0, 110.0, 120.0]), landmarks, 1.0)]

    def guide(ascend, x, denoised, sigma, faces):
        places.append([(face.place * 8).round().tolist() for face in faces])
        return real(ascend, x, denoised, sigma, faces)

    real = pack.nodes.guided_run.guide
    monkeypatch.setattr(pack.nodes.guided_run, "guide", guide)
    monkeypatch.setattr(type(face_model.model.detector), "detect", found)
    sample(model, nano.prompt, steps=5)
    assert [image.shape for image in seen] == [(3, 128, 128)] * 6  # two pictures at steps 1, 3 and 5
    first, second, third = [[57, 82], [58, 82]], [[59, 82], [60, 82]], [[61, 82], [62, 82]]
    assert places == [first, first, second, second, third]


def test_no_step_waits_for_a_value(guided, nano, sample, pack, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoHostReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "local_scalar_dense" not in str(function), "a value was read on the host"
            return function(*args, **kwargs or {})

    guide = pack.nodes.guided_run.Run.guide

    def watched(self, *args):
        with NoHostReads():
            return guide(self, *args)

    monkeypatch.setattr(pack.nodes.guided_run.Run, "guide", watched)
    sample(guided(iterations=2)[0], nano.prompt)


# Company


def test_either_order_with_other_patches(guided, nano, sample, apply, people):
    """Apply Identity, a post-CFG function and another wrapper of the prediction: before or after, all act the same."""
    from comfy.patcher_extension import WrappersMP

    def others(model):
        model = apply(people, model=model)
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", lambda executor, *a, **k: executor(*a, **k) * 0.95)
        return model

    def run(model):
        return sample(model, nano.prompt, cfg=2.0)

    after, before = others(guided()[0]), guided(model=others(nano.model))[0]
    assert torch.equal(run(after), run(before))
    for less in (others(nano.model), guided()[0], nano.model):
        assert not torch.equal(run(before), run(less))


def test_two_guidances_in_a_row(guided, nano, sample, people):
    swapped = replace(people, people=people.people[::-1])
    model, first = guided()
    model, second = guided(model=model, who=swapped)
    samples = sample(model, nano.prompt)
    curves = [record.of(samples).similarity for record in (first, second)]
    assert all(curves) and curves[0] != curves[1]


def test_content_controlnet(guided, nano, sample, nodes):
    from nodes import ControlNetApplyAdvanced

    control, lq = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0], torch.rand(2, 128, 128, 3)
    prompts = ControlNetApplyAdvanced().apply_controlnet(nano.prompt, nano.prompt, control, lq, 1.0, 0.0, 1.0)
    assert not torch.equal(sample(guided()[0], *prompts), sample(nano.model, *prompts))


def test_inpainting_mask(guided, nano):
    """What the mask keeps is kept to the bit; the rest is guided."""
    from comfy.sample import prepare_noise, sample

    latent, mask = torch.randn(2, 4, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1

    def run(model):
        noise = prepare_noise(latent, 1)
        return sample(
            model, noise, 2, 1.0, "euler", "normal", nano.prompt, nano.prompt, latent, denoise=1.0, noise_mask=mask
        )

    moved, plain = run(guided()[0]), run(nano.model)
    torch.testing.assert_close(moved[..., :8], latent[..., :8])
    assert torch.equal(moved[..., :8], plain[..., :8]) and not torch.equal(moved[..., 8:], plain[..., 8:])


def test_a_latent_smaller_than_the_crop(guided, nano):
    from nodes import common_ksampler

    def run(model):
        latent = {"samples": torch.zeros(2, 4, 4, 4)}
        return common_ksampler(model, 1, 2, 1.0, "euler", "normal", nano.prompt, nano.prompt, latent)[0]["samples"]

    moved = run(guided()[0])
    assert moved.isfinite().all() and not torch.equal(moved, run(nano.model))


@pytest.mark.parametrize("references", ["auto", "mean", "best"])
def test_several_references(guided, nano, sample, people, references):
    person = people.people[0]
    photos = F.normalize(torch.randn(3, 512), dim=1)
    several = replace(person, embeddings=photos, weights=torch.ones(3))
    model, record = guided(who=replace(people, people=(several,)), references=references)
    assert len(record.of(sample(model, nano.prompt)).similarity) == 2


# What the user sees


def test_plot_and_progress(guided, nano, sample, nodes, shown):
    model, record = guided()
    plot = nodes["RIDFR_GuidancePlot"].execute
    samples = sample(model, nano.prompt, steps=3)
    similarity = record.of(samples).similarity
    values = similarity[2]
    assert shown["RIDFR_IDPreservingSampling"] == f"step 3 of 3: similarity {values[0]:.3f}, {values[1]:.3f}"
    picture, text = plot(record, {"samples": samples}).args
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() < 0.2 and picture.max() == 1
    assert text.splitlines()[0] == f"picture 1: {similarity[0][0]:.3f} at step 1, {values[0]:.3f} at step 3"
    other = plot(guided(step_size=0)[1], {"samples": samples}).args
    assert other[1].splitlines()[0].startswith("Guidance is off") and not torch.equal(other[0], picture)
    assert other[1].splitlines()[1:] == ["No step was guided."]


def test_a_plot_belongs_to_its_latent(guided, nano, sample, nodes, shown):
    """Two samplers with one guided model, and only then the plots; a latent of another sampler, or of none."""
    model, record = guided()

    def report(latent):
        return nodes["RIDFR_GuidancePlot"].execute(record, {"samples": latent})[1]

    first, second = (sample(model, nano.prompt, steps=steps, seed=steps) for steps in (3, 2))
    assert [report(latent).splitlines()[0][-6:] for latent in (first, second)] == ["step 3", "step 2"]
    assert report(first).splitlines()[0].startswith(f"picture 1: {record.of(first).similarity[0][0]:.3f}")
    for unknown in (sample(nano.model, nano.prompt, steps=3), torch.zeros(1, 4, 16, 16), first[:1]):
        assert report(unknown).startswith("This latent is not the result of a run that the guidance knows")
        assert shown["RIDFR_GuidancePlot"] == report(unknown)
    assert not report(unknown).count("\n") and report(unknown).endswith("."), "one sentence"


def test_the_plot_knows_the_last_estimate_too(guided, nano, nodes):
    """Sampler Custom's second output; here the run ends before the noise does."""
    from comfy.samplers import sampler_object
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    model, record = guided()
    sampler, sigmas, latent = sampler_object("euler"), torch.tensor([10.0, 5.0, 2.0]), torch.zeros(2, 4, 16, 16)
    latents = SamplerCustom.execute(
        model, True, 1, 1.0, nano.prompt, nano.prompt, sampler, sigmas, {"samples": latent}
    ).args
    assert not torch.equal(latents[0]["samples"], latents[1]["samples"])
    texts = [nodes["RIDFR_GuidancePlot"].execute(record, latent)[1] for latent in latents]
    assert texts[0] == texts[1] and "at step 2" in texts[0]


def test_only_so_many_runs_are_kept(pack):
    module = pack.nodes.guidance_record
    record, latents = module.Record(), [torch.full((1, 4, 2, 2), float(i)) for i in range(2 * module.KEPT)]
    for i, latent in enumerate(latents):
        record.keep(module.Curve(i, []), latent)
    assert len(record.curves) == module.KEPT and record.of(latents[0]) is None
    assert record.of(latents[-1]).steps == len(latents) - 1


def test_an_interrupted_run_has_no_curve(guided, nano, sample, pack, monkeypatch):
    import comfy.model_management as management

    model, record = guided()
    interrupt = lambda self, wait=False: management.interrupt_current_processing()  # noqa: E731
    monkeypatch.setattr(pack.nodes.guided_run.Run, "show", interrupt)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, nano.prompt)
    assert not record.curves
