"""insightface's SCRFD: what goes into such a network, and what its outputs say.

Guo et al., "Sample and Computation Redistribution for Efficient Face Detection", ICLR 2022. The conventions (how a
picture is shrunk, the anchors' places, which of two boxes stays) are those of insightface's `model_zoo/scrfd.py`, so
that the same faces are found, to a twentieth of a pixel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OVERLAP = 0.4  # of two boxes, intersection over union: beyond it, the less certain one goes
COEFFICIENT = 11  # bits of OpenCV's interpolation weights


class Layout(NamedTuple):
    """strides: a map of scores, boxes and landmarks each; anchors: at each place of a map."""

    strides: tuple[int, ...]
    anchors: int


LAYOUTS = {9: Layout((8, 16, 32), 2), 15: Layout((8, 16, 32, 64, 128), 1)}  # by the number of outputs
WITHOUT_LANDMARKS = (6, 10)


class Candidates(NamedTuple):
    """boxes [N,4] (x1,y1,x2,y2), landmarks [N,5,2], scores [N], best first, on the CPU."""

    boxes: Tensor
    landmarks: Tensor
    scores: Tensor


def letterbox(image: Tensor, size: tuple[int, int], margin: int = 0) -> tuple[Tensor, float]:
    """(input [1,3,height,width] of the network, scale): an image [3,H,W], RGB in [0,1], shrunk or enlarged into the
    top left corner of an input of `size` (width, height).

    margin: pixels of black all round the image before it is resized. Coordinates in the input are those in the image
    with its margin, times the scale. Of a large image only those pixels are looked at which are needed.
    """
    height, width = (side + 2 * margin for side in image.shape[1:])
    ratio = height / width
    new_width, new_height = size
    if ratio > new_height / new_width:
        new_width = max(int(new_height / ratio), 1)
    else:
        new_height = max(int(new_width * ratio), 1)
    canvas = torch.zeros(1, 3, size[1], size[0])
    canvas[0, :, :new_height, :new_width] = _resized(image.detach(), (new_height, new_width), margin)
    return canvas.sub_(127.5).div_(128), new_height / height


def _resized(image: Tensor, size: tuple[int, int], margin: int) -> Tensor:
    """An image [3,H,W] in [0,1] with a margin, as OpenCV resizes its bytes: 0 to 255, [3,h,w]."""
    rows, down = _places(image.shape[1], size[0], margin)
    columns, across = _places(image.shape[2], size[1], margin)
    image, rows = _needed(image, 1, rows)
    image, columns = _needed(image, 2, columns)
    return torch.stack([_blended(channel.cpu(), rows, down, columns, across.float()) for channel in image])


def _blended(channel: Tensor, rows: Tensor, down: Tensor, columns: Tensor, across: Tensor) -> Tensor:
    """One colour [H,W] -> [h,w], with OpenCV's rounding on the way; on its side first, for whole rows are at hand."""
    pixels = channel.clamp(0, 1).mul_(255).round_().T.contiguous()
    left, right = (pixels.index_select(0, place).mul_(weight[:, None]) for place, weight in zip(columns, across))
    mixed = left.add_(right).div_(16).floor_().T.int()
    above, below = (mixed.index_select(0, place).mul_(weight[:, None]) >> 16 for place, weight in zip(rows, down))
    return above.add_(below).add_(2) >> 2


def _places(side: int, new: int, margin: int) -> tuple[Tensor, Tensor]:
    """For each of `new` pixels in place of `side` and two margins: the two [2,new] between which it lies, and their
    weights, 0 in the margin."""
    whole = side + 2 * margin
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * (whole / new) - 0.5).float().clamp(0, whole - 1)
    first = place.floor()
    share = ((place - first) * 2**COEFFICIENT).round().int()
    places = torch.stack([first, (first + 1).clamp(max=whole - 1)]).long() - margin
    weights = torch.stack([2**COEFFICIENT - share, share]) * ((places >= 0) & (places < side))
    return places.clamp(0, side - 1), weights


def _needed(image: Tensor, axis: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of a large image only those rows or columns which are looked at, and their places among them."""
    if places.numel() >= image.shape[axis]:
        return image, places
    return image.index_select(axis, places.flatten().to(image.device)), torch.arange(places.numel()).view_as(places)


def candidates(outputs: Sequence[Tensor], size: tuple[int, int], threshold: float) -> Candidates:
    """What the network's outputs say of an input of `size` (width, height), where they are at least so certain.

    Raises ValueError where the outputs are not those of such an input.
    """
    layout = LAYOUTS[len(outputs)]
    maps = len(layout.strides)
    if any(out.numel() % (1, 4, 10)[place // maps] for place, out in enumerate(outputs)):
        raise ValueError("its outputs are not scores, boxes and landmarks")
    scores, boxes, points = (
        torch.cat([out.reshape(-1, width) for out in outputs[kind * maps:(kind + 1) * maps]])
        for kind, width in enumerate((1, 4, 10))
    )
    centres, strides = _anchors(size, layout)
    if not len(scores) == len(boxes) == len(points) == len(centres):
        raise ValueError(f"it has {len(scores)} scores, {len(boxes)} boxes and {len(points)} sets of landmarks for "
                         f"{len(centres)} anchors")
    values = torch.cat([scores, boxes, points], 1)
    rows = (scores[:, 0] >= threshold).nonzero().flatten()
    values, rows = values[rows].float().cpu(), rows.cpu()
    keep = torch.isfinite(values).all(1)
    values, centres, strides = values[keep], centres[rows[keep]], strides[rows[keep], None]
    boxes = torch.cat([centres - strides * values[:, 1:3], centres + strides * values[:, 3:5]], 1)
    landmarks = (centres.repeat(1, 5) + strides * values[:, 5:]).view(-1, 5, 2)
    order = values[:, 0].argsort(descending=True, stable=True)
    return Candidates(boxes[order], landmarks[order], values[order, 0])


def _anchors(size: tuple[int, int], layout: Layout) -> tuple[Tensor, Tensor]:
    """(pixels [A,2] that the anchors stand for, their strides [A])."""
    centres, strides = [], []
    for stride in layout.strides:
        y, x = torch.meshgrid(*(torch.arange(side // stride) * float(stride) for side in size[::-1]), indexing="ij")
        centres.append(torch.stack([x, y], -1).view(-1, 2).repeat_interleave(layout.anchors, 0))
        strides.append(torch.full((len(centres[-1]),), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def best_of_each(found: Candidates) -> Candidates:
    """Of boxes that overlap, the most certain one.

    In the picture's own pixels, not those of the input: a box counts its last row and column, as insightface has it.
    """
    x1, y1, x2, y2 = found.boxes.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    left, kept = torch.arange(len(areas)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        width = (torch.minimum(x2[best], x2[left]) - torch.maximum(x1[best], x1[left]) + 1).clamp(min=0)
        height = (torch.minimum(y2[best], y2[left]) - torch.maximum(y1[best], y1[left]) + 1).clamp(min=0)
        shared = width * height
        left = left[shared / (areas[best] + areas[left] - shared) <= OVERLAP]
    rows = torch.stack(kept) if kept else left
    return Candidates(*(values[rows] for values in found))
