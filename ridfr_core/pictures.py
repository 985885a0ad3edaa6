"""Image files to tensors and back."""

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor


def read_image(path: Path) -> Tensor:
    """[3,H,W] in [0,1], upright."""
    with Image.open(path) as file:
        pixels = numpy.array(ImageOps.exif_transpose(file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3,H,W] -> [3,*size]."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
