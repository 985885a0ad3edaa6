"""Saved identities: one safetensors file per person.

Tensors: `embeddings` [N,512], `weights` [N], `thumbnails` uint8 [N,3,112,112]; `clip` [N,T,D] and `clip_uncond` [T,D]
where CLIP was used; `quality` [N,4] where it is known. Metadata: `format` "ridfr-identity", `version` "1", `recogniser`
(its name) and `recogniser_sha256` (FaceModel.digest).
"""

import re
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import read, write
from .identity import Identity, IdentityError, Person, Quality

FORMAT, VERSION = "ridfr-identity", "1"
LONGEST_NAME = 100
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))}


def file_name(name: str, number: int | None = None) -> str:
    """NAME.safetensors or "NAME number.safetensors" for what a user typed, safe in every file system: characters that
    mean something in a path become "_", dots and spaces at the ends go.

    Raises IdentityError where nothing is left of it.
    """
    stem = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", name).strip(" .")[:LONGEST_NAME].strip(" .")
    if not stem.strip("_"):
        raise IdentityError(f"{name!r} is no name for a file: write the person's name.")
    if stem.split(".")[0].strip().lower() in RESERVED:
        stem = f"_{stem}"
    return f"{stem}.safetensors" if number is None else f"{stem} {number}.safetensors"


def save_identity(identity: Identity, path: Path) -> None:
    """Write an identity of one person, whole or not at all; an existing file is replaced.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    write({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata)


def load_identity(path: Path) -> Identity:
    """The person of a file that `save_identity` wrote.

    Raises IdentityError for another file, CheckpointError for a damaged one; both name it.
    """
    tensors, metadata = read(path)
    if metadata.get("format") != FORMAT:
        raise IdentityError(f"'{path.name}' is not a saved identity: choose a file that Save Identity wrote.")
    if metadata.get("version") != VERSION:
        raise IdentityError(
            f"'{path.name}' is a saved identity of version {metadata.get('version')} and this pack reads {VERSION}: "
            "update the pack."
        )
    _check(tensors, path.name)
    quality = tuple(Quality(*row) for row in tensors["quality"].tolist()) if "quality" in tensors else ()
    person = Person(tensors["embeddings"], tensors.get("clip"), tensors["weights"], quality)
    thumbnails = tensors["thumbnails"].float() / 255
    digest, name = metadata["recogniser_sha256"], metadata["recogniser"]
    return Identity((person,), tensors.get("clip_uncond"), digest, thumbnails, name)


def _check(tensors: dict[str, Tensor], name: str) -> None:
    """Raises IdentityError where a tensor is missing or counts another number of photos than the embeddings."""
    missing = {"embeddings", "weights", "thumbnails"} - tensors.keys()
    photos = len(tensors.get("embeddings", ()))
    odd = [key for key, tensor in tensors.items() if key != "clip_uncond" and len(tensor) != photos]
    if missing or odd or ("clip" in tensors) != ("clip_uncond" in tensors):
        wrong = ", ".join(sorted(missing) or odd or ["clip"])
        raise IdentityError(f"'{name}' is no whole identity ({wrong} is wrong or missing): extract and save it again.")
