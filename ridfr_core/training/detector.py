"""Train the nano detector: five landmarks per face, in the ONNX layout of insightface's SCRFD.

    ridfr train nano detector --work FOLDER

Guo et al., "Sample and Computation Redistribution for Efficient Face Detection", ICLR 2022. Anchors are points: the
location (i, j) of a map of stride s stands for the pixel (s i, s j), twice, for a smaller and a larger face. Per anchor
the network gives a score, the distances to the box's sides and the offsets of the landmarks, in units of the stride.
One location knows the landmarks only roughly, so they are refined: a field at half the stride says, for every place
and each of the five, how far the landmark is from there, and each is moved by what the field says at its estimate.
Scenes are made of portraits at all scales, some degraded. The figures go to `recognition.json` under "detector": steps,
seconds, loss, parameters; found and landmark_error on held-out test portraits of 128 px, by `faces.Detector` and, with
"_insightface", by FaceAnalysis as it comes: the share of portraits where one face was found, and the mean distance of
the landmarks from the truth over the distance of the eyes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..degradation import DegradationRange, degrade
from ..faces import ARCFACE_TEMPLATE, Detector, similarity_transform, warp
from ..nano import WEIGHTS
from ..nano.config import PORTRAIT
from .loop import Recipe, Run
from .portrait_data import PortraitSet, portrait_set
from .recogniser import recalibrate, record

STRIDES = (8, 16, 32)
# Face sizes (geometric mean of box width and height) of the anchors. Smaller than SCRFD's for a stride: a portrait of
# 128 px falls to stride 8, where a pixel is not as small a part of a cell.
SIDES = ((24, 72), (144, 224), (320, 512))
VALUES = 15  # score, box, landmarks
BOX = torch.tensor([[12.0, 4.0], [100.0, 116.0]])  # of an upright face, where its landmarks are ARCFACE_TEMPLATE
CANVASES = (128, 128, 128, 256, 384, 640)  # one is drawn per step
PIXELS = 640 * 640  # per step
DAMAGE = DegradationRange(sigma=(0.2, 3), ratio=(1, 6), noise=(0, 15), quality=(40, 100))
FILE = "det_nano.onnx"  # of both packs
RECIPE = Recipe(steps=2400, batch=0, lr=3e-3, ema=0.995)  # the batch depends on the canvas
FREEZE = 0.5  # share of the steps after which batch norms keep their statistics


def _conv(channels_in: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, dilation, dilation, bias=False),
                         nn.BatchNorm2d(channels), nn.ReLU())


class DetectorNet(nn.Module):
    """Convolutions down to stride 32, a pyramid back up to stride 4, a head and a refining field per stride.

    Maps images [B,3,H,W], RGB, (x - 127.5) / 128 of 0..255, sides multiples of 32, to
    anchors: over strides, [B, 2 H W / s^2, 15]: score logit, box and landmark distances in strides;
    fields: over strides, [B,10,2H/s,2W/s], (x, y) of each landmark in strides.
    """

    def __init__(self, widths=(16, 32, 48, 64, 96), pyramid: int = 48):
        super().__init__()
        stem, quarter, *rest = widths
        self.stem = nn.Sequential(_conv(3, stem, 2), _conv(stem, quarter, 2), _conv(quarter, quarter))
        self.stages = nn.ModuleList([
            nn.Sequential(_conv(quarter, rest[0], 2), _conv(rest[0], rest[0]), _conv(rest[0], rest[0])),
            nn.Sequential(_conv(rest[0], rest[1], 2), _conv(rest[1], rest[1])),
            # dilation lets the coarsest map see a face that fills a frame of 640
            nn.Sequential(_conv(rest[1], rest[2], 2), *(_conv(rest[2], rest[2], dilation=d) for d in (1, 2, 4)))])
        self.laterals = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in widths[1:])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(pyramid, pyramid, 2, 2) for _ in STRIDES)
        self.heads = nn.ModuleList(
            nn.Sequential(_conv(pyramid, pyramid), _conv(pyramid, pyramid), nn.Conv2d(pyramid, 2 * VALUES, 1))
            for _ in STRIDES)
        for head in self.heads:
            nn.init.constant_(head[-1].bias.data[::VALUES], -4.0)  # faces are rare
        self.fields = nn.ModuleList(nn.Sequential(_conv(pyramid, pyramid), nn.Conv2d(pyramid, 10, 1)) for _ in STRIDES)
        for stride, sides in zip(STRIDES, SIDES):  # brings the distances to the order of 1
            unit = torch.tensor([[1.0] + [side / stride] * (VALUES - 1) for side in sides])
            self.register_buffer(f"unit{stride}", unit.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        maps = [lateral(m) for lateral, m in zip(self.laterals, maps)]
        for level in (2, 1, 0):
            maps[level] = maps[level] + self.ups[level](maps[level + 1])
        values = [head(m) * getattr(self, f"unit{s}") for head, m, s in zip(self.heads, maps[1:], STRIDES)]
        anchors = [v.permute(0, 2, 3, 1).reshape(v.shape[0], -1, VALUES) for v in values]
        return anchors, [field(m) for field, m in zip(self.fields, maps)]


def estimate(values: Tensor, field: Tensor, points: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Landmarks [B,A,5,2] px by the anchors of one stride: as each says itself, and refined by the field."""
    own = points[:, None] + stride * values[..., 5:].reshape(values.shape[0], -1, 5, 2)
    return own, refine(own.detach(), field, stride)


def refine(landmarks: Tensor, field: Tensor, stride: int) -> Tensor:
    """Move landmarks [B,A,5,2] px by the field [B,10,h,w] of a stride, twice."""
    batch, count = landmarks.shape[:2]
    field = field.float().reshape(-1, 2, field.shape[2], field.shape[3])
    extent = stride // 2 * anchor_points(field, 1)[-1]  # the last pixel it covers
    points = landmarks.transpose(1, 2).reshape(-1, count, 1, 2)
    for _ in range(2):
        move = F.grid_sample(field, 2 * points / extent - 1, padding_mode="border", align_corners=True)
        points = points + stride * move.permute(0, 2, 3, 1)
    return points.reshape(batch, 5, count, 2).transpose(1, 2)


class ScrfdOutputs(nn.Module):
    """The network as SCRFD's ONNX files have it: one image in; scores, boxes, landmarks of each stride out."""

    def __init__(self, net: DetectorNet):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, fields = self.net(x)
        landmarks = []
        for v, field, stride in zip(values, fields, STRIDES):
            points = anchor_points(x, stride)
            _, refined = estimate(v, field, points, stride)
            landmarks.append(((refined[0] - points[:, None]) / stride).reshape(-1, 10))
        return (*(v[0, :, :1].sigmoid() for v in values), *(v[0, :, 1:5] for v in values), *landmarks)


def export_onnx(net: DetectorNet, path: Path) -> None:
    """Write a detector that insightface's SCRFD class reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    axes = {"input.1": {2: "height", 3: "width"}, **{name: {0: f"anchors_{name[-2:]}"} for name in names}}
    torch.onnx.export(ScrfdOutputs(net).eval(), (torch.zeros(1, 3, 128, 128),), str(path), input_names=["input.1"],
                      output_names=names, dynamic_axes=axes, opset_version=16, dynamo=False)
    _halve(path)


def _halve(path: Path) -> None:
    """Store an ONNX file's weights in half precision; the runtime casts them back when it loads them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = (model := onnx.load(str(path))).graph
    weights = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    for tensor in weights:
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), f"{tensor.name}.half")
        graph.node.insert(0, helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
    onnx.save(model, str(path))


def anchor_points(images: Tensor, stride: int) -> Tensor:
    """Pixels [A,2] that the anchors of one stride stand for, in the order of the outputs."""
    ones = torch.ones_like(images[0, 0, ::stride, ::stride])  # counted up rather than `arange`, to export any size
    grid = torch.stack([ones.cumsum(1) - 1, ones.cumsum(0) - 1], -1) * stride
    return grid.reshape(-1, 1, 2).expand(-1, 2, 2).reshape(-1, 2)


def anchors(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(points [A,2], strides [A], sides [A]) of all anchors of an input."""
    points = [anchor_points(images, stride) for stride in STRIDES]
    strides = [torch.full((len(p),), float(stride)) for p, stride in zip(points, STRIDES)]
    sides = [torch.tensor(pair, dtype=torch.float32).repeat(len(p) // 2) for p, pair in zip(points, SIDES)]
    return torch.cat(points), torch.cat(strides), torch.cat(sides)


def face_boxes(landmarks: Tensor) -> Tensor:
    """Boxes [...,4] around the heads that landmarks [...,5,2] belong to: the template's box, moved and scaled."""
    flat = landmarks.reshape(-1, 5, 2)
    matrix = similarity_transform(ARCFACE_TEMPLATE.expand_as(flat), flat)
    scale = torch.linalg.det(matrix[:, :, :2]).sqrt()[:, None]
    centre = (matrix[:, :, :2] @ BOX.mean(0) + matrix[:, :, 2])
    half = scale * (BOX[1] - BOX[0]) / 2
    return torch.cat([centre - half, centre + half], 1).view(*landmarks.shape[:-2], 4)


def detection_loss(net: DetectorNet, images: Tensor, landmarks: Tensor, present: Tensor) -> Tensor:
    """Focal loss of the scores plus L1 of boxes, landmarks and refined landmarks relative to the face's size.

    landmarks: [B,K,5,2] px of up to K faces; present: [B,K] bool. An anchor is positive for a face of its size (within
    a factor of 1.7) whose centre is within a stride; up to two strides it counts neither way.
    """
    with torch.autocast("cpu", torch.bfloat16):
        values, fields = net(images)
    own, refined = (torch.cat(all_strides, 1) for all_strides in zip(*(
        estimate(v.float(), field, anchor_points(images, s), s) for v, field, s in zip(values, fields, STRIDES))))
    values = torch.cat(values, 1).float()
    points, strides, sides = anchors(images)
    boxes = face_boxes(landmarks)
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    away = (points - (boxes[..., None, :2] + boxes[..., None, 2:]) / 2).abs().amax(-1) / strides  # [B,K,A]
    misfit = (sides.log2() - side.clamp(SIDES[0][0], SIDES[-1][-1]).log2()[..., None]).abs()
    away = torch.where((misfit < 0.77) & present[..., None], away, math.inf)
    nearest, which = away.min(1)  # [B,A]
    positive, certain = nearest < 1, (nearest < 1) | (nearest > 2)

    score = values[..., 0]
    probability = score.sigmoid()
    wrong = torch.where(positive, 1 - probability, probability)
    focal = F.binary_cross_entropy_with_logits(score, positive.float(), reduction="none") * wrong.square()
    count = positive.sum().clamp(min=1)

    image, anchor = positive.nonzero(as_tuple=True)
    face = which[image, anchor]
    box, point = boxes[image, face], points[anchor]
    edges = torch.cat([point - box[:, :2], box[:, 2:] - point], 1)
    error = (values[image, anchor, 1:5] * strides[anchor, None] - edges).abs().sum(1)
    for found, weight in ((own, 2), (refined, 4)):
        error = error + weight * (found[image, anchor] - landmarks[image, face]).abs().sum((1, 2))
    return (focal * certain).sum() / count + 2 * (error / side[image, face]).sum() / count


def scene(portraits: PortraitSet, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random scenes: images [B,3,size,size] in [0,1], landmarks [B,K,5,2] px, present [B,K].

    Either each holds one portrait that fills the canvas more or less, or up to three at any scale, the later ones in
    front. Landmarks scale with the image by the plain factor, not about pixel centres: that is how insightface maps
    them back.
    """
    batch = PIXELS // size**2
    alone = torch.rand(1, generator=generator).item() < 0.6

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    # padding is black: a share of the backgrounds is too
    colour = uniform(0, 1, 3, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.7)
    canvas = F.interpolate(colour * uniform(0.5, 1, 3, 5, 5), (size, size), mode="bilinear")
    landmarks, present = torch.zeros(batch, 0, 5, 2), torch.zeros(batch, 0, dtype=torch.bool)
    for _ in range(1 if alone else 3):
        images, points = _portraits(portraits, batch, generator)
        if alone:
            side, at = (0.6 + 1.5 * uniform(0, 1).square()) * size, 0.5 + uniform(-0.15, 0.15, 2)
        else:
            side, at = 48 * (1.2 * size / 48) ** uniform(0, 1), uniform(-0.1, 1.1, 2)
        linear, shift = _placement(side, at * (size - side)[:, None], uniform(-0.4, 0.4) * uniform(0, 1))
        used = uniform(0, 1) < (0.97 if alone else 0.6)
        centres = shift + linear.sum(2, keepdim=True) / 2 - 0.5  # pixel centres lie half a pixel inside
        placed = warp(F.pad(images, (0, 0, 0, 0, 0, 1), value=1.0), torch.cat([linear, centres], 2), size)
        placed = placed * used.view(-1, 1, 1, 1)
        mask = placed[:, 3:]
        canvas = canvas * (1 - mask) + placed[:, :3]
        points = points @ linear.transpose(1, 2) + shift.transpose(1, 2)
        inside = ((points > 0) & (points < size)).all(-1).sum(1) >= 4
        present = torch.cat([present & ~_covered(landmarks, mask), (used & inside)[:, None]], 1)
        landmarks = torch.cat([landmarks, points[:, None]], 1)
    canvas = canvas * uniform(0.7, 1.2, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    return canvas.clamp(0, 1), landmarks, present


def _placement(side: Tensor, corner: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(linear [B,2,2], shift [B,2,1]) that put a portrait into a square of that side and corner, turned on the spot."""
    scale = (side / PORTRAIT).view(-1, 1, 1)
    linear = scale * torch.stack([torch.stack([angle.cos(), -angle.sin()], 1),
                                  torch.stack([angle.sin(), angle.cos()], 1)], 1)
    middle = torch.full((2, 1), PORTRAIT / 2)
    return linear, corner[..., None] + scale * middle - linear @ middle


def _covered(landmarks: Tensor, mask: Tensor) -> Tensor:
    """Whether any landmark [B,K,5,2] lies under a mask [B,1,S,S]."""
    batch, faces = landmarks.shape[:2]
    at = landmarks.round().long().clamp(0, mask.shape[-1] - 1).view(batch, -1, 2)
    under = mask[torch.arange(batch)[:, None], 0, at[..., 1], at[..., 0]] > 0
    return under.view(batch, faces, 5).any(2)


def _portraits(portraits: PortraitSet, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images, landmarks) of random portraits, a fifth of them degraded."""
    rows = torch.randint(len(portraits), (count,), generator=generator)
    images = portraits.batch(rows)
    damaged = torch.rand(count, generator=generator) < 1 / 5
    if damaged.any():
        drawn = DAMAGE.draw(int(damaged.sum()), generator)
        images[damaged] = degrade(images[damaged], **drawn, generator=generator)
    return images, portraits.landmarks[rows]


def landmark_error(found: Tensor, truth: Tensor) -> float:
    """Mean distance [.,5,2] over the distance of the true eyes."""
    eyes = (truth[:, 1] - truth[:, 0]).norm(dim=-1)
    return ((found - truth).norm(dim=-1).mean(1) / eyes).mean().item()


def evaluate(pack: Path, portraits: PortraitSet) -> dict[str, float]:
    """Share of portraits with one face found and the landmark error there, by our Detector and by insightface."""
    from insightface.app import FaceAnalysis

    ours = Detector(pack / FILE)
    theirs = FaceAnalysis(name=str(pack), allowed_modules=["detection"], providers=["CPUExecutionProvider"])
    theirs.prepare(ctx_id=-1)
    figures = {}
    for suffix, detect in (("", lambda row: [face.landmarks for face in ours.detect(portraits.batch(row)[0])]),
                           ("_insightface", lambda row: _insightface(theirs, portraits.images[row.item()]))):
        found, truth = [], []
        for row in torch.arange(len(portraits)).split(1):
            faces = detect(row)
            if len(faces) == 1:
                found.append(faces[0])
                truth.append(portraits.landmarks[row.item()])
        figures[f"found{suffix}"] = len(found) / len(portraits)
        figures[f"landmark_error{suffix}"] = landmark_error(torch.stack(found), torch.stack(truth)) if found else None
    return figures


def _insightface(analysis, image) -> list[Tensor]:
    return [torch.from_numpy(face.kps) for face in analysis.get(image[::-1].transpose(1, 2, 0).copy())]


def freeze_norms(net: nn.Module, path: Path, batches: Callable[[], list[Tensor]]) -> None:
    """Fix the batch norms' statistics, measured on `batches` once and then kept in a file.

    A batch holds one size of canvas, and its statistics differ from those of the mixture so much that a net trained
    on the former alone fails on the largest canvases with the latter.
    """
    if not path.exists():
        recalibrate(net, batches())
        torch.save(dict(net.named_buffers()), path)
    net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    net.eval()


def train_detector(work: Path, steps: int | None = None, threads: int = 1) -> dict:
    """Train the detector, write its ONNX file and its figures; returns the figures.

    work: folder for portraits and checkpoints; a run that was interrupted goes on from there. steps: instead of the
    recipe's.
    """
    torch.set_num_threads(threads)
    recipe = RECIPE if steps is None else Recipe(**{**vars(RECIPE), "steps": steps})
    torch.manual_seed(recipe.seed)
    portraits = portrait_set(work, "train", 3000, 8)
    net = DetectorNet()
    run = Run(work, "detector", net, recipe)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        size = CANVASES[torch.randint(len(CANVASES), (1,), generator=generator)]
        images, landmarks, present = scene(portraits, size, generator)
        return (images * 255 - 127.5) / 128, landmarks, present

    def freeze() -> None:
        freeze_norms(net, work / "detector-norms.pt",
                     lambda: [batch(recipe.generator(-1 - index))[0] for index in range(60)])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if step >= FREEZE * recipe.steps and net.training:
            freeze()
        return detection_loss(net, *batch(generator))

    run.train(loss)
    freeze()  # a run that was complete when it was started took no step
    models = WEIGHTS / "insightface" / "models"
    for pack in ("nano", "nano_judge"):
        export_onnx(net, models / pack / FILE)
    figures = {"steps": run.step, "seconds": round(run.seconds), "loss": run.history[-1]["loss"],
               "parameters": sum(p.numel() for p in net.parameters()),
               **evaluate(models / "nano", portrait_set(work, "test", 200, 2))}
    record("detector", figures)
    return figures
