"""Train the nano recognisers on procedural portraits.

    ridfr train nano recogniser judge --work FOLDER

Two networks that share neither architecture, identities nor loss:
`recogniser` conditions the restoration: an ArcFace IResNet (additive angular margin, helped by regressing the identity
traits); `judge` only evaluates it, so that a restorer cannot please it by overfitting the first: a plain convolutional
network with CosFace's margin on other people.
Both are written in insightface's ONNX format. `recognition.json` beside the weights records per role: steps, seconds,
loss (the last), people and views trained on, parameters, and on held-out test people tar (true accepts at FAR 1 %),
genuine and impostor (mean cosines). `small_faces` then teaches `recogniser` to read small ones.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..faces import ARCFACE_TEMPLATE, align, similarity_transform, warp
from ..nano import WEIGHTS
from ..nano.portraits import SPLITS, traits_of
from ..recognition import CROP_SIZE, embed
from .loop import Recipe, Run
from .portrait_data import PortraitSet, portrait_set

EMBEDDING = 512


class FixedPReLU(nn.PReLU):
    """PReLU whose slopes stay at 0.25: training them would cost a quarter of each step on a CPU."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.25) if self.training else super().forward(x)


class Block(nn.Module):
    """insightface's IBasicBlock: batch norm, conv, batch norm, PReLU, strided conv, batch norm, plus skip."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            *_conv(channels_in, channels, 3), FixedPReLU(channels),
            *_conv(channels, channels, 3, stride))
        self.skip = nn.Sequential(*_conv(channels_in, channels, 1, stride)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)]


def iresnet(layers=(1, 1, 3, 3), widths=(8, 24, 64, 64)) -> nn.Sequential:
    """ArcFace's IResNet with its batch norms, as it is trained; exported, they fold as `recognition.IResNet` has them.

    Maps crops [B,3,112,112], RGB in [-1,1], to raw embeddings [B,512].
    """
    net = [*_conv(3, widths[0], 3), FixedPReLU(widths[0])]
    channels_in = widths[0]
    for depth, channels in zip(layers, widths):
        for index in range(depth):
            net.append(Block(channels_in, channels, 2 if index == 0 else 1))
            channels_in = channels
    flat = channels_in * (CROP_SIZE // 16) ** 2
    return nn.Sequential(*net, nn.BatchNorm2d(channels_in), nn.Flatten(), nn.Linear(flat, EMBEDDING),
                         nn.BatchNorm1d(EMBEDDING))


def plain_net() -> nn.Sequential:
    """The judge's network: no skips, ReLU, a strided stem. Same input and output as `iresnet`."""
    net: list[nn.Module] = []
    channels_in = 3
    for channels, kernel, stride in ((32, 5, 2), (48, 3, 2), (48, 3, 1), (96, 3, 2), (96, 3, 1), (128, 3, 2),
                                     (128, 3, 1), (128, 3, 2)):
        net += [*_conv(channels_in, channels, kernel, stride), nn.ReLU()]
        channels_in = channels
    return nn.Sequential(*net, nn.Flatten(), nn.Linear(channels_in * 16, EMBEDDING), nn.BatchNorm1d(EMBEDDING))


def arcface(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) (Deng et al. 2019, Eq. 3)."""
    sine = (1 - cosine.square()).clamp(min=1e-6).sqrt()
    return cosine * math.cos(margin) - sine * math.sin(margin)


def cosface(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta) - margin (Wang et al., CosFace, CVPR 2018, Eq. 4)."""
    return cosine - margin


@dataclass(frozen=True)
class Role:
    """What makes one recogniser: its network, its loss and its people."""

    network: Callable[[], nn.Sequential]
    margin: Callable[[Tensor, float], Tensor]
    largest_margin: float
    traits: float  # weight of the trait regression at the start; it fades linearly
    split: str
    file: str
    people: int
    views: int
    recipe: Recipe


ROLES = {
    "recogniser": Role(iresnet, arcface, 0.35, 4.0, "train", "insightface/models/nano/rec_nano.onnx", 3000, 8,
                       Recipe(steps=1600, batch=64, lr=2e-3, ema=0.995, weight_decay=0.05)),
    "judge": Role(plain_net, cosface, 0.3, 0.0, "judge", "insightface/models/nano_judge/rec_judge.onnx", 1500, 8,
                  Recipe(steps=2000, batch=96, lr=2e-3, ema=0.995, weight_decay=0.05, seed=1)),
}
SCALE = 24.0  # s of the margin losses
MARGIN_WARMUP = 0.3  # share of the steps over which the margin grows


class Task(nn.Module):
    """A recogniser with what only its training needs: a centre per person, and a linear read-out of the traits."""

    def __init__(self, role: Role, traits: int):
        super().__init__()
        self.role = role
        self.network = role.network()
        self.centres = nn.Parameter(F.normalize(torch.randn(role.people, EMBEDDING), dim=1))
        self.read_out = nn.Linear(EMBEDDING, traits)

    def loss(self, crops: Tensor, people: Tensor, traits: Tensor, progress: float) -> Tensor:
        """crops [B,3,112,112] in [-1,1], people [B] (rows of centres), traits [B,T], progress in [0,1]."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.network(crops)
        direction = F.normalize(features.float(), dim=1)
        cosine = direction @ F.normalize(self.centres, dim=1).T
        margin = self.role.largest_margin * min(progress / MARGIN_WARMUP, 1.0)
        target = self.role.margin(cosine.gather(1, people[:, None]), margin)
        loss = F.cross_entropy(SCALE * cosine.scatter(1, people[:, None], target), people)
        if self.role.traits:
            regression = F.mse_loss(self.read_out(direction * math.sqrt(EMBEDDING)), traits)
            loss = loss + self.role.traits * (1 - progress) * regression
        return loss


def training_crops(images: Tensor, landmarks: Tensor, generator: torch.Generator) -> Tensor:
    """Aligned crops [B,3,112,112] in [-1,1] as a recogniser will meet them in use.

    Landmarks are off by 1.5 % of the eye distance (a detector's error), half the crops are blurred by down-sampling,
    and exposure, colour balance and noise vary. No mirroring: moles and partings belong to one side.
    """
    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(images), channels, 1, 1, generator=generator)

    eyes = (landmarks[:, 1] - landmarks[:, 0]).norm(dim=1).view(-1, 1, 1)
    landmarks = landmarks + 0.015 * eyes * torch.randn(landmarks.shape, generator=generator)
    crops = warp(images, similarity_transform(landmarks, ARCFACE_TEMPLATE), CROP_SIZE)
    groups = list(crops.chunk(8))
    for index in range(len(groups) // 2):
        size = int(CROP_SIZE / (1 + 3 * torch.rand(1, generator=generator).item()))
        small = F.interpolate(groups[index], (size, size), mode="area")
        groups[index] = F.interpolate(small, CROP_SIZE, mode="bilinear", align_corners=False)
    crops = torch.cat(groups)
    crops = (crops - 0.5) * uniform(0.75, 1.25) * uniform(0.9, 1.1, 3) + 0.5 + uniform(-0.1, 0.1)
    crops = crops + uniform(0, 0.06) * torch.randn(crops.shape, generator=generator)
    return crops.clamp(0, 1) * 2 - 1


def verification(
    embeddings: Tensor, people: Tensor, far: float = 0.01, against: Tensor | None = None
) -> dict[str, float]:
    """Accuracy at telling pairs of one person from pairs of two, over all pairs.

    embeddings: [N,512], unit length; people: [N]; against: other embeddings [N,512] of the same people, for the second
    of each pair. Returns tar, the share of genuine pairs above the cosine that a share `far` of the impostor pairs
    exceeds, and the mean cosine of genuine and of impostor pairs.
    """
    cosine = embeddings @ (embeddings if against is None else against).T
    same = people[:, None] == people[None]
    pair = torch.ones_like(same).triu(1)
    genuine, impostor = cosine[same & pair], cosine[~same & pair]
    threshold = impostor.sort().values[int((1 - far) * len(impostor))]
    return {"tar": (genuine > threshold).float().mean().item(), "genuine": genuine.mean().item(),
            "impostor": impostor.mean().item()}


@torch.no_grad()
def evaluate(network: nn.Module, portraits: PortraitSet) -> dict[str, float]:
    """`verification` on the portraits of a set, aligned by their true landmarks."""
    training = network.training
    network.eval()
    rows = torch.arange(len(portraits))
    found = torch.cat([embed(network, align(portraits.batch(part), portraits.landmarks[part]))
                       for part in rows.split(100)])
    network.train(training)
    return verification(found, rows // portraits.views)


@torch.no_grad()
def recalibrate(network: nn.Module, batches: list[Tensor]) -> None:
    """Measure the batch norms' statistics anew, for averaged weights have none of their own. Leaves eval mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    network.train()
    for batch in batches:
        network(batch)
    network.eval()


def export_onnx(network: nn.Module, path: Path) -> None:
    """Write a recogniser as insightface's packs have it: input [N,3,112,112], output [N,512], batch norms folded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(network.eval(), (torch.zeros(1, 3, CROP_SIZE, CROP_SIZE),), str(path), input_names=["input.1"],
                      output_names=["embedding"], dynamic_axes={"input.1": {0: "N"}, "embedding": {0: "N"}},
                      opset_version=11, dynamo=False)


def record(name: str, figures: dict) -> None:
    """Put the figures of one network into recognition.json."""
    path = WEIGHTS / "recognition.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    path.write_text(json.dumps({**known, name: rounded}, indent=2, sort_keys=True) + "\n")


def train_recogniser(work: Path, role_name: str, steps: int | None = None, threads: int = 1) -> dict:
    """Train one recogniser, write its ONNX file and its figures; returns the figures.

    work: folder for portraits and checkpoints; a run that was interrupted goes on from there.
    role_name: "recogniser" or "judge". steps: instead of the recipe's.
    """
    torch.set_num_threads(threads)
    role = ROLES[role_name]
    recipe = role.recipe if steps is None else Recipe(**{**vars(role.recipe), "steps": steps})
    torch.manual_seed(recipe.seed)
    portraits = portrait_set(work, role.split, role.people, role.views)
    held_out = portrait_set(work, "val", 150, 6)
    start = SPLITS[role.split].start
    traits = traits_of(torch.arange(start, start + role.people))
    task = Task(role, traits.shape[1])
    run = Run(work, role_name, task, recipe)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(portraits), (recipe.batch,), generator=generator)
        return training_crops(portraits.batch(rows), portraits.landmarks[rows], generator), rows // portraits.views

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        crops, people = batch(generator)
        value = task.loss(crops, people, traits[people], step / recipe.steps)
        return value, evaluate(task.network, held_out) if (step + 1) % 200 == 0 else {}

    run.train(loss)
    recalibrate(task.network, [batch(recipe.generator(-1 - index))[0] for index in range(40)])
    export_onnx(task.network, WEIGHTS / role.file)
    figures = {"steps": run.step, "seconds": round(run.seconds), "loss": run.history[-1]["loss"],
               "people": role.people, "views": role.views,
               "parameters": sum(p.numel() for p in task.network.parameters()),
               **evaluate(task.network, portrait_set(work, "test", 200, 6))}
    record(role_name, figures)
    return figures
