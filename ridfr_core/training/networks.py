"""RIDFR's networks as diffusers has them: content ControlNet, decoupled cross-attention, identity adapter, LoRA."""

import re

import torch
from torch import Tensor, nn

from ..adapter import IdentityAdapter, decoupled_attention
from ..checkpoints import CheckpointError
from ..layouts import unet_to_ldm

PUBLISHED_LORA = re.compile(r"unet\.(.+)\.processor\.to_(q|k|v|out)_lora\.down\.weight")


class NoHint(nn.Module):
    """Stands where ControlNet encodes its hint: here the hint is already in the input's channels."""

    def forward(self, hint: Tensor) -> Tensor:
        return hint


def build_content(unet: nn.Module, lq_channels: int = 3) -> nn.Module:
    """RIDFR's content module: the UNet's encoder with more input channels for the LQ face, which start at zero.

    Returns a diffusers ControlNetModel in fp32 without a hint encoder (RIDFR section 3.2).
    """
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet).float()
    net.controlnet_cond_embedding = NoHint()
    narrow = net.conv_in
    net.conv_in = nn.Conv2d(narrow.in_channels + lq_channels, narrow.out_channels, 3, padding=1)
    with torch.no_grad():
        net.conv_in.weight.zero_()
        net.conv_in.weight[:, : narrow.in_channels] = narrow.weight
        net.conv_in.bias.copy_(narrow.bias)
    net.register_to_config(in_channels=net.conv_in.in_channels)
    return net


class IdentityAttention:
    """diffusers attention processor for RIDFR Eq. 3: text attention plus attention to K', V' of the identity.

    K', V' are not computed here but handed in through `cross_attention_kwargs={"identity": [(K', V'), ...]}`, one pair
    per layer, in the order of the checkpoints.
    """

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, identity=None):
        q, heads = attn.to_q(hidden_states), attn.heads
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = decoupled_attention(torch.zeros_like(q), q, k, v, heads, 1.0)
        if identity is not None:
            out = decoupled_attention(out, q, *identity[self.layer], heads, 1.0)
        return attn.to_out[0](out)


class PlainAttention:
    """A diffusers attention processor that is handed the identity too and ignores it (self-attention)."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, identity=None):
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


def let_identity_in(unet: nn.Module) -> nn.Module:
    """Give every cross-attention its place in the adapter: down, up, then mid, as IP-Adapter counts."""
    processors = unet.attn_processors
    if not any(isinstance(processor, IdentityAttention) for processor in processors.values()):
        places = {name: IdentityAttention(k) for k, name in enumerate(cross_attentions(unet))}
        unet.set_attn_processor({name: places.get(name) or PlainAttention(own) for name, own in processors.items()})
    return unet


def cross_attentions(unet: nn.Module) -> list[str]:
    """Names of the processors of the cross-attention layers, in the order of the checkpoints."""
    return [name for name in unet.attn_processors if "attn2" in name]


def widths(unet: nn.Module) -> tuple[int, ...]:
    """Of the cross-attention layers, in the order of the checkpoints."""
    names = [name.removesuffix(".processor") for name in cross_attentions(unet)]
    return tuple(len(unet.get_submodule(name).to_k.weight) for name in names)


def build_adapter(unet: nn.Module, **sizes) -> IdentityAdapter:
    """An untrained identity adapter for the UNet; K', V' start as the UNet's own K, V, as in IP-Adapter.

    sizes: of IdentityAdapter, but its channels.
    """
    state = unet.state_dict()
    names = [name.removesuffix(".processor") for name in cross_attentions(unet)]
    adapter = IdentityAdapter(channels=widths(unet), **sizes)
    with torch.no_grad():
        for layer, name in zip(adapter.ip_adapter.values(), names):
            layer.to_k_ip.weight.copy_(state[f"{name}.to_k.weight"])
            layer.to_v_ip.weight.copy_(state[f"{name}.to_v.weight"])
    return adapter


@torch.no_grad()
def merge_lora(unet: nn.Module, lora: dict[str, Tensor], strength: float) -> None:
    """Add `strength` times a LoRA to the weights of the UNet.

    lora: under the names of `adapter.lora_of`, or of the files NAME_lora.safetensors published beside FaceID.
    Raises CheckpointError: other names, or layers that the UNet has not.
    """
    weights = {f"diffusion_model.{name}": key for name, key in unet_to_ldm({k: k for k in unet.state_dict()}).items()}
    parameters = dict(unet.named_parameters())
    for name, down in lora.items():
        if name.endswith("up.weight"):
            continue
        if match := PUBLISHED_LORA.fullmatch(name):
            key = f"{match[1]}.{'to_out.0' if match[2] == 'out' else f'to_{match[2]}'}.weight"
        else:
            key = weights.get(name.replace(".lora_down.weight", ".weight"))
        if key not in parameters:
            raise CheckpointError(f"The adapter's LoRA has '{name}', which the base does not have: use the adapter "
                                  "and the LoRA that were made for it.")
        up = lora.get(name.removesuffix("down.weight") + "up.weight")
        if up is None or up.ndim != 2 or down.ndim != 2 or parameters[key].shape != (len(up), down.shape[1]) \
                or up.shape[1] != len(down):
            raise CheckpointError(f"The adapter's LoRA is not whole: of '{name}' the other half is missing or of "
                                  "another shape: download the file again.")
        parameters[key] += strength * (up.float() @ down.float()).to(parameters[key])


def from_ldm(module: nn.Module, rename, tensors: dict[str, Tensor], prefix: str = "", name: str = "this",
             whole: str = "a whole checkpoint of SD1.5") -> dict[str, Tensor]:
    """The diffusers state of `module` in fp32, out of tensors in the layout that `rename` writes.

    1x1 convolutions may be linear layers and the other way round. name, whole: of the file and what it should be, for
    the CheckpointError where tensors are missing or of another shape.
    """
    own, state = module.state_dict(), {}
    for key, stored in zip(own, rename(own)):
        found = tensors.get(prefix + stored)
        if found is None or _without_ones(found) != _without_ones(own[key]):
            raise CheckpointError(f"'{name}' has no {prefix + stored}, or one of another shape: use {whole}.")
        state[key] = found.float().reshape(own[key].shape)
    return state


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
