"""The frozen base and CLIP of training: read from diffusers folders and single files, offline."""

import json
import shutil

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ridfr_core.checkpoints import CheckpointError, read
from ridfr_core.errors import RidfrError
from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
from ridfr_core.nano import WEIGHTS
from ridfr_core.training import base as module
from ridfr_core.training.base import EMPTY_PROMPT, load_base
from ridfr_core.training.clip_vision import load_tower
from ridfr_core.training.networks import merge_lora
from ridfr_core.training.run import check_adapter, load_adapter, load_content

TEXT = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(32, 32, 64, 64), cross_attention_dim=64, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return unet, vae, CLIPTextModel(CLIPTextConfig(**TEXT)).eval()


@pytest.fixture(scope="module")
def prompt(parts):
    with torch.no_grad():
        return parts[2](torch.tensor([EMPTY_PROMPT])).last_hidden_state


def single_file(parts, path, without=()):
    unet, vae, text = parts
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_to_ldm(unet.state_dict()).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_to_ldm(vae.state_dict()).items()}
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + k.removeprefix("text_model."): v for k, v in text.state_dict().items()}
    kept = {k: v.clone().contiguous() for k, v in tensors.items() if not k.startswith(tuple(without))}
    save_file(kept, path)
    return str(path)


def same(network, other):
    state = other.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_a_diffusers_folder(parts, prompt, tmp_path):
    for part, name in zip(parts, ("unet", "vae", "text_encoder")):
        part.save_pretrained(tmp_path / name)
    DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    base = load_base(str(tmp_path))
    assert same(base.unet, parts[0]) and same(base.vae, parts[1]) and base.name == "sd15"
    assert base.schedule.config.prediction_type == "v_prediction"
    torch.testing.assert_close(base.prompt, prompt)


def test_a_single_file(parts, prompt, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SD15_TEXT", TEXT)
    base = load_base(single_file(parts, tmp_path / "sd.safetensors"))
    assert same(base.unet, parts[0]) and same(base.vae, parts[1]) and base.name == "sd15"
    assert base.schedule.config.prediction_type == "epsilon"
    torch.testing.assert_close(base.prompt, prompt)
    with torch.no_grad():
        z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 3, 64)
        torch.testing.assert_close(base.unet(z, t, context).sample, parts[0](z, t, context).sample)
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 64)
        latents = parts[1].encode(image * 2 - 1).latent_dist.mode() * 0.18215
    torch.testing.assert_close(base.latents(image), latents)


def test_the_embedded_base():
    base = load_base("nano")
    assert base.name == "nano" and base.prompt.shape == (1, 1, 128)
    assert base.schedule.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "without, message",
    [
        (["cond_stage_model."], "has no text encoder"),
        (["first_stage_model."], "has no VAE"),
        (["model.diffusion_model.input_blocks.10"], "is not a checkpoint of SD1.5"),
    ],
)
def test_a_file_that_lacks_a_part_says_which(parts, tmp_path, without, message):
    with pytest.raises(CheckpointError, match=f"'sd.safetensors' {message}"):
        load_base(single_file(parts, tmp_path / "sd.safetensors", without))


def test_a_folder_that_lacks_a_part_says_which(parts, tmp_path):
    parts[0].save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="has no folder vae, text_encoder, scheduler"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("config", [{"attention_head_dim": [4, 4, 8, 8]}, {"in_channels": 9}])
def test_a_folder_of_sd2_or_of_inpainting_is_refused(tmp_path, config):
    for name in ("vae", "text_encoder", "scheduler"):
        (tmp_path / name).mkdir()
    sizes = dict(block_out_channels=(32, 32, 64, 64), cross_attention_dim=64, attention_head_dim=8)
    UNet2DConditionModel(**sizes | config).save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="is not SD1.5: use a text-to-image checkpoint of SD1.5"):
        load_base(str(tmp_path))


def test_clip_from_a_folder_and_from_a_file_with_its_config(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)
    tower = CLIPVisionModelWithProjection(config).eval()
    tower.save_pretrained(tmp_path / "folder")
    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="'clip.safetensors' is not the CLIP vision model it should be"):
        load_tower(str(tmp_path / "clip.safetensors"))
    (tmp_path / "clip.json").write_text(config.to_json_string())
    assert same(load_tower(str(tmp_path / "folder")), tower)
    assert same(load_tower(str(tmp_path / "clip.safetensors")), tower)


@pytest.fixture
def folder(parts, tmp_path):
    for part, name in zip(parts, ("unet", "vae", "text_encoder")):
        part.save_pretrained(tmp_path / "sd" / name)
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "sd" / "scheduler")
    return tmp_path / "sd"


def spoil_tensors(file, change):
    tensors = load_file(file)
    change(tensors, next(iter(tensors)))
    save_file(tensors, file)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("how", ["empty", "words", "missing", "nan", "shape"])
def test_a_folder_with_something_wrong_is_a_sentence(folder, name, how):
    part = folder / name
    weights = next(part.glob("*.safetensors"), None)
    config = next(part.glob("*config.json"))
    if how == "empty":
        (weights or config).write_bytes(b"")
    elif how == "words":
        config.write_text("[]" if weights else "{]")
    elif weights is None:
        shutil.rmtree(part)
        part.mkdir()
    else:
        spoil_tensors(weights, {"missing": lambda t, key: t.pop(key),
                                "nan": lambda t, key: t.update({key: t[key] * torch.nan}),
                                "shape": lambda t, key: t.update({key: t[key][None].contiguous()})}[how])
    with pytest.raises(CheckpointError, match=f"'.*{name}' (cannot be read|has no|holds NaN)") as refused:
        load_base(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, key", [("unet", "layers_per_block"), ("vae", "layers_per_block"),
                                       ("text_encoder", "num_hidden_layers")])
def test_a_config_that_asks_for_millions_of_layers_is_refused(folder, name, key):
    file = folder / name / "config.json"
    config = json.loads(file.read_text())
    assert key in config
    file.write_text(json.dumps(config | {key: 100_000_000}))
    with pytest.raises(CheckpointError, match=f"'.*{name}' cannot be read .its config says {key} = 100000000.: use"):
        load_base(str(folder))


def odd(tensors, chance):
    """Changes one tensor, or takes it away."""
    key = sorted(tensors)[chance.integers(len(tensors))]
    changes = [lambda t: None, lambda t: t[None], lambda t: torch.zeros(()), lambda t: torch.zeros(0),
               lambda t: t.flatten(), lambda t: torch.cat([t, t]), lambda t: t.new_zeros(*t.shape[:-1], 0)]
    changed = changes[chance.integers(len(changes))](tensors[key])
    return {k: v for k, v in tensors.items() if k != key} | ({} if changed is None else {key: changed.contiguous()})


TELLING = ("model.diffusion_model.input_blocks.0.0.weight",
           "model.diffusion_model.input_blocks.4.0.out_layers.3.weight",
           "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
           "first_stage_model.encoder.down.1.block.0.conv1.weight",
           "cond_stage_model.transformer.text_model.final_layer_norm.bias")


@pytest.mark.parametrize("name, load", [
    ("checkpoint", load_base), ("clip_vision", load_tower), ("identity_adapter", load_adapter),
    ("content_controlnet", lambda where: load_content(where, load_base("nano"))),
])
def test_damaged_weights_end_in_a_sentence(tmp_path, name, load):
    tensors, metadata = read(WEIGHTS / f"{name}.safetensors")
    if (WEIGHTS / f"{name}.json").exists():
        shutil.copy(WEIGHTS / f"{name}.json", tmp_path / "x.json")
    chance = numpy.random.default_rng(0)
    spoilt = [odd(tensors, chance) for _ in range(12)]
    spoilt += [tensors | {key: torch.zeros(4)} for key in TELLING if key in tensors] + [{}]
    for state in spoilt:
        save_file(state, tmp_path / "x.safetensors", metadata)
        try:
            load(str(tmp_path / "x.safetensors"))
        except RidfrError as error:
            assert "\n" not in str(error)
        else:
            assert state.keys() == tensors.keys()  # what still fits, such as one dimension of length 1 more


@pytest.mark.parametrize("config", ["{", "[" * 10_000, "[]", '{"heads": 3, "prediction": "epsilon"}', '{"heads": 4}',
                                    '{"heads": 4, "prediction": "guess"}', '{"heads": [4], "prediction": "epsilon"}'])
def test_a_checkpoint_that_says_odd_things_of_itself_is_refused(tmp_path, config):
    tensors, _ = read(WEIGHTS / "checkpoint.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"ridfr.config": config})
    with pytest.raises(CheckpointError, match="'x.safetensors' says what this version of the pack does not understand"):
        load_base(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 100_000_000}, {"num_attention_heads": 7}, {"hidden_size": "wide"}, {"patch_size": 0},
    {"image_size": 10**9}, {"image_size": -1}, {"num_attention_heads": 0}, {"hidden_act": "none such"}, [], "text",
])
def test_a_config_beside_the_clip_weights_is_not_trusted(tmp_path, change):
    shutil.copy(WEIGHTS / "clip_vision.safetensors", tmp_path / "x.safetensors")
    config = json.loads((WEIGHTS / "clip_vision.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    with pytest.raises(CheckpointError, match="'x.(json|safetensors)' is not the "):
        load_tower(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("change", [
    lambda lora, down, up: lora.pop(up), lambda lora, down, up: lora.update({up: lora[up][0]}),
    lambda lora, down, up: lora.update({down: lora[down][:, :3]}),
    lambda lora, down, up: lora.update({up: lora[up][:, :1]}),
    lambda lora, down, up: lora.update({down: torch.zeros(())}),
])
def test_half_a_lora_is_refused(change):
    unet = load_base("nano").unet
    name = next(key for key in unet.state_dict() if key.endswith("attn1.to_q.weight"))
    published = next(new for new, old in unet_to_ldm({k: k for k in unet.state_dict()}).items() if old == name)
    stem = "diffusion_model." + published.removesuffix(".weight")
    down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    rows, columns = unet.state_dict()[name].shape
    lora = {down: torch.ones(2, columns), up: torch.ones(rows, 2)}
    before = unet.state_dict()[name].clone()
    merge_lora(unet, lora, 1.0)
    torch.testing.assert_close(unet.state_dict()[name], before + 2)
    change(lora, down, up)
    with pytest.raises(CheckpointError, match="The adapter's LoRA (is not whole|has)"):
        merge_lora(unet, lora, 1.0)


def test_an_adapter_of_another_base_or_clip_is_refused():
    base, (adapter, _) = load_base("nano"), load_adapter("nano")
    check_adapter(adapter, base, adapter.clip_dim, "nano")
    with pytest.raises(CheckpointError, match="'nano' reads CLIP features of width 128, but the CLIP"):
        check_adapter(adapter, base, 1280, "nano")
    adapter.channels = (320,) * 16
    with pytest.raises(CheckpointError, match="'nano' is made for another base than nano"):
        check_adapter(adapter, base, adapter.clip_dim, "nano")
