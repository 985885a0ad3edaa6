"""Nano weight files with random weights: the layout of the shipped ones, for tests that need no trained network."""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ridfr_core.adapter import IdentityAdapter
from ridfr_core.content import ContentSpec, controlnet_to_ldm
from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
from ridfr_core.nano import config


def write(folder: Path, seed: int = 0) -> None:
    """Everything but the face models."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save(checkpoint(), folder / "checkpoint.safetensors")
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.CLIP_VISION))
    save(vision.state_dict(), folder / "clip_vision.safetensors")
    (folder / "clip_vision.json").write_text(json.dumps({"model_type": "clip_vision_model", **config.CLIP_VISION}))
    save(
        IdentityAdapter(channels(), config.CONTEXT, config.CLIP_VISION["hidden_size"]).state_dict(),
        folder / "identity_adapter.safetensors",
    )
    save(content_controlnet(), folder / "content_controlnet.safetensors", ContentSpec(base="nano").to_metadata())


def checkpoint() -> dict:
    parts = {
        "model.diffusion_model.": unet_to_ldm(UNet2DConditionModel(**config.UNET).state_dict()),
        "first_stage_model.": vae_to_ldm(AutoencoderKL(**config.VAE).state_dict()),
        "cond_stage_model.transformer.text_model.final_layer_norm.": {
            "weight": torch.zeros(config.CONTEXT),
            "bias": torch.randn(config.CONTEXT),
        },
    }
    return {prefix + key: weight for prefix, state in parts.items() for key, weight in state.items()}


def content_controlnet() -> dict:
    unet = UNet2DConditionModel(**config.UNET)
    net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    net.conv_in = torch.nn.Conv2d(7, net.conv_in.out_channels, 3, padding=1)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            torch.nn.init.normal_(parameter, std=0.05)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("controlnet_cond_embedding")}
    return controlnet_to_ldm(state)


def channels() -> tuple[int, ...]:
    """Widths of SD1.5's 16 cross-attention layers at nano width, in checkpoint order: down, up, mid."""
    one, two, three, four = config.UNET["block_out_channels"]
    return (one, one, two, two, three, three) + (three,) * 3 + (two,) * 3 + (one,) * 3 + (four,)


def save(state: dict, path: Path, metadata: dict | None = None) -> None:
    save_file({key: weight.detach().contiguous().clone() for key, weight in state.items()}, path, metadata)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
