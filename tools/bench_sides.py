"""The two sides of the benchmark, on the same random weights: this pack in ComfyUI's sampler, diffusers' pipelines."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .cache import CHECKOUT

TOKENS, CLIP_TOKENS, CLIP_WIDTH = 77, 257, 1280
SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Case:
    """What is drawn: the base model and its diffusers configuration, picture size in pixels, steps, weights' dtype."""

    base: str
    unet: dict
    size: int
    steps: int
    dtype: torch.dtype = torch.float32

    @property
    def has_content(self) -> bool:
        return self.base == "sd15"  # the content ControlNet is SD1.5's


def start_comfyui(tree: Path, flags: list[str]) -> ModuleType:
    """ComfyUI's modules and the pack in this process; returns the pack."""
    sys.path.insert(0, str(tree))
    arguments, sys.argv = sys.argv, ["main.py", *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  parses sys.argv
    import comfy.utils

    sys.argv = arguments
    comfy.utils.PROGRESS_BAR_ENABLED = False
    spec = importlib.util.spec_from_file_location("ridfr_pack", CHECKOUT / "__init__.py",
                                                  submodule_search_locations=[str(CHECKOUT)])
    pack = sys.modules["ridfr_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return pack


def randomised(module: nn.Module) -> nn.Module:
    """Weights of unit gain, so that activations keep their size through the whole network."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


class Inputs:
    """Random prompt, start noise, LQ picture and identity features of some people, the same for both sides."""

    def __init__(self, case: Case, people: int):
        generator = torch.Generator().manual_seed(people)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.noise = randn(people, 4, case.size // 8, case.size // 8)
        self.prompt = randn(1, TOKENS, case.unet["cross_attention_dim"])
        self.pooled = randn(1, 1280)
        self.lq = torch.rand(1, 3, case.size, case.size, generator=generator)
        self.embeddings = nn.functional.normalize(randn(people + 1, 512), dim=1)
        self.clip = randn(people + 1, CLIP_TOKENS, CLIP_WIDTH)


class Ours:
    """This pack's identity patches and content ControlNet in ComfyUI's KSampler."""

    def __init__(self, pack: ModuleType, case: Case, unet: nn.Module, controlnet: nn.Module | None, adapter: nn.Module):
        import comfy.model_management as management
        import comfy.supported_models
        from comfy.model_detection import detect_unet_config
        from comfy.model_patcher import CoreModelPatcher

        core = pack.ridfr_core
        state = core.layouts.unet_to_ldm(unet.state_dict())
        family = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[case.base]
        config = family(detect_unet_config(state, ""))
        device = management.get_torch_device()
        config.set_inference_dtype(case.dtype, management.unet_manual_cast(case.dtype, device))
        model = config.get_model(state, device="meta")
        model.diffusion_model.load_state_dict(state, assign=True)
        model.to(case.dtype)
        self.model = CoreModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())
        self.control = None
        if controlnet is not None:
            ldm = core.content.controlnet_to_ldm(controlnet.state_dict())
            self.control = pack.nodes.content_control.content_control(ldm, core.content.ContentSpec())
        self.case, self.adapter, self.attention = case, adapter, pack.nodes.id_attention

    def keys_values(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """K' and V' of each layer for the people, then for nobody."""
        return self.adapter.keys_values(self.adapter.tokens(inputs.embeddings, inputs.clip, True))

    def identified(self, inputs: Inputs):
        """The model with the identity patches of Apply Identity."""
        layers = zip(self.adapter.layers, self.keys_values(inputs), strict=True)
        patches = {place: self.attention.IdentityAttention(k, v, 1.0) for place, (k, v) in layers}
        return self.attention.install(self.model, patches)

    def sampler(self, inputs: Inputs, identity: bool, compiled: bool = False):
        """A function that draws the pictures' latents."""
        import comfy.sample
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        from nodes import ControlNetApplyAdvanced

        size = {"width": self.case.size, "height": self.case.size}
        positive = [[inputs.prompt, {"pooled_output": inputs.pooled, **size}]]
        if self.control is not None:
            image = inputs.lq.movedim(1, -1)
            positive, _ = ControlNetApplyAdvanced().apply_controlnet(positive, [], self.control, image, 1.0, 0.0, 1.0)
        model = self.identified(inputs) if identity else self.model
        model = TorchCompileModel.execute(model, "inductor")[0] if compiled else model
        settings = (self.case.steps, 1.0, "euler", "normal", positive, positive, torch.zeros_like(inputs.noise))
        return lambda: comfy.sample.sample(model, inputs.noise, *settings, disable_pbar=True)


class Theirs:
    """diffusers' pipeline with its own IP-Adapter FaceID-Plus, and the ControlNet with a widened first convolution."""

    def __init__(self, case: Case, unet: nn.Module, controlnet: nn.Module | None, adapter: nn.Module, device: str):
        import diffusers

        vae = diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                      up_block_types=("UpDecoderBlock2D",) * 4)  # only its scale factor, 8, is used
        scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        parts = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
        if case.base == "sdxl":
            parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
            pipe = diffusers.StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **parts)
        else:
            pipe = diffusers.StableDiffusionControlNetPipeline(
                vae=vae, unet=unet, scheduler=scheduler, controlnet=controlnet, safety_checker=None,
                requires_safety_checker=False, **parts)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.case, self.device = pipe.to(device, case.dtype), case, device
        nested: dict = {"image_proj": {}, "ip_adapter": {}}
        for key, weight in adapter.state_dict().items():
            part, _, name = key.partition(".")
            nested[part][name] = weight.to(device, case.dtype)
        unet._load_ip_adapter_weights([nested])
        unet.to(device, case.dtype)

    def sampler(self, inputs: Inputs, compiled: bool = False):
        """A function that draws the pictures' latents. The pipeline knows one person: it is drawn in every picture."""
        people = len(inputs.noise)

        def place(x: Tensor) -> Tensor:
            return x.to(self.device, self.case.dtype)

        pipe = self.pipe
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds, projection.shortcut = place(inputs.clip[:1, None]).expand(people, -1, -1, -1), True
        if compiled:
            pipe.unet.compile()
        # ComfyUI's noise has the variance of sigma^2 + 1, diffusers' Euler that of sigma^2
        sigma = pipe.scheduler.sigmas.max()
        arguments = {
            "prompt_embeds": place(inputs.prompt).expand(people, -1, -1),
            "ip_adapter_image_embeds": [place(inputs.embeddings[:1, None])],
            "latents": place(inputs.noise * (1 + sigma**-2) ** 0.5),
            "height": self.case.size, "width": self.case.size, "num_inference_steps": self.case.steps,
            "guidance_scale": 1.0, "output_type": "latent", "return_dict": False,
        }
        if self.case.has_content:
            arguments["image"] = place(inputs.lq)
        else:
            arguments["pooled_prompt_embeds"] = place(inputs.pooled).expand(people, -1)
        return lambda: pipe(**arguments)[0]


def content_controlnet(config: dict) -> nn.Module:
    """diffusers' ControlNetModel with seven input channels: the noisy latent and the LQ picture at its size."""
    from diffusers import ControlNetModel

    class Pixels(nn.Module):
        def forward(self, _):
            return 0.0

    class ContentControlNet(ControlNetModel):
        def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs):
            lq = nn.functional.interpolate(controlnet_cond, size=sample.shape[-2:], mode="bicubic") * 2 - 1
            x = torch.cat([sample, lq.expand(len(sample), -1, -1, -1)], 1)
            return super().forward(x, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs)

    net = ContentControlNet(in_channels=7, **config)
    net.controlnet_cond_embedding = Pixels()
    return net


def build(pack: ModuleType, case: Case, device: str) -> tuple[Ours, Theirs]:
    """Both sides of a case. On the CPU they share the weights' memory; on a GPU ComfyUI moves its weights about."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = randomised(UNet2DConditionModel(**case.unet)).to(case.dtype)
    controlnet = randomised(content_controlnet(case.unet)).to(case.dtype) if case.has_content else None
    channels = tuple(layer.to_k.out_features for layer in cross_attention(unet))
    core = pack.ridfr_core
    adapter = randomised(core.adapter.IdentityAdapter(channels, case.unet["cross_attention_dim"], CLIP_WIDTH))
    ours = Ours(pack, case, unet if device == "cpu" else copy.deepcopy(unet), controlnet, adapter)
    if device == "cpu" and controlnet is not None:
        state = ours.control.control_model.state_dict()
        names = core.content.controlnet_to_ldm({name: name for name in controlnet.state_dict()})
        controlnet.load_state_dict({theirs: state[name] for name, theirs in names.items()}, assign=True)
    return ours, Theirs(case, unet, controlnet, adapter, device)


def cross_attention(unet: nn.Module) -> list[nn.Module]:
    """The UNet's cross-attention layers in the order of FaceID checkpoints: down, up, mid."""
    parts = (unet.down_blocks, unet.up_blocks, unet.mid_block)
    return [module for part in parts for name, module in part.named_modules() if name.endswith(".attn2")]
