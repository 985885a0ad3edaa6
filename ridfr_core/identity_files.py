"""Saved identities: one safetensors file per person.

Tensors: `embeddings` [N,D] of unit length, `weights` [N], `thumbnails` uint8 [N,3,112,112]; `clip` [N,T,C] and
`clip_uncond` [T,C] where CLIP was used; `quality` [N,4] where it is known. Metadata: `format` "ridfr-identity",
`version` "1", `recogniser` (its name) and `recogniser_sha256` (FaceModel.digest).
"""

import itertools
import os
import unicodedata
from dataclasses import astuple, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import brief, read, unwritable, write
from .errors import in_one_line
from .identity import Identity, IdentityError, Person, Quality, check_weights
from .recognition import CROP_SIZE

FORMAT, VERSION = "ridfr-identity", "1"
NEEDED, OPTIONAL = ("embeddings", "weights", "thumbnails"), ("clip", "clip_uncond", "quality")
MOST_PHOTOS = 10_000
ROUNDING = 1e-2  # of an embedding's length, in the coarsest numbers that a file may have
LONGEST_NAME = 100  # bytes in UTF-8: file systems take 255, some 143, with the number and the suffix
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}


def file_name(name: str, number: int | None = None, copy: int = 1) -> str:
    """NAME.safetensors or "NAME number.safetensors" for what a user typed, safe in every file system.

    Signs that mean something in a path or cannot be seen become "_", dots and spaces at the ends go, a long name is
    cut. The second copy is called NAME_00002.safetensors, as Save Image counts. Raises IdentityError where nothing is
    left of the name.
    """
    stem = "".join(map(_safe, name)).strip(" .")
    stem = stem.encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .")  # a letter that was cut in two goes
    if not stem.strip("_ ."):
        raise IdentityError(f"{name[:LONGEST_NAME]!r} leaves no name for a file: write the person's name.")
    if unicodedata.normalize("NFKC", stem.split(".")[0]).strip().lower() in RESERVED:  # COM¹, too
        stem = f"_{stem}"
    stem += "" if number is None else f" {number}"
    stem += "" if copy == 1 else f"_{copy:05}"
    return f"{stem}.safetensors"


def _safe(sign: str) -> str:
    """The sign itself, a space for any kind of space, "_" for what a path or the eye cannot have."""
    kind = unicodedata.category(sign)
    if kind == "Zs":
        return " "
    return "_" if sign in '<>:"/\\|?*' or kind in ("Cc", "Cf", "Cs", "Zl", "Zp") else sign


def new_files(folder: Path, name: str, people: int, overwrite: bool = False) -> list[Path]:
    """Where to save so many people under a name: one file each, with a number behind the name if there are several.

    Unless `overwrite`, none of them is there yet: all are the first copy that is free.
    """
    numbers = [None] if people == 1 else range(1, people + 1)
    for copy in itertools.count(1):
        files = [folder / file_name(name, number, copy) for number in numbers]
        if overwrite or not any(map(os.path.lexists, files)):
            return files


def save_identity(identity: Identity, path: Path) -> None:
    """Write an identity of one person, whole or not at all; an existing file is replaced, a missing folder made.

    Raises CheckpointError if it cannot be written.
    """
    (person,) = identity.people
    tensors = {
        "embeddings": person.embeddings,
        "weights": person.weights,
        "thumbnails": (identity.thumbnails.clamp(0, 1) * 255).round().to(torch.uint8),
    }
    if person.clip is not None:
        tensors |= {"clip": person.clip, "clip_uncond": identity.clip_uncond}
    if person.quality:
        tensors["quality"] = torch.tensor([astuple(quality) for quality in person.quality])
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "recogniser": identity.recogniser,
        "recogniser_sha256": identity.digest,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, in_one_line(error)) from error
    write({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata)


def load_identity(path: Path) -> Identity:
    """The person of a file that `save_identity` wrote, in float32.

    Raises IdentityError for another file or one whose tensors don't fit each other, CheckpointError for a damaged one;
    both name it.
    """
    tensors, metadata = read(path)
    if metadata.get("format") != FORMAT:
        raise IdentityError(f"'{path.name}' is not a saved identity: choose a file that Save Identity wrote.")
    if (version := metadata.get("version")) != VERSION:
        raise IdentityError(
            f"'{path.name}' is a saved identity of version {brief(str(version))} and this pack reads {VERSION}: "
            "update the pack."
        )
    for key in ("recogniser", "recogniser_sha256"):
        if key not in metadata:
            raise _broken(path.name, f"it does not say its {key}")
    recogniser, digest = brief(metadata["recogniser"]), brief(metadata["recogniser_sha256"])
    tensors = {key: tensors[key] for key in (*NEEDED, *OPTIONAL) if key in tensors}
    _check(tensors, path.name)
    thumbnails = tensors.pop("thumbnails") / 255
    # Copies: as they were read they are views of the file, which could not be replaced on Windows while they live
    numbers = {key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}
    quality = tuple(Quality(*row) for row in numbers["quality"].tolist()) if "quality" in numbers else ()
    embeddings = _unit(numbers["embeddings"], path.name)
    person = Person(embeddings, numbers.get("clip"), numbers["weights"], quality)
    if (person.weights < 0).any():
        raise _broken(path.name, "weights has numbers below 0")
    check_weights(person.weights, f"'{path.name}'")
    return Identity((person,), numbers.get("clip_uncond"), digest, thumbnails, recogniser)


def _check(tensors: dict[str, Tensor], name: str) -> None:
    """Raises IdentityError where a tensor is missing, of another type, or of a shape that does not fit the others'."""
    if missing := [key for key in NEEDED if key not in tensors]:
        raise _broken(name, f"{missing[0]} is missing")
    if ("clip" in tensors) != ("clip_uncond" in tensors):
        raise _broken(name, "clip or clip_uncond is missing")
    photos, width = _sizes(tensors, "embeddings", 2, name)
    if photos > MOST_PHOTOS:
        raise IdentityError(f"'{name}' has {photos} photos, more than {MOST_PHOTOS}: save a person of fewer photos.")
    clip = _sizes(tensors, "clip", 3, name)[1:] if "clip" in tensors else ()
    shapes = {
        "embeddings": (photos, width),
        "weights": (photos,),
        "thumbnails": (photos, 3, CROP_SIZE, CROP_SIZE),
        "clip": (photos, *clip),
        "clip_uncond": clip,
        "quality": (photos, len(fields(Quality))),
    }
    for key, tensor in tensors.items():
        if tensor.shape != shapes[key]:
            raise _broken(name, f"{key} has the shape {[*tensor.shape]} and should have {[*shapes[key]]}")
        if tensor.dtype != torch.uint8 if key == "thumbnails" else not tensor.is_floating_point():
            raise _broken(name, f"{key} has numbers of the type {str(tensor.dtype).removeprefix('torch.')}")


def _sizes(tensors: dict[str, Tensor], key: str, dimensions: int, name: str) -> tuple[int, ...]:
    """Raises IdentityError where the tensor has another number of dimensions, or nothing in it."""
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise _broken(name, f"{key} has the shape {[*shape]} and should have {dimensions} dimensions, each at least 1")
    return shape


def _unit(embeddings: Tensor, name: str) -> Tensor:
    """[N,D] as they are where they have unit length, else made so; IdentityError beyond what rounding explains."""
    lengths = embeddings.norm(dim=1)
    number = int((lengths - 1).abs().argmax())
    error = abs(lengths[number].item() - 1)
    if error > ROUNDING:
        raise _broken(name, f"the embedding of photo {number + 1} has the length {lengths[number]:.4g} instead of 1")
    return embeddings if error < 1e-5 else F.normalize(embeddings, dim=1)


def _broken(name: str, what: str) -> IdentityError:
    return IdentityError(f"'{name}' is not a whole identity ({what}): extract and save it again.")
