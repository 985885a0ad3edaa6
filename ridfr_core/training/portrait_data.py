"""Portraits rendered ahead of training and kept on disk, and what the frozen networks say of them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..nano.config import PORTRAIT
from ..nano.portraits import SPLITS, captions, render
from ..pictures import to_pil
from .files import rows_of, write_png, write_rows

CHUNK = 250
VERSION = 2  # of how features are computed: raise it when reading, aligning or shrinking pictures changes
SIZES = (PORTRAIT, 64, 32, 16)  # of references, in pixels: to an eighth, as the paper's 512 to 64


@dataclass(frozen=True)
class PortraitSet:
    """`people` x `views` portraits, person-major: row = person * views + view.

    images: uint8 [N,3,S,S] (memory-mapped); landmarks: [N,5,2] pixels; first_person, first_view: their seeds.
    """

    folder: Path
    people: int
    views: int
    first_person: int
    first_view: int
    images: np.ndarray
    landmarks: Tensor

    def __len__(self) -> int:
        return self.people * self.views

    def batch(self, rows: Tensor) -> Tensor:
        """Portraits [B,3,S,S] in [0,1]."""
        return torch.from_numpy(self.images[rows.numpy()]).float() / 255

    def captions(self, rows: Tensor) -> Tensor:
        """What the portraits show, in numbers [B,CAPTION] from -1 to 1."""
        return captions(self.first_person + rows // self.views, self.first_view + rows % self.views)

    def feature(self, name: str, net: nn.Module, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `compute(images, landmarks)` gives for every portrait, as float16 [N,...].

        Computed once for the weights of `net`, the network that `compute` runs.
        """
        path, chunks = self.folder / f"{name}-{VERSION}-{fingerprint(net)}.npy", torch.arange(len(self)).split(CHUNK)
        if rows_of(path, len(self)) is None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                seen = (compute(self.batch(rows), self.landmarks[rows]).half() for rows in chunks)
                write_rows(path, seen, len(self))
        return torch.from_numpy(np.load(path))


def fingerprint(net: nn.Module) -> str:
    """Eight hex digits of a network's weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:8]


def portrait_set(work: Path, split: str, people: int, views: int, first_view: int = 0) -> PortraitSet:
    """The first `people` of a split in `views` views each, rendered on first use.

    Args:
        work: folder for the cache (about 49 kB a portrait).
        split: a key of `SPLITS`.
    """
    folder = work / f"portraits-{split}-{people}x{views}-from{first_view}"
    pictures, points = folder / "images.npy", folder / "landmarks.npy"
    first_person = SPLITS[split].start
    if any(rows_of(path, people * views) is None for path in (pictures, points)):
        _render(pictures, points, first_person, people, views, first_view)
    images, landmarks = (rows_of(path, people * views) for path in (pictures, points))
    return PortraitSet(folder, people, views, first_person, first_view, images, torch.from_numpy(np.array(landmarks)))


def _render(pictures: Path, points: Path, start: int, people: int, views: int, first_view: int) -> None:
    landmarks: list[Tensor] = []

    def draw() -> Iterator[Tensor]:
        for rows in torch.arange(people * views).split(CHUNK):
            portraits = render(start + rows // views, first_view + rows % views, size=PORTRAIT)
            landmarks.append(portraits.landmarks.float())
            yield (portraits.image * 255).round().byte()

    write_rows(pictures, draw(), people * views)
    write_rows(points, landmarks, people * views)


def export_portraits(folder: Path, people: int, views: int, size: int = PORTRAIT) -> None:
    """Drawn portraits as PNG files folder/PERSON/VIEW.png, as a data set of photos would lie."""
    for person in range(people):
        seeds = torch.full((views,), SPLITS["train"].start + person), torch.arange(views)
        place = folder / f"{person:04d}"
        for view, image in enumerate(render(*seeds, size=size).image):
            write_png(to_pil(image), place / f"{view}.png")
