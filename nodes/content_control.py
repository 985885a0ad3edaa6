"""Content ControlNets on ComfyUI's CONTROL_NET: the LQ image joins the noisy latent as three more input channels."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_detection
import comfy.model_management as management
import comfy.ops
import comfy.utils
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor

from ..ridfr_core.content import ContentSpec
from ..ridfr_core.nano.config import HEADS as NANO_HEADS
from .border import rgb

HEADS = {"sd15": 8, "nano": NANO_HEADS}


class PixelConcatNet(comfy.cldm.cldm.ControlNet):
    """ComfyUI's ControlNet network without its hint encoder: the input is cat(z_t, LQ at latent size)."""

    def __init__(self, spec: ContentSpec, **config):
        super().__init__(hint_channels=3, **config)
        del self.input_hint_block
        self.spec = spec

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, **kwargs) -> dict[str, list[Tensor]]:
        h = self.spec.concat(x, comfy.utils.repeat_to_batch_size(hint, len(x)))
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        output = []
        for block, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = block(h, emb, context)
            output.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        return {"middle": [self.middle_block_out(h, emb, context)], "output": output}


def content_control(state: dict[str, Tensor], spec: ContentSpec) -> comfy.controlnet.ControlNet:
    """A stock CONTROL_NET of a content ControlNet in ldm keys."""
    device = management.get_torch_device()
    dtype = management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(state))
    manual_cast = management.unet_manual_cast(dtype, device)
    config = comfy.model_detection.detect_unet_config(state, "")
    del config["out_channels"]
    net = PixelConcatNet(
        spec,
        **config,
        num_heads=HEADS[spec.base],
        dtype=dtype,
        device=management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, manual_cast, disable_fast_fp8=True),
    )
    net = comfy.controlnet.controlnet_load_state_dict(net, state)
    # compression_ratio 1 and no latent_format: ComfyUI resizes the image straight to latent size, once per run
    control = comfy.controlnet.ControlNet(
        net,
        compression_ratio=1,
        load_device=device,
        manual_cast_dtype=manual_cast,
        preprocess_image=lambda image: spec.to_range(rgb(image)),
    )
    control.upscale_algorithm = spec.kernel
    return control
