"""Content ControlNets on ComfyUI's CONTROL_NET: the LQ image joins the noisy latent as more input channels."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.latent_formats
import comfy.model_detection
import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor

from ..ridfr_core.checkpoints import check_tensors, lacks
from ..ridfr_core.content import CONV_IN, ContentSpec
from ..ridfr_core.nano.config import HEADS as NANO_HEADS
from .border import rgb
from .managed import eager

# What the tensors do not tell, as in comfy.supported_models
BASES = {
    "sd15": {"num_heads": 8},
    "sd21": {"num_head_channels": 64, "attn_precision": torch.float32},
    "sdxl": {"num_head_channels": 64},
    "nano": {"num_heads": NANO_HEADS},
}
NAMES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL", "nano": "the nano models"}
SDXL_LATENTS, SD_LATENTS = comfy.latent_formats.SDXL, comfy.latent_formats.SD15


class ContentNet(comfy.cldm.cldm.ControlNet):
    """ComfyUI's ControlNet network, which says so if the diffusion model is of another family. name: of its file."""

    def __init__(self, spec: ContentSpec, name: str, **config):
        super().__init__(**config)
        self.spec, self.name, self.context_dim = spec, name, config["context_dim"]

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None, **kwargs
    ) -> dict[str, list[Tensor]]:
        """Residuals for the UNet's skips and middle. Raises ValueError if the prompts [B,T,D] have another width."""
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"The content ControlNet '{self.name}' is for {NAMES[self.spec.base]} and reads prompts of width "
                f"{self.context_dim}, but the model's have width {context.shape[-1]}: load one that was made for this "
                "model, or the model that it was made for."
            )
        return self.residuals(x, hint, timesteps, context, y)

    def residuals(self, x, hint, timesteps, context, y) -> dict[str, list[Tensor]]:
        return super().forward(x, hint, timesteps, context, y)


class ConcatNet(ContentNet):
    """Without the hint encoder: the input is cat(z_t, LQ at latent size)."""

    def __init__(self, *args, **config):
        super().__init__(*args, **config)
        del self.input_hint_block

    def residuals(self, x, hint, timesteps, context, y) -> dict[str, list[Tensor]]:
        h = self.spec.concat(x, comfy.utils.repeat_to_batch_size(hint, len(x)))
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        output = []
        for block, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = block(h, emb, context)
            output.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        return {"middle": [self.middle_block_out(h, emb, context)], "output": output}


def content_control(state: dict[str, Tensor], spec: ContentSpec, name: str = "this") -> comfy.controlnet.ControlNet:
    """A stock CONTROL_NET of a content ControlNet in ldm keys; name: of its file, for errors.

    Raises CheckpointError if tensors are missing, too many or of other shapes than the rest.
    """
    device = management.get_torch_device()
    dtype = management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(state))
    manual_cast = management.unet_manual_cast(dtype, device)
    config = detected(state, name) | BASES[spec.base]
    config |= {
        "hint_channels": 3,
        "dtype": dtype,
        "device": management.unet_offload_device(),
        "operations": eager(comfy.ops.pick_operations(dtype, manual_cast, disable_fast_fp8=True)),
    }
    net = (ContentNet if spec.kind == "hint" else ConcatNet)(spec, name, **config)
    check_tensors(state, net.state_dict(), "content-controlnet", name)
    net.load_state_dict(state)
    # Without latent_format ComfyUI resizes the image to compression_ratio * latent size; with it, to the size that its
    # VAE encodes to latent size. It does so once per run.
    latents = SDXL_LATENTS if spec.base == "sdxl" else SD_LATENTS
    control = comfy.controlnet.ControlNet(
        net,
        compression_ratio=8 if spec.kind == "hint" else 1,
        latent_format=latents() if spec.kind == "latent" else None,
        load_device=device,
        manual_cast_dtype=manual_cast,
        # a VAE takes images in [0,1]
        preprocess_image=rgb if spec.kind == "latent" else lambda image: spec.to_range(rgb(image)),
    )
    control.upscale_algorithm = spec.kernel
    return control


def detected(state: dict[str, Tensor], name: str) -> dict:
    """The network's sizes, read off the tensors by ComfyUI's detection."""
    try:
        config = comfy.model_detection.detect_unet_config(state, "")
    except KeyError as missing:
        raise lacks([missing.args[0]], "content-controlnet", name) from missing
    if config is None:
        raise lacks([CONV_IN], "content-controlnet", name)
    if config["context_dim"] is None:
        raise lacks(["attn2.to_k.weight in all blocks"], "content-controlnet", name)
    del config["out_channels"]
    return config
