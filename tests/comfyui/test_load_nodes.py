"""The loader nodes in this process, on random nano weights."""

import json

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_loading_runs_no_network(nodes, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    nodes["RIDFR_LoadNanoModels"].execute()
    for loader in ("RIDFR_LoadFaceModel", "RIDFR_LoadContentControlNet"):
        nodes[loader].execute("nano")
    nodes["RIDFR_LoadIdentityAdapter"].execute("nano", "auto")


def test_networks_have_their_weights_with_dynamic_vram(nodes, monkeypatch):
    """ComfyUI's default on NVIDIA, where its layers have no weights before their file is loaded."""
    import comfy.memory_management
    from comfy.ops import manual_cast

    def load():
        adapter = nodes["RIDFR_LoadIdentityAdapter"].execute("nano", "auto")[0].adapter
        content = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0].control_model
        return {**adapter.state_dict(), **content.state_dict()}

    expected = load()
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    assert manual_cast.Linear(1, 1).weight is None, "this ComfyUI does it another way: test that one"
    loaded = load()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


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

    for name in ("antelopev2", "buffalo_l"):
        face = tmp_path / "insightface" / "models" / name
        face.mkdir(parents=True)
        (face / "det_10g.onnx").touch()
    (tmp_path / "insightface" / "models" / "no_model").mkdir()
    folder_paths.add_model_folder_path("insightface", str(tmp_path / "insightface"))
    folder_paths.add_model_folder_path("ipadapter", str(tmp_path))
    (tmp_path / "mine.bin").touch()
    (tmp_path / "notes.txt").touch()
    names = pack.nodes.paths.face_models()
    assert names == ["buffalo_l", "antelopev2", "nano", "nano_judge"]  # real ones first, none that has no model
    slot = next(slot for slot in nodes["RIDFR_LoadFaceModel"].define_schema().inputs if slot.id == "pack")
    assert slot.options == names and slot.default == "buffalo_l"
    files = pack.nodes.paths.model_files("ipadapter")
    assert files[-1] == "nano" and "mine.bin" in files and "notes.txt" not in files
    assert pack.nodes.paths.face_model_folder("buffalo_l") == face
    with pytest.raises(ValueError, match="no face model 'buffalo_s' in .*insightface"):
        pack.nodes.paths.face_model_folder("buffalo_s")


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
        ("ip_adapter_faceid_plus_sd15.bin", "auto", False),
        ("IP-Adapter_FaceID-Plus_SDXL.bin", "auto", False),
        ("ip_adapter_faceid_plus_v2_sd15.bin", "auto", True),
        ("faceid.plusv2_sdxl.bin", "auto", True),
        ("mine.safetensors", "auto", True),
        ("mine.safetensors", "plus", False),
        ("ip-adapter-faceid-plus_sd15.bin", "plus v2", True),
    ],
)
def test_plus_and_plus_v2(nodes, pack, weights, tmp_path, monkeypatch, shown, file, version, shortcut):
    from safetensors.torch import load_file

    state = load_file(weights / "identity_adapter.safetensors")
    torch.save(state, tmp_path / file)
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)
    assert nodes["RIDFR_LoadIdentityAdapter"].execute(file, version)[0].shortcut == shortcut
    kind = "FaceID PlusV2" if shortcut else "FaceID Plus"
    assert shown["RIDFR_LoadIdentityAdapter"].startswith(f"{kind} for SD1.5 with prompts of width 128; its LoRA: none")


@pytest.fixture
def adapter_file(pack, weights, tmp_path, monkeypatch):
    """adapter_file(name, change, metadata) -> a file in the folder that the loader looks in."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)

    def write(name, change=None, metadata=None):
        state = load_file(weights / "identity_adapter.safetensors") | (change or {})
        save_file({key: weight.contiguous() for key, weight in state.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


def test_what_training_writes_tells_the_version_and_the_face_model(nodes, adapter_file, face_model):
    adapter_file("mine.safetensors", metadata={"ridfr.shortcut": "False", "ridfr.recogniser": "abc"})
    loaded = nodes["RIDFR_LoadIdentityAdapter"].execute("mine.safetensors", "auto")[0]
    assert not loaded.shortcut and loaded.recogniser == "abc" and not loaded.raw
    adapter_file("copy.safetensors")
    copy = nodes["RIDFR_LoadIdentityAdapter"].execute("copy.safetensors", "auto")[0]
    assert copy.recogniser == face_model.model.digest, "its width tells that it is nano's"
    raw = adapter_file("ip-adapter-faceid-portrait_sdxl_unnorm.safetensors")
    assert nodes["RIDFR_LoadIdentityAdapter"].execute(raw.name, "auto")[0].raw


def test_an_adapter_keeps_the_precision_of_its_file(nodes, adapter_file, weights, adapter, apply, identity, nano):
    from safetensors.torch import load_file

    half = {key: w.half() for key, w in load_file(weights / "identity_adapter.safetensors").items()}
    path = adapter_file("half.safetensors", half, {"ridfr.recogniser": identity.digest})
    loaded = nodes["RIDFR_LoadIdentityAdapter"].execute("half.safetensors", "auto")[0]
    assert {p.dtype for p in loaded.adapter.parameters()} == {torch.float16}
    assert loaded.patcher.model_size() <= path.stat().st_size
    person = identity.people[0]
    tokens = [one.adapter.tokens(person.embeddings, person.clip) for one in (loaded, adapter)]
    torch.testing.assert_close(*tokens, rtol=0.02, atol=0.02)


def test_half_a_lora_inside_is_refused(nodes, adapter_file):
    name = "ip_adapter.31.to_q_lora.up.weight"
    adapter_file("mine.safetensors", {name: torch.ones(64, 2)})
    with pytest.raises(ValueError, match="'mine.safetensors' lacks .*to_q.lora_down.weight"):
        nodes["RIDFR_LoadIdentityAdapter"].execute("mine.safetensors", "auto")


def test_instantids_adapter_is_named(nodes, pack, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    core = pack.ridfr_core.adapter
    state = core.IdentityAdapter([64] * 70, 64, 512, id_dim=None, tokens=16, depth=1, width=128).state_dict()
    save_file(state, tmp_path / "ip-adapter.safetensors")
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)
    with pytest.raises(ValueError, match="'ip-adapter.safetensors' holds InstantID's adapter"):
        nodes["RIDFR_LoadIdentityAdapter"].execute("ip-adapter.safetensors", "auto")


def test_a_file_that_was_written_anew_is_loaded_anew(nodes, adapter_file):
    """Also a LoRA that came later."""
    def mark():
        return nodes["RIDFR_LoadIdentityAdapter"].fingerprint_inputs("mine.safetensors", "auto")

    path = adapter_file("mine.safetensors")
    first = mark()
    assert mark() == first
    adapter_file("mine.safetensors", metadata={"longer": "than before"})
    second = mark()
    path.with_name("mine_lora.safetensors").write_bytes(b"lora")
    third = mark()
    path.with_name("mine_lora.safetensors").write_bytes(b"changed")
    assert len({first, second, third, mark()}) == 4


@pytest.mark.parametrize("with_identity", [False, True])
def test_core_trains_a_lora_on_nano(nano, apply, identity, with_identity):
    from comfy_extras.nodes_train import TrainLoraNode

    model = apply(identity, mask=torch.ones(1, 8, 8), start=0.1) if with_identity else nano.model
    options = {
        "batch_size": 2, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 1e-3, "rank": 2,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "none", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }
    latents = [{"samples": torch.randn(2, 4, 16, 16)}]
    lora, losses, _ = TrainLoraNode.execute(
        model=[model], latents=latents, positive=[nano.prompt], **{name: [value] for name, value in options.items()}
    ).args
    assert len(losses["loss"]) == 2 and all(loss == loss for loss in losses["loss"])
    assert any("lora_up" in key for key in lora)


def test_nano_is_loaded_again_for_another_device(nano):
    """What core's multi-GPU nodes ask for: weights of its own."""
    for part in (nano.model, nano.clip.patcher, nano.vae.patcher):
        make, arguments = part.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        assert type(again.model) is type(part.model) and again.model is not part.model
        theirs, ours = again.model.state_dict(), part.model.state_dict()
        assert theirs.keys() == ours.keys()
        assert part is nano.clip.patcher or all(torch.equal(theirs[key], ours[key]) for key in ours)
