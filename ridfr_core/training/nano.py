"""Train the nano bundle from nothing: `ridfr train nano [STAGE ...]`.

Each stage loads or trains the networks it builds on, goes on where it was if it was interrupted, and writes its weights
into `ridfr_core/nano/weights/`. A newer network makes those trained on it stale: remove their checkpoints
(`WORK/NAME.pt`) to train them again.
"""

import copy
import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..content import controlnet_to_ldm
from ..layouts import unet_to_ldm, vae_to_ldm
from ..nano import WEIGHTS
from ..nano.config import HEADS, PREDICTION
from ..recognition import load_iresnet
from . import nano_diffusion, nano_vae, nano_vision
from .detector import train_detector
from .files import write_whole
from .nano_shipped import CAPTIONS, adopt
from .portrait_data import portrait_set
from .recogniser import train_recogniser
from .small_faces import train_small_faces

PEOPLE, VIEWS = 3000, 8
ALIGNED = 0.7  # the share of the aligned weights in the content module that is shipped
RECOGNISER = WEIGHTS / "insightface" / "models" / "nano" / "rec_nano.onnx"


class NanoTraining:
    """The diffusion stages; each network is trained, or loaded from its finished run, when it is first asked for."""

    def __init__(self, work: Path):
        self.work = work

    @cached_property
    def portraits(self):
        return portrait_set(self.work, "train", PEOPLE, VIEWS)

    @cached_property
    def vae(self):
        return nano_vae.train_decoder(self.work, self.portraits, nano_vae.train(self.work, self.portraits))

    @cached_property
    def vision(self):
        return nano_vision.train(self.work, self.portraits)

    @cached_property
    def base(self):
        """The UNet and its captions' encoder."""
        material = nano_diffusion.Material(self.portraits, self.vae, None, None)
        return nano_diffusion.train_base(self.work, material)

    @property
    def unet(self):
        return self.base[0]

    @cached_property
    def content(self):
        material = nano_diffusion.Material(self.portraits, self.vae, None, None)
        return nano_diffusion.train_content(self.work, material, self.unet)

    @cached_property
    def material(self):
        return nano_diffusion.Material(self.portraits, self.vae, self.vision, load_iresnet(RECOGNISER))

    @cached_property
    def adapter(self):
        return nano_diffusion.train_adapter(self.work, self.material, self.unet)

    @cached_property
    def aligned(self):
        return nano_diffusion.train_aligned(
            self.work, self.material, self.unet, self.adapter, copy.deepcopy(self.content)
        )

    @cached_property
    def blended(self):
        """The content module that is shipped: the mean of the weights before and after Alignment Learning.

        Alignment takes away identity together with what leaks of the reference; between the two lies nearly all of what
        both are good at (Wortsman et al., Robust fine-tuning of zero-shot models, 2022).
        """
        before, mean = self.content.state_dict(), copy.deepcopy(self.aligned)
        mean.load_state_dict({name: torch.lerp(before[name], w, ALIGNED) for name, w in mean.state_dict().items()})
        return mean

    def export_checkpoint(self) -> None:
        """UNet, VAE and text encoder as one file in SD1.5's layout, half precision.

        Of the text encoder only the last norm is stored: gain 0 and a constant, so that every prompt says the same.
        """
        tensors = {f"model.diffusion_model.{k}": v for k, v in unet_to_ldm(self.unet.state_dict()).items()}
        tensors |= {f"first_stage_model.{k}": v for k, v in vae_to_ldm(self.vae.state_dict()).items()}
        says, norm = nano_diffusion.empty_prompt(1)[0, 0], "cond_stage_model.transformer.text_model.final_layer_norm"
        tensors |= {f"{norm}.weight": torch.zeros_like(says), f"{norm}.bias": says}
        config = {"heads": HEADS, "prediction": PREDICTION}
        save(WEIGHTS / "checkpoint.safetensors", tensors, {"ridfr.config": json.dumps(config)})
        save(CAPTIONS, self.base[1].state_dict(), {})

    def export_vision(self) -> None:
        save(WEIGHTS / "clip_vision.safetensors", self.vision.state_dict(), {})

    def export_content(self, content, stage: str) -> None:
        metadata = nano_diffusion.SPEC.to_metadata() | {"ridfr.stage": stage}
        save(WEIGHTS / "content_controlnet.safetensors", controlnet_to_ldm(content.state_dict()), metadata)

    def export_adapter(self) -> None:
        save(WEIGHTS / "identity_adapter.safetensors", self.adapter.state_dict(), {})


STAGES = {
    "recogniser": lambda nano: train_recogniser(nano.work, "recogniser", threads=torch.get_num_threads()),
    "small": lambda nano: train_small_faces(nano.work),
    "judge": lambda nano: train_recogniser(nano.work, "judge", threads=torch.get_num_threads()),
    "detector": lambda nano: train_detector(nano.work, threads=torch.get_num_threads()),
    "vae": lambda nano: nano.vae,
    "vision": lambda nano: nano.export_vision(),
    "base": lambda nano: nano.export_checkpoint(),
    "content": lambda nano: nano.export_content(nano.content, "content"),
    "adapter": lambda nano: nano.export_adapter(),
    "align": lambda nano: nano.export_content(nano.blended, f"{1 - ALIGNED:g} content + {ALIGNED:g} align"),
}
FACE_STAGES = ("recogniser", "small", "judge", "detector")


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Half-precision safetensors, whole or not at all."""
    tensors = {key: tensor.detach().half().contiguous() for key, tensor in tensors.items()}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def train(stages: list[str], work: Path, threads: int, from_shipped: bool = False) -> None:
    """Run the named stages in their order (all of them if none is named).

    from_shipped: take the shipped weights for finished runs where `work` has none; see `adopt`. The recognisers and the
    detector, which are not among them, stay as they are unless they are named.
    """
    torch.set_num_threads(threads)
    if from_shipped:
        work.mkdir(parents=True, exist_ok=True)
        adopt(work)
        stages = stages or [name for name in STAGES if name not in FACE_STAGES]
    nano = NanoTraining(work)
    for name in stages or STAGES:
        STAGES[name](nano)
