"""The shipped nano networks as diffusers and transformers have them, in fp32."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..adapter import IdentityAdapter
from ..checkpoints import read
from ..content import ContentSpec, controlnet_to_ldm, prepare_lq
from ..layouts import unet_to_ldm, vae_to_ldm
from ..nano import WEIGHTS
from ..nano.config import LATENT_SCALE, PORTRAIT
from ..restorer import Restorer
from ..training import nano_diffusion, nano_vae, nano_vision
from ..training.networks import from_ldm


def nano_restorer(weights: Path = WEIGHTS) -> Restorer:
    """Base, VAE and content module of the bundle."""
    checkpoint, _ = read(weights / "checkpoint.safetensors")
    control, metadata = read(weights / "content_controlnet.safetensors")
    unet, vae, spec = nano_diffusion.build_unet(), nano_vae.build(), ContentSpec.from_metadata(metadata)
    content = nano_diffusion.build_content(unet)
    unet.load_state_dict(from_ldm(unet, unet_to_ldm, checkpoint, "model.diffusion_model."))
    vae.load_state_dict(from_ldm(vae, vae_to_ldm, checkpoint, "first_stage_model."))
    content.load_state_dict(from_ldm(content, controlnet_to_ldm, control))
    return restorer(unet, vae, content, spec=spec)


def restorer(unet: nn.Module, vae: nn.Module, content: nn.Module, condition: Callable[[Tensor], Tensor] | None = None,
             spec: ContentSpec = nano_diffusion.SPEC) -> Restorer:
    """A Restorer of nano networks; condition: what its content module takes, pixels by `spec` if left out."""
    size = (PORTRAIT // 8, PORTRAIT // 8)
    nano_diffusion.let_identity_in(unet)
    return Restorer(
        unet=frozen(unet), vae=frozen(vae), content=frozen(content), spec=spec,
        context=nano_diffusion.empty_prompt(1), schedule=dict(nano_diffusion.schedule().config), scale=LATENT_SCALE,
        condition=condition or (lambda lq: prepare_lq(lq, size, spec)),
    )


def nano_adapter(weights: Path = WEIGHTS) -> IdentityAdapter:
    state, _ = read(weights / "identity_adapter.safetensors")
    return frozen(IdentityAdapter.from_state_dict({k: v.float() for k, v in state.items()}))


def nano_tower(weights: Path = WEIGHTS) -> nn.Module:
    """The CLIP vision network, as transformers has it."""
    state, _ = read(weights / "clip_vision.safetensors")
    tower = nano_vision.build()
    tower.load_state_dict({k: v.float() for k, v in state.items()})
    return frozen(tower)


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)
