"""The frozen base and CLIP of training: read from diffusers folders and single files, offline."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ridfr_core.checkpoints import CheckpointError
from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
from ridfr_core.training import base as module
from ridfr_core.training.base import EMPTY_PROMPT, load_base
from ridfr_core.training.clip_vision import load_tower

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
