"""Nano restorations of people that no network has seen, measured by the judge and kept on disk."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter import IdentityAdapter
from ..degradation import degrade
from ..face_model import load_face_model
from ..faces import align
from ..metrics import identity_variance, psnr, similarity, ssim
from ..nano import WEIGHTS
from ..nano.config import PORTRAIT
from ..recognition import embed
from ..restorer import Restorer
from ..training import clip_vision, references
from ..training.files import write_whole
from ..training.nano_diffusion import SEVERE
from ..training.portrait_data import fingerprint, portrait_set

BATCH = 32
PROTOCOL = 2  # raise it when how faces are restored or measured changes: what was kept before is measured again


@dataclass(frozen=True)
class Method:
    """What restores: the networks, and those that read the reference."""

    restorer: Restorer
    adapter: IdentityAdapter
    tower: nn.Module

    def fingerprint(self) -> str:
        networks = (self.restorer.unet, self.restorer.vae, self.restorer.content, self.adapter, self.tower)
        return " ".join(fingerprint(network) for network in networks)


class Measured(NamedTuple):
    """Of P people restored with R references each: similarity to the truth, psnr in dB and ssim [P,R]; variance [P],
    the identity variance over the references (NaN for a single one)."""

    similarity: Tensor
    psnr: Tensor
    ssim: Tensor
    variance: Tensor


def kept(folder: Path, said: tuple, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, from a file in `folder` if it was computed before for what `said` names."""
    path = folder / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.npz"
    if (stored := _stored(path)) is None:
        values = {name: value.numpy() for name, value in compute().items()}

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # given a name, numpy would add .npz to it
                np.savez(file, **values)

        write_whole(path, write)
        stored = values
    return {name: torch.from_numpy(value) for name, value in stored.items()}


def _stored(path: Path) -> dict[str, np.ndarray] | None:
    """None where the file is not there or damaged."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


class HeldOut:
    """The first `people` of a split (a key of `SPLITS`): one severely degraded face of each, and photos of them in
    other views.

    All restorations of a person begin with the same noise, whatever the method and the reference, so that only these
    make a difference. Faces are aligned by the landmarks they were drawn with, not by a detector.
    """

    def __init__(self, work: Path, people: int, references: int, steps: int, weights: Path = WEIGHTS,
                 split: str = "test"):
        self.people, self.steps, self.cache = people, steps, work / "measured" / split
        self.features: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}
        self.portraits = portrait_set(work, split, people, 1 + references)
        self.face_model = load_face_model(weights / "insightface" / "models" / "nano")
        self.recogniser = self.face_model.recogniser
        self.judge = load_face_model(weights / "insightface" / "models" / "nano_judge").recogniser
        rows = torch.arange(len(self.portraits)).view(people, 1 + references)
        self.truth_rows, self.references = rows[:, 0], rows[:, 1:]
        self.truth, self.landmarks = self.portraits.batch(self.truth_rows), self.portraits.landmarks[self.truth_rows]
        generator = torch.Generator().manual_seed(1)
        self.lq = degrade(self.truth, **SEVERE.draw(people, generator), generator=generator)

    def measure(self, method: Method, references: Tensor | None, guidance: float = 1.0, shrink: int = 1) -> Measured:
        """Restore every person's face with each of these references, or take what was measured before.

        references: [P,R] rows of portraits, or None for the blind restoration. shrink: how many times smaller the
        references are made before anything reads them.
        """
        said = (self.key(method), None if references is None else references.tolist(), guidance, shrink)
        return Measured(**kept(self.cache, said, lambda: self._restore(method, references, guidance, shrink)._asdict()))

    def key(self, method: Method) -> tuple:
        """What every measurement of a method depends on, besides its own arguments."""
        return (PROTOCOL, method.fingerprint(), fingerprint(self.judge), fingerprint(self.recogniser), self.people,
                self.steps)

    def compare(self, images: Tensor) -> Measured:
        """Measure images [P*R,3,S,S] that show, person by person, the same as the truth."""
        count = len(images) // self.people
        people = torch.arange(self.people).repeat_interleave(count)
        embeddings = self.judged(images, self.landmarks[people])
        alike = similarity(embeddings, self.truth_embeddings[people])
        columns = (alike, psnr(images, self.truth[people]), ssim(images, self.truth[people]))
        embeddings = embeddings.view(self.people, count, -1)
        variance = identity_variance(embeddings) if count > 1 else torch.full((self.people,), torch.nan)
        return Measured(*(column.view(self.people, count) for column in columns), variance)

    @cached_property
    def truth_embeddings(self) -> Tensor:
        """The judge's unit embeddings [P,512] of the true faces."""
        return self.judged(self.truth, self.landmarks)

    @torch.no_grad()
    def judged(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """The judge's unit embeddings [B,512]."""
        return torch.cat([embed(self.judge, align(*part)) for part in zip(images.split(BATCH), landmarks.split(BATCH))])

    def _restore(self, method: Method, references: Tensor | None, guidance: float, shrink: int) -> Measured:
        count = 1 if references is None else references.shape[1]
        people, images = torch.arange(self.people).repeat_interleave(count), []
        how = "blindly" if references is None else f"with guidance {guidance:g}"
        print(f"restoring {len(people)} faces {how}", flush=True)
        for part in torch.arange(len(people)).split(BATCH):
            identity, nobody = None, None
            if references is not None:
                identity = self.keys_values(method, references.flatten()[part], shrink)
                nobody = self._nobody(method, len(part)) if guidance != 1 else None
            who = people[part]
            with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast; moves the mean similarity by 0.0005
                images.append(method.restorer.restore(self.lq[who], identity, nobody, guidance, self.steps, seeds=who))
        return self.compare(torch.cat(images).float())

    @torch.no_grad()
    def keys_values(self, method: Method, rows: Tensor, shrink: int = 1) -> list[tuple[Tensor, Tensor]]:
        """(K', V') of each layer for these portraits as references, made `shrink` times smaller."""
        embeddings, clip = self._features(method.tower, shrink)
        return method.adapter.keys_values(method.adapter.tokens(embeddings[rows], clip[rows]))

    @torch.no_grad()
    def _features(self, tower: nn.Module, shrink: int) -> tuple[Tensor, Tensor]:
        """Unit embeddings [N,512] and CLIP features [N,T,D] of all portraits; every arm reads the same."""
        if (tower, shrink) not in self.features:
            parts = []
            for rows in torch.arange(len(self.portraits)).split(BATCH):
                images, landmarks = self.portraits.batch(rows), self.portraits.landmarks[rows]
                photos = references.shrink(images, landmarks, PORTRAIT // shrink)
                parts.append((embed(self.recogniser, align(*photos)), clip_vision.features(tower, *photos)))
            self.features[tower, shrink] = tuple(map(torch.cat, zip(*parts)))
        return self.features[tower, shrink]

    @torch.no_grad()
    def _nobody(self, method: Method, count: int) -> list[tuple[Tensor, Tensor]]:
        """Of no one: embedding 0, and CLIP's features of zeros after normalisation."""
        tokens = method.adapter.tokens(torch.zeros(1, 512), clip_vision.features_of_nobody(method.tower)[None])
        return [(k.expand(count, -1, -1), v.expand(count, -1, -1)) for k, v in method.adapter.keys_values(tokens)]
