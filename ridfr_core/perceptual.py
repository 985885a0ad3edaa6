"""Image quality as trained networks judge it, through pyiqa (the extra `evaluate`). Nothing is ever downloaded."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import first_line

# name in the papers -> name in pyiqa
METRICS = {"LPIPS": "lpips", "MUSIQ": "musiq", "MANIQA": "maniqa", "CLIP-IQA": "clipiqa", "HyperIQA": "hyperiqa",
           "PI": "pi", "FID": "fid"}
FULL_REFERENCE = {"LPIPS"}

# What pyiqa 0.1.16 loads for each: files under torch's hub folder, and timm backbones in Hugging Face's cache.
FILES = {
    "lpips": ("checkpoints/alexnet-owt-7be5be79.pth", "pyiqa/LPIPS_v0.1_alex-df73285e.pth"),
    "musiq": ("pyiqa/musiq_koniq_ckpt-e95806b9.pth",),
    "maniqa": ("pyiqa/ckpt_koniq10k.pt",),
    "clipiqa": ("clip/RN50.pt",),
    "hyperiqa": ("pyiqa/HyperIQA-resnet50-koniq10k-c96c41b1.pth",),
    "pi": ("pyiqa/NRQM_model.mat", "pyiqa/niqe_modelparameters.mat"),
    "fid": ("pyiqa/pt_inception-2015-12-05-6726825d.pth",),
}
BACKBONES = {"maniqa": "timm/vit_base_patch8_224.augreg2_in21k_ft_in1k", "hyperiqa": "timm/resnet50.a1_in1k"}


class MetricAbsent(RuntimeError):
    """A metric cannot be had here; the message says why and what to do."""


def load(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """pyiqa's metric for a key of METRICS. Raises MetricAbsent without pyiqa, or without its weights on this disk.

    pyiqa itself would download what is missing, so it is asked only when nothing is.
    """
    if importlib.util.find_spec("pyiqa") is None:
        raise MetricAbsent("pyiqa is not installed: `pip install -e '.[evaluate]'` in the pack's folder")
    name = METRICS[name]
    try:
        import pyiqa

        missing = missing_weights(name)
    except Exception as error:  # a broken package may raise anything
        raise MetricAbsent(f"pyiqa cannot be imported ({first_line(error)}): `pip install -e '.[evaluate]'` in the "
                           "pack's folder") from error
    if missing:
        raise MetricAbsent(f"its weights are not on this disk ({', '.join(missing)}): run `pyiqa {name} --target IMAGE`"
                           " once where it may download them")
    try:
        return pyiqa.create_metric(name, device=device)
    except Exception as error:  # pyiqa checks nothing of a weight file
        raise MetricAbsent(f"its weights cannot be loaded ({first_line(error)}): remove them and get them again"
                           ) from error


def missing_weights(name: str) -> list[str]:
    """What pyiqa would have to download for a metric of its own name."""
    from huggingface_hub import try_to_load_from_cache
    from pyiqa.utils.download_util import DEFAULT_CACHE_DIR

    hub = Path(DEFAULT_CACHE_DIR).parent
    missing = [str(hub / file) for file in FILES[name] if not (hub / file).is_file()]
    backbone = BACKBONES.get(name)
    if backbone and not isinstance(try_to_load_from_cache(backbone, "model.safetensors"), str):
        missing.append(backbone)
    return missing


@torch.no_grad()
def score(metric: nn.Module, images: Tensor, truth: Tensor | None = None) -> list[float]:
    """One number for each image [B,3,H,W] in [0,1]; truth: for the full-reference metrics."""
    pairs = [(image,) for image in images.split(1)] if truth is None else zip(images.split(1), truth.split(1))
    return [float(metric(*pair)) for pair in pairs]
