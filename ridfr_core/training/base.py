"""The frozen diffusion model that a content module or an identity adapter is trained for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointError, read
from ..errors import first_line
from ..layouts import unet_to_ldm, vae_to_ldm
from ..nano import WEIGHTS
from ..nano.config import SCHEDULE
from .clip_vision import check_finite, check_layers
from .networks import from_ldm

HEADS = {8: "sd15", 4: "nano"}
EMPTY_PROMPT = [49406] + [49407] * 76  # CLIP's start token, then SD1.5's padding
PREDICTIONS = ("epsilon", "v_prediction")
WIDEST = 8192  # a layer of SD1.5 has at most 1280 channels; nothing bigger is built because a file says so
SD15_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


@dataclass(frozen=True)
class Base:
    """unet, vae: diffusers networks. prompt: the empty prompt's tokens [1,T,D]. schedule: a diffusers DDPMScheduler.
    name: "sd15" or "nano"."""

    unet: nn.Module
    vae: nn.Module
    prompt: Tensor
    schedule: object
    name: str

    def to(self, device: torch.device, dtype: torch.dtype) -> "Base":
        for network in (self.unet, self.vae):
            nn.Module.to(network.requires_grad_(False).eval(), device, dtype)  # diffusers' own warns of nothing
        return Base(self.unet, self.vae, self.prompt.to(device, dtype), self.schedule, self.name)

    def context(self, batch: int) -> Tensor:
        return self.prompt.expand(batch, -1, -1)

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B,4,H/8,W/8] at unit variance of images in [0,1]; a sample where noise is given, else the mode."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        drawn = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return drawn.float() * self.vae.config.scaling_factor


def load_base(where: str) -> Base:
    """SD1.5 in fp32 from a diffusers folder or a single-file checkpoint, or "nano"; nothing is downloaded.

    Raises CheckpointError: neither, or another model than SD1.5.
    """
    path = WEIGHTS / "checkpoint.safetensors" if where == "nano" else Path(where)
    if path.is_dir():
        return _from_folder(path)
    return _from_file(path)


def _from_folder(folder: Path) -> Base:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    missing = [name for name in ("unet", "vae", "text_encoder", "scheduler") if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"'{folder}' has no folder {', '.join(missing)}: use a diffusers folder of SD1.5 (with "
                              "unet, vae, text_encoder, scheduler), or a single-file checkpoint.")
    half = any((folder / "unet").glob("*.fp16.safetensors")) and not (
        folder / "unet" / "diffusion_pytorch_model.safetensors").exists()

    unet = _load(UNet2DConditionModel, folder / "unet", half)
    heads = unet.config.attention_head_dim  # diffusers calls the number of heads so for SD1.5; SD2 has a list of them
    if unet.config.in_channels != 4 or unet.config.addition_embed_type or heads not in tuple(HEADS):
        raise CheckpointError(f"'{folder}' is not SD1.5: use a text-to-image checkpoint of SD1.5.")
    vae = _load(AutoencoderKL, folder / "vae", half)
    prompt = _empty_prompt(_load(CLIPTextModel, folder / "text_encoder", half))
    try:
        schedule = DDPMScheduler.from_pretrained(folder / "scheduler", clip_sample=False, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder / "scheduler", error) from error
    return Base(unet, vae, prompt, schedule, HEADS[heads])


def _load(kind, folder: Path, half: bool) -> nn.Module:
    """A network of diffusers or transformers in fp32. Raises CheckpointError where it cannot be read or lacks weights,
    of which these libraries would make random ones."""
    try:
        check_layers(folder)
        network, said = kind.from_pretrained(folder, variant="fp16" if half else None, local_files_only=True,
                                             output_loading_info=True)
    except Exception as error:  # one for each thing that may be wrong
        raise _unreadable(folder, error) from error
    if missing := sorted(said["missing_keys"]):
        raise CheckpointError(f"'{folder}' has no {missing[0]}: use a whole diffusers folder of SD1.5.")
    check_finite(network, folder)
    return network.float()


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"'{folder}' cannot be read ({first_line(error)}): use a whole diffusers folder of SD1.5.")


def _from_file(path: Path) -> Base:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    state, metadata = read(path)
    config = _said(metadata, path.name)  # of nano; other files have none
    heads, prediction = config.get("heads", 8), config.get("prediction", "epsilon")
    unet_sizes, vae_sizes = _unet_sizes(state, path.name), _vae_sizes(state, path.name)
    try:
        unet = UNet2DConditionModel(attention_head_dim=heads, layers_per_block=2, **unet_sizes)
        vae = AutoencoderKL(**vae_sizes, scaling_factor=0.18215)
    except (ValueError, ArithmeticError) as error:  # widths that the groups of its norms do not divide
        raise CheckpointError(f"'{path.name}' has layers of impossible widths ({first_line(error)}): use a whole "
                              "checkpoint of SD1.5.") from error
    unet.load_state_dict(from_ldm(unet, unet_to_ldm, state, "model.diffusion_model.", path.name))
    vae.load_state_dict(from_ldm(vae, vae_to_ldm, state, "first_stage_model.", path.name))
    schedule = DDPMScheduler(**SCHEDULE, prediction_type=prediction, clip_sample=False)
    if config:  # nano's text encoder says one thing, whatever the prompt
        prompt = _nano_prompt(state, unet_sizes["cross_attention_dim"], path.name)
    else:
        prompt = _empty_prompt(_text_encoder(state, path.name))
    return Base(unet, vae, prompt, schedule, HEADS[heads])


def _said(metadata: dict[str, str], name: str) -> dict:
    """What the metadata of a nano checkpoint say of it; {} where there is nothing. Raises CheckpointError."""
    try:
        config = json.loads(metadata.get("ridfr.config", "{}"))
        known = config == {} or (config["heads"] in tuple(HEADS) and config["prediction"] in PREDICTIONS)
    except (ValueError, RecursionError, TypeError, KeyError):
        known = False
    if not known:
        raise CheckpointError(f"'{name}' says what this version of the pack does not understand (ridfr.config in its "
                              "metadata): update the pack, or use a whole checkpoint of SD1.5.")
    return config


def _nano_prompt(state: dict[str, Tensor], width: int, name: str) -> Tensor:
    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    if key not in state or state[key].numel() != width:
        raise CheckpointError(f"'{name}' has no {key} of {width} numbers: use the nano checkpoint as it was shipped.")
    return state[key].float().view(1, 1, -1)


def _unet_sizes(state: dict[str, Tensor], name: str) -> dict:
    """Constructor arguments of the UNet, read off a checkpoint of SD1.5's topology."""
    prefix = "model.diffusion_model."
    convolutions = [f"{prefix}input_blocks.{i}.0.out_layers.3.weight" for i in (1, 4, 7, 10)]
    first = f"{prefix}input_blocks.0.0.weight"
    context = f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    ranks = {first: 4, context: 2} | dict.fromkeys(convolutions, 4)
    if not all(_has(state, key, rank) for key, rank in ranks.items()) or state[first].shape[1] != 4:
        raise CheckpointError(f"'{name}' is not a checkpoint of SD1.5 (it may be SDXL, an inpainting model or no "
                              "whole checkpoint): use a text-to-image checkpoint of SD1.5.")
    if state[context].shape[1] == 1024:
        raise CheckpointError(f"'{name}' is a checkpoint of SD2: use one of SD1.5.")
    widths = tuple(len(state[key]) for key in convolutions)
    return {"sample_size": 64, "block_out_channels": widths, "cross_attention_dim": state[context].shape[1]}


def _has(state: dict[str, Tensor], key: str, rank: int) -> bool:
    """Whether there is such a tensor, of the size that a layer may have."""
    return key in state and state[key].ndim == rank and all(0 < size <= WIDEST for size in state[key].shape)


def _vae_sizes(state: dict[str, Tensor], name: str) -> dict:
    prefix = "first_stage_model.encoder.down."
    widths = [len(state[key]) for i in range(4) if _has(state, key := f"{prefix}{i}.block.0.conv1.weight", 4)]
    if len(widths) != 4:
        raise CheckpointError(f"'{name}' has no VAE: use a checkpoint that has one.")
    layers = len({key.split(".")[5] for key in state if key.startswith(f"{prefix}0.block.")})
    return {"block_out_channels": tuple(widths), "layers_per_block": layers, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def _text_encoder(state: dict[str, Tensor], name: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = "cond_stage_model.transformer.text_model."
    model = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    weights, own = {}, model.state_dict()
    for key in own:
        stored = prefix + key.removeprefix("text_model.")  # transformers 4 has the prefix, 5 has not
        if stored not in state and not key.endswith("position_ids"):
            raise CheckpointError(f"'{name}' has no text encoder ({stored} is missing): use a whole checkpoint.")
        if stored in state:
            weights[key] = state[stored].float()
            if weights[key].shape != own[key].shape:
                raise CheckpointError(f"'{name}' has the text encoder of another model ({stored} is of another shape): "
                                      "use a checkpoint of SD1.5.")
    model.load_state_dict(weights, strict=False)
    return model


@torch.no_grad()
def _empty_prompt(text: nn.Module) -> Tensor:
    """[1,77,D]: what SD1.5 reads where there is no prompt."""
    return text.eval()(torch.tensor([EMPTY_PROMPT])).last_hidden_state
