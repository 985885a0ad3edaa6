"""The shipped nano weights as finished runs, so that a machine without their checkpoints can train them further.

The encoder of the captions, which the base learns from and no node needs, lies in the repository, outside the package.
"""

from functools import partial
from pathlib import Path

import torch

from ..checkpoints import read
from ..layouts import unet_to_ldm, vae_to_ldm
from ..nano import WEIGHTS
from . import nano_diffusion, nano_vae, nano_vision
from .files import TORCH, write_whole
from .networks import from_ldm

CAPTIONS = WEIGHTS.parent / "stages" / "captions.safetensors"


def adopt(work: Path) -> None:
    """Write WORK/NAME.pt, a run that has taken its recipe's steps, for each diffusion network that has none there.

    The optimiser's state is not shipped: what goes on learning starts with a new one. Nor are the content module's
    stages, of which the shipped one is a blend: they are trained again.
    """
    checkpoint, _ = read(WEIGHTS / "checkpoint.safetensors")
    vision, _ = read(WEIGHTS / "clip_vision.safetensors")
    adapter, _ = read(WEIGHTS / "identity_adapter.safetensors")
    unet, vae = nano_diffusion.build_unet(), nano_vae.build()
    vae_state = from_ldm(vae, vae_to_ldm, checkpoint, "first_stage_model.")
    unet_state = from_ldm(unet, unet_to_ldm, checkpoint, "model.diffusion_model.")
    runs = {
        "vae": (nano_vae.RECIPE, vae_state),
        "decoder": (nano_vae.DECODER, {k: v for k, v in vae_state.items() if k.startswith(("decoder.", "post_quant"))}),
        "vision": (nano_vision.RECIPE, {f"tower.{k}": v.float() for k, v in vision.items()}),
        "base": (nano_diffusion.BASE, {f"unet.{k}": v for k, v in unet_state.items()}),
        "adapter": (nano_diffusion.ADAPT, {k: v.float() for k, v in adapter.items()}),
    }
    if CAPTIONS.exists():
        runs["base"][1].update({f"captions.{name}": weight.float() for name, weight in read(CAPTIONS)[0].items()})
    for name, (recipe, state) in runs.items():
        path = work / f"{name}.pt"
        if not path.exists():
            run = {"step": recipe.steps, "seconds": 0.0, "history": [], "ema": state, "module": state,
                   "optimizer": None}
            write_whole(path, partial(torch.save, run), TORCH)
