"""Random numbers that depend on what they are for, and on nothing else."""

import hashlib

import torch


def seed_of(*purpose: int | str) -> int:
    """A number of 63 bits that depends on all of these and on their order, such as a seed and the number of a draw.

    Another list has another number: (0, 1000003) and (1, 0) do not meet.
    """
    digest = hashlib.sha256(repr(purpose).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator that begins with `seed_of` these."""
    return torch.Generator().manual_seed(seed_of(*purpose))
