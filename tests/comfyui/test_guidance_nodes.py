"""ID-Preserving Sampling in ComfyUI's own sampling, in this process, on random nano weights."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("inference_mode")

SETTINGS = dict(
    step_size=0.3,
    step_kind="relative to the noise",
    iterations=1,
    start_percent=0.0,
    end_percent=1.0,
    target=1.0,
    references="mean",
    no_face="take the usual place",
    decode="face",
    find_every=0,
)


@pytest.fixture(scope="module")
def people(identity, face_model):
    """The two people, as the face model would have extracted them."""
    return replace(identity, digest=face_model.model.digest)


@pytest.fixture
def guided(nodes, nano, face_model, people, shown):
    """guided(**settings) -> MODEL and record; the LQ image is one picture for all."""

    def guided(model=None, who=people, lq=None, vae=None, face=face_model, **settings):
        lq = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3)) if lq is None else lq
        node = nodes["RIDFR_IDPreservingSampling"]
        return node.execute(model or nano.model, vae or nano.vae, face, who, lq, **SETTINGS | settings).args

    return guided


@pytest.fixture
def runs(pack, monkeypatch):
    """Weak references to all runs, which hold the weights and the faces."""
    module, made = pack.nodes.guided_run, []
    start = module.Run.__init__

    def counted(self, *args):
        made.append(weakref.ref(self))
        start(self, *args)

    monkeypatch.setattr(module.Run, "__init__", counted)
    return made


def alive(runs) -> int:
    gc.collect()
    return sum(run() is not None for run in runs)


# What is computed


def in_diffusers(weights, network, convert, prefix):
    """A diffusers network with the weights of the checkpoint."""
    from safetensors.torch import load_file

    state = load_file(weights / "checkpoint.safetensors")
    names = convert({key: torch.full((1,), i) for i, key in enumerate(network.state_dict())})
    keys = list(network.state_dict())
    back = {keys[int(i)]: state[prefix + name] for name, i in names.items()}
    network.load_state_dict({k: v.view(network.state_dict()[k].shape) for k, v in back.items()})
    return network.eval().requires_grad_(False)


def guided_by_diffusers(weights, recogniser, references, landmarks, noise, prompt, update):
    """Eq. 7 in the second half of a DDIM loop of diffusers, in the paper's symbols, from pure noise at its level.

    update(eps, gradient): what is added to eps.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from ridfr_core.faces import align
    from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
    from ridfr_core.nano import config

    unet = in_diffusers(weights, UNet2DConditionModel(**config.UNET), unet_to_ldm, "model.diffusion_model.")
    vae = in_diffusers(weights, AutoencoderKL(**config.VAE), vae_to_ldm, "first_stage_model.")
    solver = DDIMScheduler(
        **config.SCHEDULE, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    solver.set_timesteps(4)
    z = noise * (1 - solver.alphas_cumprod[499]).sqrt()
    for t in solver.timesteps[2:]:  # 499, 249: at the first two, random networks amplify rounding errors
        alpha_bar = solver.alphas_cumprod[t]
        v = unet(z, t, prompt.expand(len(z), -1, -1)).sample
        eps = alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * z
        for _ in range(2):
            eps.requires_grad_()
            z0 = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            face = align(vae.decode(z0 / config.LATENT_SCALE).sample / 2 + 0.5, landmarks) * 2 - 1
            similarity = F.cosine_similarity(recogniser(face), references)
            (gradient,) = torch.autograd.grad(similarity.sum(), eps)
            eps = (eps + update(eps, gradient)).detach()
        v = (eps - (1 - alpha_bar).sqrt() * z) / alpha_bar.sqrt()
        z = solver.step(v, t, z).prev_sample
    return z / config.LATENT_SCALE


def rms(x):
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize(
    "kind, step_size, update",
    [
        ("raw, as in the paper", 10.0, lambda eps, gradient: 10 * gradient),
        ("relative to the noise", 0.03, lambda eps, gradient: 0.03 * rms(eps) * gradient / rms(gradient)),
    ],
    ids=["raw", "relative"],
)
def test_the_same_update_in_diffusers(guided, nano, people, face_model, weights, kind, step_size, update):
    """Euler's steps in sigma are DDIM's; the whole picture is decoded, since that is Eq. 7 without a short cut."""
    from comfy.sample import sample_custom
    from comfy.samplers import sampler_object

    from ridfr_core.recognition import load_iresnet

    g = torch.Generator().manual_seed(5)
    lq, noise = torch.rand(2, 128, 128, 3, generator=g), torch.randn(2, 4, 16, 16, generator=g)
    sigmas = nano.model.get_model_object("model_sampling").sigmas[torch.tensor([499, 249])]
    sigmas = torch.cat([sigmas, torch.zeros(1)])

    def comfy(model):
        latent = torch.zeros_like(noise)
        return sample_custom(model, noise, 1.0, sampler_object("euler"), sigmas, nano.prompt, nano.prompt, latent)

    ours = comfy(guided(lq=lq, step_kind=kind, step_size=step_size, iterations=2, decode="whole picture")[0])
    landmarks = face_model.model.detector.detect(lq[0].movedim(-1, 0))[0].landmarks
    with torch.inference_mode(False):
        recogniser = load_iresnet(weights / "insightface" / "models" / "nano" / "rec_nano.onnx")
        references = torch.cat([person.embeddings for person in people.people]).clone()
        theirs = guided_by_diffusers(
            weights,
            recogniser,
            references,
            landmarks.clone().expand(2, -1, -1),
            noise.clone(),
            nano.prompt[0][0].clone()[:, :1],
            update,
        )
    plain = comfy(nano.model)
    assert ((ours - theirs).square().mean() / theirs.square().mean()).sqrt() <= 1e-3
    assert ((ours - plain).square().mean() / plain.square().mean()).sqrt() >= 0.03


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
    assert list(record.similarity) == [0, 1] and record.steps == 2 and record.faces == [1, 2]


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
    run(model)
    values = record.similarity[0]
    target = sum(values) / 2  # one of the two is above it
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


def test_find_the_face_again(guided, nano, sample, face_model, monkeypatch):
    """The faces are looked for every second step, in whole decoded pictures."""
    seen = []
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: seen.append(image.shape) or detect(self, image))
    model = guided(find_every=2)[0]
    seen.clear()
    sample(model, nano.prompt, steps=5)
    assert seen == [(3, 128, 128)] * 4  # two pictures at steps 3 and 5


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
    sample(model, nano.prompt)
    assert first.similarity and second.similarity and first.similarity != second.similarity


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


# Memory, interrupts, errors


def test_everything_is_given_back(guided, nano, sample, runs):
    sample(guided()[0], nano.prompt)
    assert len(runs) == 1 and alive(runs) == 0


def test_interrupt_in_the_loop(guided, nano, sample, pack, runs, monkeypatch):
    import comfy.model_management as management

    ascend, calls = pack.nodes.guided_run.Run._ascend, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return ascend(self, *args)

    model = guided()[0]
    before = sample(model, nano.prompt)
    monkeypatch.setattr(pack.nodes.guided_run.Run, "_ascend", interrupted)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, nano.prompt)
    assert len(calls) == 2 and alive(runs) == 0
    assert torch.equal(sample(model, nano.prompt), before)


def test_out_of_memory_goes_on_with_less(guided, nano, sample, pack, runs, monkeypatch):
    """Two failures: the two next cheaper modes, each said once; the picture is that of the mode it ends with."""
    real, left = pack.nodes.guided_run.guide, [2]

    def scarce(*args):
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    model, record = guided(decode="whole picture")
    monkeypatch.setattr(pack.nodes.guided_run, "guide", scarce)
    moved = sample(model, nano.prompt)
    assert torch.equal(moved, sample(guided(decode="face, checkpointed")[0], nano.prompt))
    assert record.fallbacks == [
        "Out of memory with the decode mode 'whole picture': going on with 'face'.",
        "Out of memory with the decode mode 'face': going on with 'face, checkpointed'.",
    ]
    sample(model, nano.prompt)
    assert record.fallbacks == [], "of an earlier run"
    left[0] = 99
    with pytest.raises(ValueError, match="not enough memory to guide, even with .*bf16.*: close other programs"):
        sample(model, nano.prompt)
    assert alive(runs) == 0


def test_nan_from_the_model(guided, nano, sample, runs):
    broken = nano.model.clone()

    def function(apply_model, args):
        out = apply_model(args["input"], args["timestep"], **args["c"])
        out[1] = float("nan")
        return out

    broken.set_model_unet_function_wrapper(function)
    with pytest.raises(ValueError, match=r"prediction for picture 2 is not a number \(NaN\) at step 1: lower CFG"):
        sample(guided(model=broken)[0], nano.prompt)
    assert alive(runs) == 0


def test_flow_models_and_foreign_vaes(guided, nano):
    import comfy.model_sampling as kinds

    class Flow(kinds.ModelSamplingDiscreteFlow, kinds.CONST):
        pass

    flow = nano.model.clone()
    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="moves the predicted noise, and this model .*: use one that does, such as"):
        guided(model=flow)
    with pytest.raises(ValueError, match="The VAE has 16 latent channels for pictures but the model has 4"):
        guided(vae=SimpleNamespace(latent_channels=16, latent_dim=2))


def test_epsilon_models(guided, nano, sample):
    import comfy.model_sampling as kinds

    class Epsilon(kinds.ModelSamplingDiscrete, kinds.EPS):
        pass

    model = nano.model.clone()
    model.add_object_patch("model_sampling", Epsilon())
    assert not torch.equal(sample(guided(model=model)[0], nano.prompt), sample(model, nano.prompt))


def test_a_recogniser_without_gradients(guided, nano, sample, pack, face_model, weights, runs):
    core = pack.ridfr_core.face_model
    onnx = core.OnnxRecogniser(weights / "insightface" / "models" / "nano" / "rec_nano.onnx")
    blind = replace(face_model, model=replace(face_model.model, recogniser=onnx))
    with pytest.raises(ValueError, match="recogniser passes no gradient: use a face model with an ArcFace ResNet"):
        sample(guided(face=blind)[0], nano.prompt)
    assert alive(runs) == 0


def test_an_identity_of_another_recogniser(guided, identity):
    with pytest.raises(ValueError, match="use the same face model for both"):
        guided(who=identity)


def test_pictures_that_do_not_go_together(guided, nano, sample):
    with pytest.raises(ValueError, match="The identity has 2 people and there are 3 LQ images"):
        guided(lq=torch.rand(3, 128, 128, 3))
    with pytest.raises(ValueError, match="has 2 faces but the latent batch has 3 images: give as many"):
        sample(guided()[0], nano.prompt, batch=3)
    with pytest.raises(ValueError, match="LQ image is 128x64 but the latent is for 128x128: connect the picture"):
        sample(guided(lq=torch.rand(1, 64, 128, 3))[0], nano.prompt)


def test_no_face_in_the_lq_image(guided, nano, sample, face_model, monkeypatch, shown):
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: detect(self, image) if image.mean() > 0.3 else [])
    lq = torch.rand(2, 128, 128, 3) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    plain = sample(nano.model, nano.prompt)
    model, record = guided(lq=lq)
    assert record.notes == ["No face was found in LQ image 2: its usual place is taken."]
    assert record.notes[0] in shown.values()
    assert all(not torch.equal(a, b) for a, b in zip(sample(model, nano.prompt), plain, strict=True))
    model, record = guided(lq=lq, no_face="leave the picture alone")
    moved = sample(model, nano.prompt)
    assert record.notes == ["No face was found in LQ image 2: it is not guided."] and record.faces == [1]
    assert torch.equal(moved[1], plain[1]) and not torch.equal(moved[0], plain[0])
    model, record = guided(lq=lq * 0.1, no_face="leave the picture alone")
    assert torch.equal(sample(model, nano.prompt), plain) and not record.similarity


def test_a_picture_that_is_left_alone_is_not_searched_again(guided, nano, sample, face_model, monkeypatch):
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: [] if image.mean() < 0.1 else detect(self, image))
    lq = torch.rand(2, 128, 128, 3) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    model, record = guided(lq=lq, no_face="leave the picture alone", find_every=1)
    monkeypatch.setattr(detector, "detect", detect)
    moved = sample(model, nano.prompt, steps=3)
    assert torch.equal(moved[1], sample(nano.model, nano.prompt, steps=3)[1])
    assert [len(values) for values in record.similarity.values()] == [1, 1, 1]


@pytest.mark.parametrize("references", ["auto", "mean", "best"])
def test_several_references(guided, nano, sample, people, references):
    person = people.people[0]
    photos = F.normalize(torch.randn(3, 512), dim=1)
    several = replace(person, embeddings=photos, weights=torch.ones(3))
    model, record = guided(who=replace(people, people=(several,)), references=references)
    sample(model, nano.prompt)
    assert len(record.similarity) == 2


# What the user sees


def test_plot_and_progress(guided, nano, sample, nodes, shown):
    model, record = guided()
    plot = nodes["RIDFR_GuidancePlot"].execute
    _, text = plot(record, {"samples": torch.zeros(1, 4, 16, 16)}).args
    assert text == "No step was guided."
    samples = sample(model, nano.prompt, steps=3)
    values = record.similarity[2]
    assert shown["RIDFR_IDPreservingSampling"] == f"step 3 of 3: similarity {values[0]:.3f}, {values[1]:.3f}"
    picture, text = plot(record, {"samples": samples}).args
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() < 0.2 and picture.max() == 1
    assert text.splitlines()[0] == f"picture 1: {record.similarity[0][0]:.3f} at step 1, {values[0]:.3f} at step 3"
    other = plot(guided(step_size=0)[1], {"samples": samples}).args
    assert "Guidance is off" in other[1] and not torch.equal(other[0], picture)


def test_the_record_is_of_the_last_run(guided, nano, sample):
    model, record = guided()
    sample(model, nano.prompt, steps=3)
    sample(model, nano.prompt, steps=1)
    assert list(record.similarity) == [0] and record.steps == 1
