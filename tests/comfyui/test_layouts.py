"""Weights converted from diffusers' layout compute in ComfyUI what they compute in diffusers."""

import pytest
import torch

from ridfr_core.layouts import unet_to_ldm, vae_to_ldm


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def shuffled(module, seed=0):
    """The module with all weights random, also those that start at zero or one, so that each one matters."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=1 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.5)
    return module.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_unet_computes_the_same(comfy, layers):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers import UNet2DConditionModel

    ours = shuffled(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 128, 128),
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=4,
            cross_attention_dim=128,
        )
    )
    theirs = UNetModel(
        image_size=16,
        in_channels=4,
        model_channels=64,
        out_channels=4,
        num_res_blocks=[layers] * 4,
        channel_mult=(1, 2, 2, 2),
        transformer_depth=[1] * 3 * layers + [0] * layers,
        transformer_depth_output=[1] * 3 * (layers + 1) + [0] * (layers + 1),
        transformer_depth_middle=1,
        num_heads=4,
        use_spatial_transformer=True,
        context_dim=128,
        operations=comfy.ops.manual_cast,
    )
    theirs.load_state_dict(unet_to_ldm(ours.state_dict()))
    x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 128), torch.tensor([3.0, 700.0])
    with torch.inference_mode():
        assert relative_error(theirs(x, t, context), ours(x, t, context).sample) < 1e-5


def test_unet_has_the_keys_of_a_checkpoint(comfy):
    """Detection reads the nano widths off the converted keys, as it does for any SD1.5 file."""
    from comfy.model_detection import detect_unet_config
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(block_out_channels=(64, 128, 128, 128), cross_attention_dim=128, attention_head_dim=4)
    config = detect_unet_config(unet_to_ldm(unet.state_dict()), "")
    assert (config["model_channels"], list(config["channel_mult"]), config["context_dim"]) == (64, [1, 2, 2, 2], 128)
    assert config["transformer_depth"] == [1] * 6 + [0] * 2 and not config["use_linear_in_transformer"]


@pytest.mark.parametrize(("widths", "layers"), [((32, 32, 64, 128), 1), ((32, 64), 2)])
def test_vae_computes_the_same(comfy, widths, layers):
    from comfy.ldm.models.autoencoder import AutoencoderKL as ComfyVAE
    from diffusers import AutoencoderKL

    ours = shuffled(
        AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
        )
    )
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": layers,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    theirs = ComfyVAE(ddconfig=ddconfig, embed_dim=4).eval()
    theirs.load_state_dict(vae_to_ldm(ours.state_dict()))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        latent = ours.encode(image).latent_dist.mode()
        assert relative_error(theirs.encode(image), latent) < 1e-5
        assert relative_error(theirs.decode(latent), ours.decode(latent).sample) < 1e-5
