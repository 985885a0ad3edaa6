"""Teach the trained recogniser to read small faces: `ridfr train nano small`.

The embedding of a shrunken portrait is drawn to the one that the recogniser gave for the whole portrait before, so that
the space of embeddings stays nearly as it was, and with it what was trained on it.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..faces import align
from ..nano import WEIGHTS
from ..nano.config import PORTRAIT
from ..recognition import Affine, IResNet, embed, load_iresnet
from .loop import Recipe, Run
from .portrait_data import SIZES, PortraitSet, portrait_set
from .recogniser import ROLES, export_onnx, record, training_crops, verification
from .references import shrink

RECIPE = Recipe(steps=2400, batch=48, lr=1e-3, ema=0.995, cooldown=0.7)


def train_small_faces(work: Path) -> dict:
    """Train the recogniser of the bundle on, write its ONNX file and its figures; returns the figures.

    tar_SIZE, genuine_SIZE and impostor_SIZE are `verification` of portraits of SIZE pixels against whole ones.
    """
    role = ROLES["recogniser"]
    path, portraits = WEIGHTS / role.file, portrait_set(work, role.split, role.people, role.views)
    student = load_iresnet(path)
    run = teach(work, student, load_iresnet(path), portraits)
    export_onnx(with_batch_norms(student), path)
    sizes = at_sizes(student, portrait_set(work, "test", 200, 6))
    figures = {f"{name}_{size}": value for size, found in sizes.items() for name, value in found.items()}
    figures |= {"steps": run.step, "seconds": round(run.seconds), "loss": run.history[-1]["loss"]}
    record("small", figures)
    return figures


def teach(work: Path, student: IResNet, teacher: IResNet, portraits: PortraitSet, recipe: Recipe = RECIPE) -> Run:
    """Train the student's convolutions; its folded norms and its slopes stay."""
    known = portraits.feature("embeddings", teacher, lambda *photos: embed(teacher, align(*photos)))
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.ndim > 1)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(portraits), (recipe.batch,), generator=generator)
        groups = zip(SIZES, rows.chunk(len(SIZES)))
        crops = torch.cat([small_crops(portraits, part, size, generator) for size, part in groups])
        with torch.autocast("cpu", torch.bfloat16):
            seen = student(crops)
        return 1 - F.cosine_similarity(seen.float(), known[rows].float()).mean()

    run = Run(work, "small", student, recipe)
    run.train(loss)
    return run


def small_crops(portraits: PortraitSet, rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Aligned crops [B,3,112,112] in [-1,1] of portraits shrunk to size x size, with a detector's and a camera's
    errors."""
    return training_crops(*shrink(portraits.batch(rows), portraits.landmarks[rows], size), generator)


def with_batch_norms(net: IResNet) -> IResNet:
    """A copy with batch norms for its affine layers, as insightface's files have them."""
    net = copy.deepcopy(net)
    for parent in [*net.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, Affine):
                kind = nn.BatchNorm1d if child is net.features else nn.BatchNorm2d
                norm = kind(len(child.scale))
                norm.weight, norm.bias = child.scale, child.shift
                norm.running_var -= norm.eps
                setattr(parent, name, norm)
    return net


@torch.no_grad()
def at_sizes(network: nn.Module, portraits: PortraitSet) -> dict[int, dict[str, float]]:
    """`verification` for each size: every portrait shrunk, against all whole ones."""
    found = {}
    for size in SIZES:
        parts = [embed(network, align(*shrink(portraits.batch(rows), portraits.landmarks[rows], size)))
                 for rows in torch.arange(len(portraits)).split(100)]
        found[size] = torch.cat(parts)
    people, whole = torch.arange(len(portraits)) // portraits.views, found[PORTRAIT]
    return {size: verification(small, people, against=whole) for size, small in found.items()}
