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
    assert files[0] == "nano" and "mine.bin" in files and "notes.txt" not in files
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
