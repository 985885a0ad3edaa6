"""The state of a run on disk: tensors as safetensors, numbers as JSON, so no file of a checkpoint can hold code."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .settings import TrainingError

TENSORS, NUMBERS = "tensors.safetensors", "numbers.json"


def write_state(folder: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, object]) -> None:
    """Make the folder. numbers: what JSON can hold."""
    folder.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_state` wrote, the tensors on the CPU. Raises TrainingError, a few words, where it is damaged."""
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{TENSORS} is not there or damaged") from error
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{NUMBERS} is not there or damaged") from error
    return tensors, numbers if isinstance(numbers, dict) else {}


def check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises TrainingError, a few words, where a tensor is missing, of another shape or type, or not finite."""
    for name, tensor in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise TrainingError(f"{TENSORS} has no {name}, or one of another shape")
        if not torch.isfinite(found).all():
            raise TrainingError(f"{name} in {TENSORS} is not finite")


def number(numbers: Mapping[str, object], name: str, kind: type) -> float:
    """One of the numbers, at least 0. Raises TrainingError, a few words, where it is not."""
    value = numbers.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value < math.inf:
        raise TrainingError(f"{NUMBERS} says {name} = {value!r}")
    return kind(value)
