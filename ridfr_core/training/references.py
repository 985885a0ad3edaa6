"""Reference photos: face embeddings and CLIP features, computed once and kept on disk, and the choice among them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..face_model import FaceModel
from ..faces import align
from ..recognition import embed
from . import clip_vision
from .files import rows_of, write_rows
from .photos import Photos
from .portrait_data import VERSION, fingerprint
from .settings import TrainingError

BATCH = 16
STRANGER = 0.2  # ArcFace: photos of one person are rarely less alike than this, photos of two people hardly more


def find_faces(photos: Photos, face_model: FaceModel, cache: Path, progress: Callable) -> tuple[Photos, Tensor]:
    """Those photos in which a face is found, and the landmarks [N,5,2] of the largest face in each, in pixels.

    progress: as tqdm. Computed once, see `Features`. Raises TrainingError if there is no face anywhere.
    """
    path = cache / f"faces-{_digest(photos.digest, face_model.detector.digest)}.npy"
    if rows_of(path, len(photos)) is None:
        rows = progress(range(len(photos)), desc="finding faces")
        write_rows(path, (_largest_face(photos.image(row), face_model) for row in rows), len(photos))
    landmarks = torch.from_numpy(numpy.array(rows_of(path, len(photos))))
    found = (~landmarks.isnan().flatten(1).any(1)).nonzero().flatten().tolist()
    if not found:
        raise TrainingError(f"No face was found in any of the {len(photos)} photos in '{photos.folder}'.")
    return photos.only(found), landmarks[found]


def _largest_face(image: Tensor, face_model: FaceModel) -> Tensor:
    faces = face_model.detector.detect(image)
    return (faces[0].landmarks if faces else torch.full((5, 2), torch.nan))[None]


@dataclass(frozen=True)
class Features:
    """What recogniser and CLIP say of photos; they are kept in files whose names hold the hash of all three, of
    the detector, and of the version of the code.

    sizes: in pixels, that the photos were down-sampled to before they were looked at.
    """

    folder: Path
    digest: str
    sizes: tuple[int, ...]

    def embeddings(self, size: int) -> Tensor:
        """[N,512], unit length."""
        return torch.from_numpy(numpy.array(self._open("embeddings", size)))

    def embedding(self, row: int, size: int) -> Tensor:
        """[512], unit length."""
        return torch.from_numpy(numpy.array(self._open("embeddings", size)[row]))

    def clip(self, row: int, size: int) -> Tensor:
        """Penultimate hidden states [T,D]."""
        return torch.from_numpy(self._open("clip", size)[row].astype(numpy.float32))

    def path(self, name: str, size: int) -> Path:
        return self.folder / f"{name}-{self.digest}-{size}.npy"

    def _open(self, name: str, size: int) -> numpy.ndarray:
        return numpy.load(self.path(name, size), mmap_mode="r")


def compute_features(
    photos: Photos, landmarks: Tensor, face_model: FaceModel, tower: nn.Module, sizes: tuple[int, ...], cache: Path,
    device: torch.device | str, progress: Callable,
) -> Features:
    """The features of all photos, each of which has a face; from `cache`, or computed.

    CLIP's are stored in half precision: 0.66 MB for each photo and size with ViT-H/14.
    """
    seen_by = face_model.detector.digest, face_model.digest, fingerprint(tower)
    features = Features(cache, _digest(photos.digest, *seen_by), sizes)
    recogniser, tower = face_model.recogniser.to(device), tower.to(device)

    def read(size: int, embeddings: list[Tensor]):
        for rows in progress(torch.arange(len(photos)).split(BATCH), desc=f"reading references at {size} px"):
            images = torch.stack([photos.image(row) for row in rows.tolist()]).to(device)
            part = shrink(images, landmarks[rows].to(device), size)
            embeddings.append(embed(recogniser, align(*part)))
            clip = clip_vision.features(tower, *part).half()
            if not (torch.isfinite(embeddings[-1]).all() and torch.isfinite(clip).all()):
                raise TrainingError(f"The recogniser or the CLIP vision model makes NaN of '{photos.names[rows[0]]}' "
                                    "or of a photo after it: its file is damaged, get it again.")
            yield clip

    for size in sizes:
        paths = [features.path(name, size) for name in ("clip", "embeddings")]
        if any(rows_of(path, len(photos)) is None for path in paths):
            embeddings: list[Tensor] = []
            with torch.inference_mode():
                write_rows(paths[0], read(size, embeddings), len(photos))
            write_rows(paths[1], embeddings, len(photos))
    return features


def shrink(images: Tensor, landmarks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images [B,3,S,S] and landmarks [B,5,2] in their pixels, down-sampled to size x size."""
    small = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return small, (landmarks + 0.5) * (size / images.shape[-1]) - 0.5


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join((f"{VERSION}", *parts)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class References:
    """The choice of reference photos, RIDFR section 3.3.

    features: of all photos. others: for each row, the rows that may be its references. count: references per draw.
    drop: how often there is none. nobody: CLIP's features of no photo [T,D].
    """

    features: Features
    others: dict[int, list[int]]
    count: int
    drop: float
    nobody: Tensor

    def draw(self, row: int, generator: torch.Generator) -> dict[str, Tensor]:
        """embedding [count,512] and clip [count,T,D] of different photos, each down-sampled at random.

        Where there are too few others the photo itself is a reference too, and where that happens twice it is so at
        different sizes. All references are dropped together.
        """
        sizes, others = self.features.sizes, self.others[row]
        drop = torch.rand((), generator=generator) < self.drop
        chosen = [others[i] for i in torch.randperm(len(others), generator=generator)[: self.count].tolist()]
        chosen += [row] * (self.count - len(chosen))
        at = torch.randint(len(sizes), (self.count,), generator=generator)
        if self.count > 1 and not others:
            at = torch.randperm(len(sizes), generator=generator).repeat(self.count)[: self.count]
        pairs = [(r, sizes[i]) for r, i in zip(chosen, at.tolist())]
        if drop:
            embedding = torch.zeros_like(self.features.embedding(row, sizes[0]))
            return {"embedding": embedding.expand(self.count, -1), "clip": self.nobody.expand(self.count, -1, -1)}
        return {"embedding": torch.stack([self.features.embedding(*pair) for pair in pairs]),
                "clip": torch.stack([self.features.clip(*pair) for pair in pairs])}


def other_photos(people: dict[str, list[int]]) -> dict[int, list[int]]:
    """For each row the other rows of the same person."""
    return {row: [other for other in rows if other != row] for rows in people.values() for row in rows}


def strangers(photos: Photos, embeddings: Tensor) -> list[tuple[str, float]]:
    """(photo, median cosine to the person's other photos) where that is so low that it may show somebody else: the
    fewer of two people in one folder, or both if they have as many photos."""
    found = []
    for rows in photos.people.values():
        if len(rows) > 1:
            cosines = (embeddings[rows] @ embeddings[rows].T).fill_diagonal_(torch.nan)
            median = cosines.nanquantile(0.5, dim=1)
            found += [(photos.names[row], value) for row, value in zip(rows, median.tolist()) if value < STRANGER]
    return found
