"""CLIP vision: what the identity adapter reads of a reference photo besides the face embedding."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import CheckpointError, read
from ..errors import first_line
from ..faces import align
from ..nano import WEIGHTS

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_LAYERS = 100
VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
             patch_size=14, projection_dim=1024, hidden_act="gelu")


def load_tower(where: str) -> nn.Module:
    """A transformers CLIPVisionModelWithProjection from a transformers folder or a safetensors file, or "nano".

    A file is taken for ViT-H/14, FaceID's, unless its config lies beside it under the same name (.json).
    Raises CheckpointError: the tensors are not of that network.
    """
    path = WEIGHTS / "clip_vision.safetensors" if where == "nano" else Path(where)
    return _from_folder(path) if path.is_dir() else _from_file(path)


def _from_folder(folder: Path) -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    try:
        check_layers(folder)
        tower, said = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers has one for each thing that may be wrong
        raise CheckpointError(f"'{folder}' cannot be read as a CLIP vision model ({first_line(error)}): use a "
                              "transformers folder of CLIP ViT-H/14.") from error
    if missing := sorted(said["missing_keys"]):  # of which transformers would make random ones
        raise CheckpointError(f"'{folder}' has no {missing[0]}: use a transformers folder of CLIP ViT-H/14.")
    check_finite(tower, folder)
    return tower.float().eval()


def _from_file(path: Path) -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    state, _ = read(path)
    layers = len({key.split(".")[3] for key in state if key.startswith("vision_model.encoder.layers.")})
    beside = path.with_suffix(".json")
    if beside.is_file():
        config, wanted = _config(beside, layers)
    else:
        config = _config_of(VIT_H)
        wanted = _shapes(config)
    wrong = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if wrong:
        raise CheckpointError(f"'{path.name}' is not the CLIP vision model it should be ({wrong[0]} is missing or of "
                              "another shape): use CLIP ViT-H/14, or put its config.json beside it under its name.")
    tower = CLIPVisionModelWithProjection(config)
    tower.load_state_dict({key: state[key].float() for key in wanted}, assign=True)
    return tower.eval()


def _config(file: Path, layers: int) -> tuple:
    """The config in a JSON file and the shapes of its weights, if it is one of a tower with as many layers as the
    weights have, so that nothing bigger is built. Raises CheckpointError."""
    try:
        config = _config_of(json.loads(file.read_text(encoding="utf-8")))
        fits = config.num_hidden_layers == layers and 0 < config.image_size <= 1024 and config.patch_size > 0
        shapes = _shapes(config) if fits else {}
    except Exception as error:  # transformers checks little of it
        raise CheckpointError(f"'{file.name}' is not the config of a CLIP vision model ({first_line(error)}): use the "
                              "config.json that the weights came with.") from error
    if not fits:
        raise CheckpointError(f"'{file.name}' is not the config of the weights beside it, which have {layers} layers: "
                              "use the config.json that they came with.")
    return config, shapes


def _shapes(config) -> dict[str, torch.Size]:
    from transformers import CLIPVisionModelWithProjection

    with torch.device("meta"):  # ViT-H takes 2.5 GB
        return {k: tensor.shape for k, tensor in CLIPVisionModelWithProjection(config).state_dict().items()}


def _config_of(values: dict):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{k: v for k, v in values.items() if k != "model_type"})


def check_layers(folder: Path) -> None:
    """Raises ValueError where a config asks for more layers than any network here has: to build them would take for
    ever."""
    for key, value in json.loads((folder / "config.json").read_text(encoding="utf-8")).items():
        numbers = value if isinstance(value, list) else [value]
        if "layers" in key and any(isinstance(number, (int, float)) and number > MOST_LAYERS for number in numbers):
            raise ValueError(f"its config says {key} = {value}")


def check_finite(network: nn.Module, folder: Path) -> None:
    """Raises CheckpointError, which names the folder, where a weight is not finite."""
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"'{folder}' holds NaN or infinite numbers in {name}: get it again.")


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
