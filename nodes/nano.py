"""The nano networks as ComfyUI's own MODEL, CLIP, VAE and CLIP_VISION.

The checkpoint has SD1.5's single-file layout at small width. ComfyUI's detection knows the published widths only, so
the objects are built here from the same classes, without adding to its table of models.
"""

import re

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_detection
import comfy.model_management as management
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from torch import Tensor

from ..ridfr_core import checkpoints
from ..ridfr_core.nano.config import HEADS, PREDICTION
from . import paths

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
PREDICTIONS = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}


class NanoLatents(comfy.latent_formats.SD15):
    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None  # SD1.5's is for other latents


class NanoSD15(comfy.supported_models.SD15):
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}
    latent_format = NanoLatents

    def model_type(self, state_dict, prefix=""):
        return PREDICTIONS[PREDICTION]


def load_checkpoint() -> tuple[CoreModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    state, _ = checkpoints.read(paths.WEIGHTS / "checkpoint.safetensors")
    config = NanoSD15(comfy.model_detection.detect_unet_config(state, UNET))
    model, clip, vae = _diffusion_model(config, state), _text_encoder(config, state), _vae(state)
    for part, patcher in enumerate((model, clip.patcher, vae.patcher)):
        patcher.cached_patcher_init = (load_again, (part,))
    return model, clip, vae


def load_again(part: int, disable_dynamic: bool = False) -> ModelPatcher:
    """One of load_checkpoint's three with weights of its own, which core's training and multi-GPU nodes ask for."""
    state, _ = checkpoints.read(paths.WEIGHTS / "checkpoint.safetensors")
    config = NanoSD15(comfy.model_detection.detect_unet_config(state, UNET))
    if part == 0:
        return _diffusion_model(config, state, ModelPatcher if disable_dynamic else CoreModelPatcher)
    return (_text_encoder(config, state, disable_dynamic) if part == 1 else _vae(state)).patcher


def load_clip_vision() -> comfy.clip_vision.ClipVisionModel:
    state, _ = checkpoints.read(paths.WEIGHTS / "clip_vision.safetensors")
    vision = comfy.clip_vision.ClipVisionModel(str(paths.WEIGHTS / "clip_vision.json"))
    vision.load_sd(state)
    return vision


def _diffusion_model(
    config: NanoSD15, state: dict[str, Tensor], patcher_class: type[ModelPatcher] = CoreModelPatcher
) -> ModelPatcher:
    device = management.get_torch_device()
    dtypes = config.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state, UNET),
        supported_dtypes=dtypes,
        weight_dtype=comfy.utils.weight_dtype(state, UNET),
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    model = config.get_model(state, UNET, device=management.unet_offload_device())
    patcher = patcher_class(model, load_device=device, offload_device=management.unet_offload_device())
    model.load_model_weights(state, UNET, assign=patcher.is_dynamic())
    return patcher


def _text_encoder(config: NanoSD15, state: dict[str, Tensor], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP without layers. The file has its last norm alone, of gain 0, so every prompt becomes that norm's bias."""
    width = len(state[f"{TEXT}final_layer_norm.bias"])
    text = config.process_clip_state_dict(
        {
            **state,
            f"{TEXT}embeddings.token_embedding.weight": torch.zeros(49408, width),
            f"{TEXT}embeddings.position_embedding.weight": torch.zeros(77, width),
        }
    )
    size = {"hidden_size": width, "projection_dim": width, "num_hidden_layers": 0}
    return comfy.sd.CLIP(
        config.clip_target(),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=text,
        state_dict=text,
        model_options={"clip_l_model_config": size},
        disable_dynamic=disable_dynamic,
    )


def _vae(state: dict[str, Tensor]) -> comfy.sd.VAE:
    vae = comfy.utils.state_dict_prefix_replace(dict(state), {VAE: ""}, filter_keys=True)
    width = vae["encoder.conv_in.weight"].shape[0]
    levels = _count(vae, r"encoder\.down\.(\d+)\.")
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "attn_resolutions": [],
        "ch": width,
        "ch_mult": [vae[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // width for i in range(levels)],
        "num_res_blocks": _count(vae, r"encoder\.down\.0\.block\.(\d+)\."),
    }
    return comfy.sd.VAE(sd=vae, config={"params": {"ddconfig": shape, "embed_dim": 4}})


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})
