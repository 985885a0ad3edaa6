"""The nodes in ComfyUI's own sampling, in this process, on random nano weights: trained ones could hide an error."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="session")
def weights(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, "-m", "tests.nano_random", folder], cwd=checkout, check=True)
    return folder


@pytest.fixture(scope="module")
def nodes(pack, weights):
    """Every node class by its id."""
    before, pack.nodes.paths.WEIGHTS = pack.nodes.paths.WEIGHTS, weights
    pack.nodes.paths.register_folders()
    extension = asyncio.run(pack.comfy_entrypoint())
    yield {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    pack.nodes.paths.WEIGHTS = before


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI runs nodes; without it gradient bugs hide."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def nano(nodes):
    """MODEL, CLIP, VAE, CLIP_VISION and the empty prompt."""
    with torch.inference_mode():
        model, clip, vae, vision = nodes["RIDFR_LoadNanoModels"].execute().args
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    return SimpleNamespace(model=model, clip=clip, vae=vae, vision=vision, prompt=prompt)


@pytest.fixture(scope="module")
def adapter(nodes):
    return nodes["RIDFR_LoadIdentityAdapter"].execute("nano", "auto")[0]


@pytest.fixture(scope="module")
def identity(pack):
    """Two people, one photo each, with random features."""
    g = torch.Generator().manual_seed(7)
    core = pack.ridfr_core.identity
    people = tuple(
        core.Person(
            F.normalize(torch.randn(1, 512, generator=g), dim=1), torch.randn(1, 65, 128, generator=g), torch.ones(1)
        )
        for _ in range(2)
    )
    return core.Identity(people, torch.randn(65, 128, generator=g), "digest", torch.zeros(2, 3, 112, 112))


def sample(model, positive, negative=None, batch=2, steps=2, cfg=1.0, seed=1, sampler="uni_pc_bh2"):
    """KSampler's latents [batch,4,16,16]."""
    from nodes import common_ksampler

    latent = {"samples": torch.zeros(batch, 4, 16, 16)}
    negative = positive if negative is None else negative
    return common_ksampler(model, seed, steps, cfg, sampler, "normal", positive, negative, latent)[0]["samples"]


@pytest.fixture
def apply(nodes, nano, adapter):
    def apply(identity, strength=1.0, start=0.0, end=1.0, model=None):
        return nodes["RIDFR_ApplyIdentity"].execute(model or nano.model, adapter, identity, strength, start, end)[0]

    return apply


# Loading


def test_loading_runs_no_network(nodes, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    nodes["RIDFR_LoadNanoModels"].execute()
    for loader in ("RIDFR_LoadFaceModel", "RIDFR_LoadContentControlNet"):
        nodes[loader].execute("nano")
    nodes["RIDFR_LoadIdentityAdapter"].execute("nano", "auto")


def test_nano_vae_and_unet_compute_what_diffusers_computes(nano, weights):
    """The checkpoint's width, depth and number of heads are understood."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file

    from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
    from ridfr_core.nano import config

    state = load_file(weights / "checkpoint.safetensors")

    def load(module, convert, prefix):
        names = convert({key: torch.full((1,), i) for i, key in enumerate(module.state_dict())})
        back = {list(module.state_dict())[int(i)]: state[prefix + name] for name, i in names.items()}
        module.load_state_dict({k: v.view(module.state_dict()[k].shape) for k, v in back.items()})
        return module.eval()

    unet = load(UNet2DConditionModel(**config.UNET), unet_to_ldm, "model.diffusion_model.")
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([9.0, 800.0]), torch.randn(2, 3, config.CONTEXT)
    ours = nano.model.model.diffusion_model(x, t, context)
    torch.testing.assert_close(ours, unet(x, t, context).sample, rtol=1e-4, atol=1e-5)

    vae = load(AutoencoderKL(**config.VAE), vae_to_ldm, "first_stage_model.")
    z = torch.randn(1, 4, 16, 16)
    picture = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(nano.vae.decode(z), picture, rtol=1e-4, atol=1e-5)
    encoded = vae.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(nano.vae.encode(picture), encoded, rtol=1e-3, atol=1e-4)


def test_clip_visions_config_is_the_trained_one(checkout, pack):
    """ComfyUI 0.18 takes a CLIP vision model's config as a file only."""
    file = checkout / "ridfr_core" / "nano" / "weights" / "clip_vision.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    assert config == {"model_type": "clip_vision_model", **pack.ridfr_core.nano.config.CLIP_VISION}


def test_nano_predicts_v(nano, pack):
    from comfy.model_base import ModelType

    assert pack.ridfr_core.nano.config.PREDICTION == "v_prediction"
    assert nano.model.model.model_type == ModelType.V_PREDICTION


def test_nano_prompts_all_say_the_same(nano, weights):
    from safetensors.torch import load_file

    bias = load_file(weights / "checkpoint.safetensors")[
        "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    ]
    for text in ("", "a photo of a (cat:1.2)"):
        prompt = nano.clip.encode_from_tokens_scheduled(nano.clip.tokenize(text))[0][0]
        torch.testing.assert_close(prompt, bias.expand_as(prompt), rtol=0, atol=2e-3)  # weights in half precision


def test_users_files_are_found_beside_nano(pack, nodes, tmp_path):
    import folder_paths

    face = tmp_path / "insightface" / "models" / "buffalo_l"
    face.mkdir(parents=True)
    (face / "det_10g.onnx").touch()
    (tmp_path / "insightface" / "models" / "no_model").mkdir()
    folder_paths.add_model_folder_path("insightface", str(tmp_path / "insightface"))
    folder_paths.add_model_folder_path("ipadapter", str(tmp_path))
    (tmp_path / "mine.bin").touch()
    (tmp_path / "notes.txt").touch()
    names = pack.nodes.paths.face_models()
    assert names[:2] == ["nano", "nano_judge"] and "buffalo_l" in names and "no_model" not in names
    files = pack.nodes.paths.model_files("ipadapter")
    assert files[0] == "nano" and "mine.bin" in files and "notes.txt" not in files
    assert pack.nodes.paths.face_model_folder("buffalo_l") == face
    with pytest.raises(FileNotFoundError, match="no face model 'antelopev2' in .*insightface"):
        pack.nodes.paths.face_model_folder("antelopev2")


def test_a_folder_of_another_pack_keeps_its_extensions(pack, monkeypatch):
    import folder_paths

    known = {"ipadapter": (["/elsewhere"], {".weights"}), "insightface": (["/all"], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    pack.nodes.paths.register_folders()
    folders, extensions = known["ipadapter"]
    assert folders[0] == "/elsewhere" and len(folders) == 2 and {".weights", ".safetensors", ".bin"} <= extensions
    assert known["insightface"][1] == set()  # all files


@pytest.mark.parametrize(
    "file, version, shortcut",
    [
        ("ip-adapter-faceid-plus_sd15.bin", "auto", False),
        ("ip-adapter-faceid-plusv2_sd15.bin", "auto", True),
        ("mine.safetensors", "auto", True),
        ("mine.safetensors", "plus", False),
        ("ip-adapter-faceid-plus_sd15.bin", "plus v2", True),
    ],
)
def test_plus_and_plus_v2(nodes, pack, weights, tmp_path, monkeypatch, file, version, shortcut):
    from safetensors.torch import load_file

    state = load_file(weights / "identity_adapter.safetensors")
    torch.save(state, tmp_path / file)
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)
    assert nodes["RIDFR_LoadIdentityAdapter"].execute(file, version)[0].shortcut == shortcut


# The attention


def attend(q, k, v, heads):
    """Multi-head softmax(QK^T/sqrt(d))V, written out, in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("people", [1, 3])
def test_patch_is_decoupled_attention(pack, people):
    """Three images, negative and positive chunk: person i for image i, nobody for the negative chunk."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, length, 32, generator=g) for length in (10, 7, 7))
    keys, values = (torch.randn(people + 1, 4, 32, generator=g) for _ in range(2))
    patch = pack.nodes.id_attention.IdentityAttention(keys, values, 0.7)
    out = patch(q, k, v, {"n_heads": 2, "attn_precision": None, "cond_or_uncond": [1, 0], "sigmas": torch.ones(3)})
    rows = [people] * 3 + (list(range(3)) if people == 3 else [0] * 3)
    expected = attend(q, k, v, 2) + 0.7 * attend(q, keys[rows], values[rows], 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_layer_fires_at_every_step(pack, nano, apply, adapter, identity, monkeypatch):
    fired = Counter()
    call = pack.nodes.id_attention.IdentityAttention.__call__

    def counted(self, q, k, v, extra_options):
        fired[extra_options["block"] + (extra_options["block_index"],)] += 1
        return call(self, q, k, v, extra_options)

    monkeypatch.setattr(pack.nodes.id_attention.IdentityAttention, "__call__", counted)
    sample(apply(identity), nano.prompt, steps=3)
    assert fired == dict.fromkeys(adapter.adapter.layers, 3)
    assert len(fired) == 16 and fired["middle", 0, 0] == 3


@pytest.mark.parametrize("strength, start, end", [(0.0, 0.0, 1.0), (1.0, 0.5, 0.5), (1.0, 0.8, 0.2)])
def test_no_strength_or_no_time_is_no_change(nano, apply, identity, strength, start, end):
    plain = sample(nano.model, nano.prompt)
    assert torch.equal(sample(apply(identity, strength, start, end), nano.prompt), plain)
    assert not torch.equal(sample(apply(identity), nano.prompt), plain)


def test_start_and_end(nano, apply, identity):
    """The only step of a one-step run lies at the start."""

    def one_step(model):
        return sample(model, nano.prompt, steps=1, sampler="euler")

    assert not torch.equal(one_step(nano.model), one_step(apply(identity)))
    assert torch.equal(one_step(nano.model), one_step(apply(identity, start=0.5)))
    assert torch.equal(one_step(apply(identity)), one_step(apply(identity, end=0.5)))


def test_start_and_end_add_up(nano, apply, identity):
    """The two parts of the run, one after the other in a chain, are the whole."""
    parts, whole = apply(identity, start=0.4, model=apply(identity, end=0.4)), apply(identity)
    torch.testing.assert_close(sample(parts, nano.prompt, steps=4), sample(whole, nano.prompt, steps=4))


def test_chained_strengths_add_up(nano, apply, identity):
    chained = sample(apply(identity, 0.5, model=apply(identity, 0.7)), nano.prompt)
    torch.testing.assert_close(chained, sample(apply(identity, 1.2), nano.prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [None, 0])
def test_another_packs_patch_is_kept(nano, apply, identity, index):
    """A patch that doubles the text attention, under either kind of key, goes on doing so and is moved."""

    class Doubled:
        moved = 0

        def __call__(self, q, k, v, extra_options):
            return 2 * attend(q, k, v, extra_options["n_heads"]).to(q)

        def to(self, target):
            Doubled.moved += 1
            return self

    doubled = nano.model.clone()
    doubled.set_model_attn2_replace(Doubled(), "middle", 0, index)
    both, plain = sample(apply(identity, 1e-6, model=doubled), nano.prompt), sample(nano.model, nano.prompt)
    torch.testing.assert_close(both, sample(doubled, nano.prompt), rtol=1e-3, atol=1e-3)
    assert Doubled.moved and (both - plain).abs().max() > 0.01


@pytest.mark.parametrize("index", [None, 0])
def test_no_patch_hides_ours(nano, apply, identity, adapter, pack, index):
    """ComfyUI takes the patch of (block, id, index) if there is one, else that of (block, id)."""
    patched = nano.model.clone()
    patched.set_model_attn2_replace(lambda q, k, v, extra_options: q, "middle", 0, index)
    patches = apply(identity, model=patched).model_options["transformer_options"]["patches_replace"]["attn2"]
    for place in adapter.adapter.layers:
        assert isinstance(patches.get(place, patches.get(place[:2])), pack.nodes.id_attention.IdentityAttention)


def test_each_image_gets_its_person(nano, apply, identity):
    """Image i of a batch is what it would be with person i alone."""
    both = sample(apply(identity), nano.prompt)
    for i in range(2):
        alone = sample(apply(replace(identity, people=identity.people[i : i + 1])), nano.prompt)
        torch.testing.assert_close(both[i], alone[i])
        assert (both[i] - alone[1 - i]).abs().max() > 0.01


def test_negative_chunk_has_nobody(nano, apply, identity):
    """The negative chunk is as with a person of zero embedding and the CLIP states of the zero image."""
    import comfy.model_management
    from comfy.conds import CONDRegular
    from comfy.samplers import calc_cond_batch

    cond = [{"model_conds": {"c_crossattn": CONDRegular(nano.prompt[0][0])}, "uuid": "0"}]
    x, sigma = torch.randn(2, 4, 16, 16), torch.full((2,), 5.0)

    def denoised(identity, conds):
        model = apply(identity)
        comfy.model_management.load_models_gpu([model])
        model.pre_run()
        return calc_cond_batch(model.model, conds, x, sigma, model.model_options)

    positive, negative = denoised(identity, [cond, cond])
    assert (positive - negative).abs().max() > 0.01
    nobody = replace(identity.people[0], embeddings=torch.zeros(1, 512), clip=identity.clip_uncond[None])
    expected = denoised(replace(identity, people=(nobody,)), [cond])[0]
    torch.testing.assert_close(negative, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(positive, denoised(identity, [cond])[0], rtol=1e-4, atol=1e-4)


def test_the_same_photo_twice_is_the_photo_once(nano, apply, identity):
    person = identity.people[0]
    twice = replace(person, embeddings=person.embeddings.repeat(2, 1), clip=person.clip.repeat(2, 1, 1))
    once = [sample(apply(replace(identity, people=(p,))), nano.prompt) for p in (person, twice)]
    torch.testing.assert_close(*once, rtol=1e-4, atol=1e-4)


def test_more_people_than_images(nano, apply, identity):
    with pytest.raises(ValueError, match=r"identity has 2 people but the latent batch has 3 images"):
        sample(apply(identity), nano.prompt, batch=3)


def test_identity_survives_unloading(nano, apply, identity):
    import comfy.model_management

    before = sample(apply(identity), nano.prompt)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(apply(identity), nano.prompt), before)


def test_sdxl_adapter_on_sd15(nodes, nano, pack, identity):
    """A narrow adapter with SDXL's 70 layers."""
    core = pack.ridfr_core.adapter
    sdxl = pack.nodes.managed.ManagedAdapter(
        "sdxl.bin", core.IdentityAdapter((64,) * 70, 64, 128, depth=1), True, pack.nodes.managed.managed
    )
    with pytest.raises(ValueError, match=r"sdxl.bin is for SDXL .* but the model is for SD1.5 .*load an adapter"):
        nodes["RIDFR_ApplyIdentity"].execute(nano.model, sdxl, identity, 1.0, 0.0, 1.0)


def test_identity_of_another_clip(apply, identity):
    wide = replace(identity.people[0], clip=torch.zeros(1, 257, 1280))
    with pytest.raises(ValueError, match="needs a CLIP vision model of width 128 but .* width 1280"):
        apply(replace(identity, people=(wide,)))


# The content ControlNet


def test_content_controlnet(nodes, nano):
    """It acts; strength 0 is no ControlNet at all; one LQ image serves a batch; it survives a second run and CFG."""
    from nodes import ControlNetApplyAdvanced

    control = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
    lq = torch.rand(2, 128, 128, 3)

    def controlled(image, strength, cfg=1.0):
        prompts = ControlNetApplyAdvanced().apply_controlnet(
            nano.prompt, nano.prompt, control, image, strength, 0.0, 1.0
        )
        return sample(nano.model, *prompts, cfg=cfg)

    plain, full = sample(nano.model, nano.prompt), controlled(lq, 1.0)
    assert torch.equal(controlled(lq, 0.0), plain)
    assert (full - plain).abs().max() > 0.1
    assert torch.equal(controlled(lq, 1.0), full)
    torch.testing.assert_close(controlled(lq[:1], 1.0)[0], full[0])
    torch.testing.assert_close(controlled(lq, 1.0, cfg=2.0), full, rtol=1e-3, atol=1e-3)
    rgba = torch.cat([lq, torch.rand(2, 128, 128, 1)], -1)
    assert torch.equal(controlled(rgba, 1.0), full)
    grey = lq[..., :1]
    assert torch.equal(controlled(grey, 1.0), controlled(grey.expand(-1, -1, -1, 3), 1.0))


def test_content_goes_with_identity(nodes, nano, apply, identity):
    """ComfyUI calls the ControlNet's attention without patches: the identity acts in the UNet alone."""
    from nodes import ControlNetApplyAdvanced

    control = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
    lq = torch.rand(2, 128, 128, 3)
    prompts = ControlNetApplyAdvanced().apply_controlnet(nano.prompt, nano.prompt, control, lq, 1.0, 0.0, 1.0)
    both = sample(apply(identity), *prompts)
    assert not torch.equal(both, sample(apply(identity), nano.prompt))
    assert not torch.equal(both, sample(nano.model, *prompts))


# Identities from pictures


@pytest.fixture(scope="module")
def face_model(nodes):
    return nodes["RIDFR_LoadFaceModel"].execute("nano")[0]


@pytest.mark.parametrize("batch, people", [("all photos show one person", 1), ("each photo is another person", 3)])
def test_extract_identity(nodes, nano, face_model, pack, batch, people):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 3, 5)[0]
    identity = nodes["RIDFR_ExtractIdentity"].execute(face_model, nano.vision, photos, batch)[0]
    assert len(identity.people) == people and identity.digest == face_model.model.digest
    embeddings = torch.cat([person.embeddings for person in identity.people])
    clip = torch.cat([person.clip for person in identity.people])
    assert embeddings.shape == (3, 512) and clip.shape == (3, 65, 128)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))

    core = pack.ridfr_core
    images = photos.movedim(-1, 1)
    landmarks = core.identity.reference_faces(face_model.model, images)
    crops = core.faces.align(images, landmarks, 224).movedim(1, -1)
    torch.testing.assert_close(clip, nano.vision.encode_image(crops).penultimate_hidden_states)
    assert not torch.allclose(clip[0], clip[1])


def test_zero_image_is_zero_after_normalisation(nano, pack, weights):
    """As transformers' CLIP has it for zero pixel values."""
    from safetensors.torch import load_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**pack.ridfr_core.nano.config.CLIP_VISION)).eval()
    clip.load_state_dict(load_file(weights / "clip_vision.safetensors"))
    expected = clip(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2][0]
    states = pack.nodes.identity.zero_image_states(nano.vision)
    torch.testing.assert_close(states, expected, rtol=0, atol=5e-3)  # weights in half precision
    black = nano.vision.encode_image(torch.zeros(1, 64, 64, 3)).penultimate_hidden_states[0]
    assert (states - black).abs().max() > 0.1


@pytest.fixture
def compare(nodes, face_model, pack, monkeypatch):
    """Compare Identity of two batches; `compare.shown` is the text that appears on the node."""
    node = nodes["RIDFR_CompareIdentity"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="9"))

    def compare(a, b):
        return node.execute(face_model, a, b)

    compare.shown = {}
    server = SimpleNamespace(send_progress_text=lambda text, node: compare.shown.update({node: text}))
    monkeypatch.setattr(pack.nodes.identity.PromptServer, "instance", server, raising=False)
    return compare


def test_compare_identity(nodes, compare):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    out = compare(photos, photos)
    assert out[0] == pytest.approx(1.0, abs=1e-5) and len(out[1].splitlines()) == 3
    assert out.ui["similarity"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert compare.shown == {"9": out[1]}
    assert len(compare(photos, photos[:1]).ui["similarity"]) == 2
    with pytest.raises(ValueError, match="The first input has 2 images and the second has 3"):
        compare(photos, photos[[0, 1, 0]])


def test_compare_identity_reports_a_missing_face(nodes, compare, face_model, monkeypatch):
    """The random detector finds a face in every picture: here it is made to miss the black one."""
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: detect(self, image) if image.any() else [])
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0].clone()
    photos[1] = 0
    out = compare(photos, photos[:1])
    assert out.ui["similarity"] == [pytest.approx(1.0, abs=1e-5), None]
    assert out[0] == pytest.approx(1.0, abs=1e-5) and out[1].splitlines()[2] == "image 2: no face found"
    assert compare(photos[:1], photos[1:]).ui["similarity"] == [None]


# Pictures


def test_degrade_face(nodes):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    knobs = {"blur": (1, 3), "scale": (2, 8), "noise": (0, 10), "quality": (50, 90)}
    bounds = {f"{name}_{end}": v for name, pair in knobs.items() for end, v in zip(("min", "max"), pair, strict=True)}
    first, again, other = (nodes["RIDFR_DegradeFace"].execute(photos, seed=s, **bounds)[0] for s in (1, 1, 2**64 - 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == photos.shape and first.min() >= 0 and first.max() <= 1
    assert 0.01 < (first - photos).square().mean().sqrt() < 0.3


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_color_fix(nodes, method):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    fix = nodes["RIDFR_ColorFix"].execute
    torch.testing.assert_close(fix(photos, photos, method, 5)[0], photos, rtol=0, atol=1e-5)
    small = F.interpolate(photos.movedim(-1, 1), size=(32, 32), mode="area").movedim(1, -1)
    fixed = fix(photos * 0.7, small[:1], method, 5)[0]
    assert fixed.shape == photos.shape
    assert fixed[0].mean().item() == pytest.approx(photos[0].mean().item(), abs=0.02)


def test_nano_portraits_of_the_test_split(nodes, pack):
    people = pack.ridfr_core.nano.portraits.SPLITS["test"]
    a, b = (nodes["RIDFR_NanoPortraits"].execute(first, 2, 3)[0] for first in (0, 1))
    assert a.shape == (2, 128, 128, 3) and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    with pytest.raises(ValueError, match=f"There are {len(people)} people"):
        nodes["RIDFR_NanoPortraits"].execute(len(people) - 1, 2, 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba(nodes, channels):
    """Grey counts as RGB with equal channels, an alpha channel is left out."""
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 1, 5)[0]
    rgb = photos if channels == 4 else photos.mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    odd = torch.cat([rgb, torch.rand(1, 128, 128, 1)], -1) if channels == 4 else rgb[..., :1]
    fixed = [nodes["RIDFR_ColorFix"].execute(image, photos, "wavelet", 5)[0] for image in (rgb, odd)]
    assert torch.equal(*fixed)
