"""ComfyUI's IMAGE [B,H,W,C] to ridfr_core's images [B,3,H,W] and back, with the checks that several nodes share."""

import torch
from torch import Tensor

from ..ridfr_core.errors import RidfrError

SMALLEST_PHOTO = 32  # px of the shorter side: no detector finds a face in less


def to_core(image: Tensor) -> Tensor:
    """[B,H,W,C] -> float32 RGB [B,3,H,W]."""
    return rgb(image.movedim(-1, 1)).float().cpu().contiguous()  # with --gpu-only they lie on the GPU


def upper(what: str) -> str:
    return what[:1].upper() + what[1:]  # "LQ image" keeps its capitals


def rgb(images: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,3,H,W]: grey is repeated, an alpha channel is left out."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def to_photos(image: Tensor, what: str) -> Tensor:
    """`to_core` for images in which a face is looked for: none may be tiny or completely black."""
    height, width = image.shape[1:3]
    if min(height, width) < SMALLEST_PHOTO:
        raise RidfrError(
            f"{upper(what)} 1 has only {width}x{height} pixels, and a face needs at least "
            f"{SMALLEST_PHOTO}: use a larger photo."
        )
    photos = to_core(image)
    for number, brightest in enumerate(photos.flatten(1).amax(1).tolist(), 1):
        if brightest <= 0:
            raise RidfrError(f"{upper(what)} {number} is completely black: connect a photo with a face.")
    return photos


def to_comfy(images: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,H,W,3] in [0,1]."""
    return images.movedim(1, -1).clamp(0, 1).contiguous().cpu()


def fit_to(images: Tensor, size: tuple[int, int], what: str, to: str) -> Tensor:
    """[B,3,H,W] in [0,1], scaled to `size` (height, width); what and to name the images and those of that size.

    Raises RidfrError for another shape, for it would be stretched. A size that was rounded to a multiple of 8 passes.
    """
    (height, width), (to_height, to_width) = images.shape[-2:], size
    if (height, width) == (to_height, to_width):
        return images
    if abs(to_width * height - to_height * width) >= 8 * max(height, width):
        raise RidfrError(
            f"{what} has {width}x{height} pixels and {to} {to_width}x{to_height}, which is another shape: crop one of "
            "them so that both show the same part of the picture."
        )
    return torch.nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def same_batch(a: Tensor, b: Tensor, what_a: str, what_b: str) -> tuple[Tensor, Tensor]:
    """Two batches of equal length; a single image is repeated. Raises RidfrError for any other pair of lengths."""
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise RidfrError(f"{what_a} has {len(a)} images and {what_b} has {len(b)}: give both the same number, or one.")
    size = max(len(a), len(b))
    return a.expand(size, -1, -1, -1), b.expand(size, -1, -1, -1)
