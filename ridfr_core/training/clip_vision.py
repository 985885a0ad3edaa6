"""CLIP vision: what the identity adapter reads of a reference photo besides the face embedding."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import CheckpointError, read
from ..faces import align
from ..nano import WEIGHTS

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
             patch_size=14, projection_dim=1024, hidden_act="gelu")


def load_tower(where: str) -> nn.Module:
    """A transformers CLIPVisionModelWithProjection from a transformers folder or a safetensors file, or "nano".

    A file is taken for ViT-H/14, FaceID's, unless its config lies beside it under the same name (.json).
    Raises CheckpointError: the tensors are not of that network.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path = WEIGHTS / "clip_vision.safetensors" if where == "nano" else Path(where)
    if path.is_dir():
        return CLIPVisionModelWithProjection.from_pretrained(path, local_files_only=True).float().eval()
    state, _ = read(path)
    beside = path.with_suffix(".json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else VIT_H
    config = CLIPVisionConfig(**{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):  # ViT-H takes 2.5 GB
        wanted = {k: tensor.shape for k, tensor in CLIPVisionModelWithProjection(config).state_dict().items()}
    wrong = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if wrong:
        raise CheckpointError(f"'{path.name}' is not the CLIP vision model it should be ({wrong[0]} is missing or of "
                              "another shape): use CLIP ViT-H/14, or put its config.json beside it under its name.")
    tower = CLIPVisionModelWithProjection(config)
    tower.load_state_dict({key: state[key].float() for key in wanted}, assign=True)
    return tower.eval()


def normalise(crops: Tensor, size: int) -> Tensor:
    """Crops [B,3,H,W] in [0,1] to CLIP's input [B,3,size,size]."""
    crops = F.interpolate(crops, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (crops - torch.tensor(MEAN).view(3, 1, 1).to(crops)) / torch.tensor(STD).view(3, 1, 1).to(crops)


def features(tower: nn.Module, images: Tensor, landmarks: Tensor) -> Tensor:
    """What the identity adapter reads: penultimate hidden states [B,T,D] of the aligned face."""
    return hidden_states(tower, normalise(align(images, landmarks, 224), tower.config.image_size))


def hidden_states(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Penultimate hidden states [B,T,D] of normalised input."""
    return tower(pixels, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def features_of_nobody(tower: nn.Module) -> Tensor:
    """[T,D], of zeros after normalisation: the unconditional image of IP-Adapter."""
    size = tower.config.image_size
    return hidden_states(tower, torch.zeros(1, 3, size, size, device=tower.device, dtype=tower.dtype))[0]
