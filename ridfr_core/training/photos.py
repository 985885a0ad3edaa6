"""Photos in folders: which can be used, whose they are, and who is kept apart."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import sha256
from ..pictures import EXTENSIONS, PictureError, read_picture
from .files import write_whole
from .settings import TrainingError

READER = 2  # raise it when other files can be read, or are read in another way: the index is made anew
ROW = {"size", "modified", "wrong", "digest"}  # what the index has of each file
NAMED = 5  # how many of several photos or people a message names


@dataclass(frozen=True)
class Photos:
    """Photos that can be read. names: paths inside the folder, with "/"; digests: sha256 of each file."""

    folder: Path
    names: tuple[str, ...]
    digests: tuple[str, ...]
    resolution: int

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Tensor:
        """[3,R,R] in [0,1]: the photo's central square, scaled to the resolution.

        Raises TrainingError if the file can no longer be used.
        """
        try:
            return load_photo(self.folder / self.names[row], self.resolution)
        except PictureError as error:
            raise TrainingError(f"'{self.names[row]}' can no longer be used: {error.reason}.") from error

    @cached_property
    def digest(self) -> str:
        """Tells this set of photos, at this resolution, from others."""
        listing = "\n".join((str(self.resolution), *(f"{n} {d}" for n, d in zip(self.names, self.digests))))
        return hashlib.sha256(os.fsencode(listing)).hexdigest()

    @cached_property
    def people(self) -> dict[str, list[int]]:
        """Rows by person, of photos that all lie in folders: each folder inside the data folder is one."""
        people: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            people.setdefault(name.partition("/")[0], []).append(row)
        return people

    def only(self, rows: Iterable[int]) -> "Photos":
        rows = list(rows)
        return replace(self, names=tuple(self.names[r] for r in rows), digests=tuple(self.digests[r] for r in rows))


def load_photo(path: Path, resolution: int) -> Tensor:
    """See Photos.image. Raises PictureError if the file cannot be used or is too small."""
    image = read_picture(path)
    if min(image.size) < resolution:
        raise PictureError(path, f"{image.width}x{image.height} pixels are less than {resolution}")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def find_photos(folder: Path, resolution: int, cache: Path) -> tuple[Photos, dict[str, str]]:
    """All photos in a folder and its subfolders that can be used, and why the others can not, by name.

    Every file is read once; what was found is kept in `cache` for files that have not changed since.
    Raises TrainingError: there are no images, or none can be used.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not files:
        raise TrainingError(f"There are no photos in '{folder}' ({', '.join(sorted(EXTENSIONS))}): check the path.")
    place = hashlib.sha256(f"{folder.resolve()} {resolution} {READER}".encode()).hexdigest()[:12]
    index = cache / f"photos-{place}.json"
    known = _known(index)

    def look(path: Path) -> tuple[str, dict]:
        name, state = path.relative_to(folder).as_posix(), path.stat()
        row = known.get(name, {})
        if (row.get("size"), row.get("modified")) != (state.st_size, state.st_mtime_ns):
            row = {"size": state.st_size, "modified": state.st_mtime_ns, "wrong": None, "digest": None}
            try:
                load_photo(path, resolution)
                row["digest"] = sha256(path)
            except PictureError as error:
                row["wrong"] = error.reason
        return name, row

    with ThreadPoolExecutor() as pool:
        found = dict(pool.map(look, files))
    if found != known:
        write_whole(index, lambda partial: partial.write_text(json.dumps(found), encoding="utf-8"))
    skipped = {name: row["wrong"] for name, row in found.items() if row["wrong"]}
    good = [name for name in found if name not in skipped]
    if not good:
        name, reason = next(iter(skipped.items()))
        raise TrainingError(f"None of the {len(found)} photos in '{folder}' can be used: {name}: {reason}.")
    return Photos(folder, tuple(good), tuple(found[name]["digest"] for name in good), resolution), skipped


def _known(index: Path) -> dict[str, dict]:
    """What was found before; nothing where the file is not there or is damaged, since it is only a cache."""
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(row, dict) and row.keys() >= ROW for row in known.values())
    return known if whole else {}


def split_people(people: Iterable[str], validation: int, seed: int) -> tuple[list[str], list[str]]:
    """(people to train on, `validation` people kept apart), drawn by the seed from their names.

    Raises TrainingError if nobody is left to train on.
    """
    people = sorted(people)
    if validation >= len(people):
        raise TrainingError(f"Of {len(people)} people {validation} cannot be kept apart: set validation_people lower.")
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = sorted(people[i] for i in order[:validation])
    return [person for person in people if person not in set(apart)], apart


def some(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
