"""Key layouts of Stable Diffusion weights: diffusers' modules -> the ldm layout of single-file checkpoints.

The block structure is read off the keys, so any width, depth and number of levels converts. diffusers itself packages
only the other direction (`from_single_file`).
"""

import re
from collections.abc import Mapping

from torch import Tensor

# No network has a hundred blocks; a file whose names say so is not trusted (nor are digits of other scripts).
BLOCK = re.compile(
    r"(down|up)_blocks\.(\d{1,2})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,2})\.(.+)", re.ASCII
)

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    **{f"mid_block.resnets.{i}.{k}": f"middle_block.{2 * i}.{v}" for i in (0, 1) for k, v in RESNET.items()},
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE = {
    **{f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in (0, 1)},
    **{f"mid_block.attentions.0.{k}": f"mid.attn_1.{v}" for k, v in VAE_ATTENTION.items()},
    "conv_norm_out": "norm_out",
}


def unet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UNet2DConditionModel -> ldm UNet keys, without the `model.diffusion_model.` prefix of a checkpoint.

    A diffusers ControlNetModel shares the encoder half of these keys (see `content.controlnet_to_ldm`).
    """
    layers = len({m[1] for key in state_dict if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key))})
    attending = {m[1] for key in state_dict if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}

    def rename(key: str) -> str:
        if not (match := BLOCK.match(key)):
            return replace_prefix(key, UNET)
        side, level, kind, i, rest = match.groups()
        first = (layers + 1) * int(level) + (side == "down")  # input block 0 is the first convolution
        half = "input_blocks" if side == "down" else "output_blocks"
        if kind == "resnets":
            return f"{half}.{first + int(i)}.0.{replace_prefix(rest, RESNET)}"
        if kind == "attentions":
            return f"{half}.{first + int(i)}.1.{rest}"
        if kind == "downsamplers":
            return f"{half}.{first + layers}.0.{replace_prefix(rest, {'conv': 'op'})}"
        return f"{half}.{first + layers}.{2 if level in attending else 1}.{rest}"

    return {rename(key): weight for key, weight in state_dict.items()}


def vae_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AutoencoderKL -> ldm keys, without the `first_stage_model.` prefix of a checkpoint.

    The mid attention's linear weights [C, C] become 1x1 convolutions [C, C, 1, 1].
    """
    levels = len({m[1] for key in state_dict if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key))})

    def rename(key: str) -> str:
        half, _, key = key.partition(".")
        if not (match := BLOCK.match(key)):
            return f"{half}.{replace_prefix(key, VAE)}"
        side, level, kind, i, rest = match.groups()
        place = f"{half}.{side}.{int(level) if side == 'down' else levels - 1 - int(level)}"
        if kind == "resnets":
            return f"{place}.block.{i}.{replace_prefix(rest, {'conv_shortcut': 'nin_shortcut'})}"
        return f"{place}.{side}sample.{rest}"

    out = {rename(key): weight for key, weight in state_dict.items()}
    linear = {key for key in out if ".mid.attn_1." in key and out[key].ndim == 2}
    return {key: weight[:, :, None, None] if key in linear else weight for key, weight in out.items()}


def replace_prefix(key: str, table: Mapping[str, str]) -> str:
    """`key` with the first module prefix that `table` knows replaced; unknown keys stay."""
    for old, new in table.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    return key
