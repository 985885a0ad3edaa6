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
from ..ridfr_core.content import ContentSpec, check_layout
from ..ridfr_core.errors import RidfrError
from ..ridfr_core.nano.config import HEADS as NANO_HEADS
from .border import rgb
from .checks import TENSORS
from .managed import eager

# What the tensors do not tell, as in comfy.supported_models
BASES = {
    "sd15": {"num_heads": 8},
    "sd21": {"num_head_channels": 64, "attn_precision": torch.float32},
    "sdxl": {"num_head_channels": 64},
    "nano": {"num_heads": NANO_HEADS},
}
NAMES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL", "nano": "the nano models"}
PIXELS = 8  # of the picture for one of the latent, in all of these
SDXL_LATENTS, SD_LATENTS = comfy.latent_formats.SDXL, comfy.latent_formats.SD15


class ContentNet(comfy.cldm.cldm.ControlNet):
    """ComfyUI's ControlNet network, which says so if the diffusion model is of another family. name: of its file."""

    def __init__(self, spec: ContentSpec, name: str, **config):
        super().__init__(**config)
        self.spec, self.name, self.context_dim = spec, name, config["context_dim"]

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None, **kwargs
    ) -> dict[str, list[Tensor]]:
        """Residuals for the UNet's skips and middle. Raises RidfrError if the prompts [B,T,D] have another width."""
        if context.shape[-1] != self.context_dim:
            raise RidfrError(
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


class ContentControl(comfy.controlnet.ControlNet):
    """A CONTROL_NET whose image is the degraded picture itself: whole, finite, and one for each picture or for all.

    In context windows over a batch, each window has the images of its own pictures.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.whole = None  # all images, while those of a window's pictures `rows` stand in cond_hint_original
        self.rows, self.hints = None, {}  # hints: of each window, prepared

    def copy(self) -> "ContentControl":
        copy = ContentControl(None, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        copy.control_model, copy.control_model_wrapped = self.control_model, self.control_model_wrapped
        self.copy_to(copy)
        return copy

    def pre_run(self, *args) -> None:
        """ComfyUI calls it before the first step. Raises RidfrError for what is no image, is empty or has NaN."""
        self._leave_window()
        image = TENSORS["IMAGE"](self.cond_hint_original.movedim(1, -1), "Apply ControlNet: image")
        self.cond_hint_original = image.movedim(-1, 1).float()
        super().pre_run(*args)

    def cleanup(self) -> None:
        self._leave_window()
        super().cleanup()

    def get_control(self, x_noisy: Tensor, t, cond, batched_number: int, transformer_options: dict):
        """Raises RidfrError where the images do not fit the latents x_noisy [batched_number * B,C,h,w]."""
        window = transformer_options.get("context_window")
        images = self.cond_hint_original if self.rows is None else self.whole
        if window is not None and window.dim == 0 and len(images) > 1:
            self._enter_window(images, tuple(row % len(images) for row in window.index_list))
        prepared = [side * self.compression_ratio for side in x_noisy.shape[-2:]]
        if self.cond_hint is None or [*self.cond_hint.shape[-2:]] != prepared:  # else ComfyUI keeps what it has
            check_fit(self.cond_hint_original.shape, (x_noisy.shape[0] // batched_number, *x_noisy.shape[-2:]))
        return super().get_control(x_noisy, t, cond, batched_number, transformer_options)

    def _enter_window(self, images: Tensor, rows: tuple[int, ...]) -> None:
        if rows != self.rows:
            self.hints[self.rows] = self.cond_hint
            self.cond_hint, self.cond_hint_original = self.hints.get(rows), images[[*rows]]
            self.whole, self.rows = images, rows

    def _leave_window(self) -> None:
        if self.rows is not None:
            self.cond_hint, self.cond_hint_original = None, self.whole
        self.whole, self.rows, self.hints = None, None, {}


def check_fit(images: tuple[int, ...], latents: tuple[int, ...]) -> None:
    """images: [B,C,H,W], latents: [B,h,w]. Raises RidfrError for other proportions or another number.

    ComfyUI cuts the edges off an image of other proportions, and begins again where there are too few. A few pixels
    are cut in any case, by those who round a picture's size to what a latent can have.
    """
    (count, _, height, width), (batch, *latent) = images, latents
    wanted_height, wanted_width = (PIXELS * side for side in latent)
    scale = max(wanted_height / height, wanted_width / width)
    cut = max(height * scale - wanted_height, width * scale - wanted_width)
    if cut >= PIXELS + scale:  # of one pixel of the image and one of the latent
        raise RidfrError(
            f"The content ControlNet's image has {width}x{height} pixels, but the picture will have "
            f"{wanted_width}x{wanted_height}: give the latent the proportions of the degraded image."
        )
    if batch % count:
        raise RidfrError(
            f"The content ControlNet has {count} degraded images, but the latent batch has {batch}: give it one for "
            "each, or one for all."
        )


def content_control(state: dict[str, Tensor], spec: ContentSpec, name: str = "this") -> comfy.controlnet.ControlNet:
    """A stock CONTROL_NET of a content ControlNet in ldm keys; name: of its file, for errors.

    Raises CheckpointError if tensors are missing, too many or of other shapes than the rest.
    """
    config = detected(state, name) | BASES[spec.base]
    device = management.get_torch_device()
    dtype = management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(state))
    manual_cast = management.unet_manual_cast(dtype, device)
    config |= {
        "hint_channels": 3,
        "dtype": dtype,
        "device": "meta",  # until it is known that the file holds as much as its names promise
        "operations": eager(comfy.ops.pick_operations(dtype, manual_cast, disable_fast_fp8=True)),
    }
    net = (ContentNet if spec.kind == "hint" else ConcatNet)(spec, name, **config)
    check_tensors(state, net.state_dict(), "content-controlnet", name)
    net.to_empty(device=management.unet_offload_device())
    net.load_state_dict(state)
    # Without latent_format ComfyUI resizes the image to compression_ratio * latent size; with it, to the size that its
    # VAE encodes to latent size. It does so once per run.
    latents = SDXL_LATENTS if spec.base == "sdxl" else SD_LATENTS
    control = ContentControl(
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
    """The network's sizes, read off the tensors by ComfyUI's detection. Raises CheckpointError."""
    check_layout(state, name)
    try:
        config = comfy.model_detection.detect_unet_config(state, "")
    except KeyError as missing:
        raise lacks([missing.args[0]], "content-controlnet", name) from missing
    if config["context_dim"] is None:
        raise lacks(["attn2.to_k.weight in all blocks"], "content-controlnet", name)
    del config["out_channels"]
    return config
