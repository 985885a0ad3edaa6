"""What a training step is made of: photos, degraded ones, noise, references.

Draw n of a run depends on the seed and n alone. So a run that goes on after an interruption, or on another number of
processes, sees the same draws, and no state of a random number generator has to be kept.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..degradation import DegradationRange, degrade
from ..randomness import generator
from .photos import Photos
from .references import References
from .settings import TrainingError

TIMES = 1000  # of the noise schedule


@dataclass(frozen=True)
class Draws(Dataset):
    """rows: of the photos to draw from, each once in an epoch. degradation, references: None where there are none."""

    photos: Photos
    rows: Sequence[int]
    seed: int
    degradation: DegradationRange | None
    references: References | None

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """hq, lq: [3,R,R] in [0,1]. noise: [4,R/8,R/8]; posterior: the same, for the VAE's sample. t: of 0..999.

        embedding: [K,512] and clip: [K,T,D], of K references.
        """
        chance, size = generator("draw", self.seed, n), self.photos.resolution // 8
        row, hq = self._photo(n)
        draw = {"hq": hq, "noise": torch.randn(4, size, size, generator=chance),
                "posterior": torch.randn(4, size, size, generator=chance),
                "t": torch.randint(TIMES, (), generator=chance)}
        if self.degradation is not None:
            damage = self.degradation.draw(1, chance)
            draw["lq"] = degrade(draw["hq"][None], **damage, generator=chance)[0]
        if self.references is not None:
            draw |= self.references.draw(row, chance)
        return draw

    def _photo(self, n: int) -> tuple[int, Tensor]:
        """The row of draw n and its photo; if it can no longer be read, the next draw's."""
        for other in range(n, n + len(self.rows)):
            row = self.row(other)
            try:
                return row, self.photos.image(row)
            except TrainingError as error:
                warnings.warn(f"{error} The next photo takes its place.", stacklevel=1)
        raise TrainingError(f"The photos in '{self.photos.folder}' can no longer be read: is the folder still there?")

    def row(self, n: int) -> int:
        epoch, place = divmod(n, len(self.rows))
        return self.rows[order(len(self.rows), self.seed, epoch)[place]]


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    return torch.randperm(count, generator=generator("order", seed, epoch)).tolist()


def draws_of_process(steps: range, batch: int, accumulate: int, process: int, processes: int) -> Iterator[list[int]]:
    """The parts of each step's batch that fall to one process, `accumulate` per step; together they are the batch."""
    part = batch // (accumulate * processes)
    for step in steps:
        for turn in range(accumulate):
            first = step * batch + (turn * processes + process) * part
            yield list(range(first, first + part))
