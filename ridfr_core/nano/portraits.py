"""Procedural portraits: an identity seed fixes the face, a view seed everything else."""

from dataclasses import dataclass

import torch

from .portrait_chart import CLASSES, face_chart
from .portrait_geometry import FRAME, layout, rotation, surface_depth, turn
from .portrait_scene import compose
from .portrait_traits import NUISANCES, TRAITS, identity_keys, named, uniform, view_keys

SPLITS = {
    "train": range(0, 1_000_000),
    "val": range(1_000_000, 1_010_000),
    "test": range(1_010_000, 1_020_000),
    "judge": range(2_000_000, 3_000_000),
}
PARSING = CLASSES
CAPTION = len(TRAITS) + len(NUISANCES)
_FRECKLES = 22
_CHUNK = 16  # portraits drawn at once: keeps the working set in cache


@dataclass
class Portraits:
    """image [B, 3, S, S] float32 in [0, 1]; landmarks [B, 5, 2] pixels; parsing [B, S, S] uint8 indices into PARSING;
    traits [B, len(TRAITS)] float32 of zero mean and unit variance."""

    image: torch.Tensor
    landmarks: torch.Tensor
    parsing: torch.Tensor
    traits: torch.Tensor


def traits_of(identities: torch.Tensor) -> torch.Tensor:
    """The standardised identity vectors: int64 seeds [B] -> float32 [B, len(TRAITS)], zero mean, unit variance."""
    return uniform(identity_keys(identities), len(TRAITS)) * 3**0.5


def captions(identities: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """All that a portrait is drawn from, freckles aside: int64 seeds [B], [B] -> float32 [B, CAPTION] in [-1, 1)."""
    return torch.cat([uniform(identity_keys(identities), len(TRAITS)),
                      uniform(view_keys(identities, views), len(NUISANCES))], 1)


def render(identities: torch.Tensor, views: torch.Tensor, size: int = 128) -> Portraits:
    """Draws one portrait per pair of seeds.

    identities, views: int64 [B]. Each portrait depends on its own pair alone, whatever else is in the batch. Pixel
    centres lie at integer coordinates (as in OpenCV), and the landmarks scale exactly with `size`.
    """
    parts = [_render(i, v, size) for i, v in zip(identities.split(_CHUNK), views.split(_CHUNK), strict=True)]
    return Portraits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _render(identities, views, size):
    raw = uniform(identity_keys(identities), len(TRAITS) + 2 * _FRECKLES)
    t = named(TRAITS, raw)
    spots = raw[:, len(TRAITS):, None, None].unflatten(1, (_FRECKLES, 2)).unbind(1)
    spots = [spot.unbind(1) for spot in spots]
    v = named(NUISANCES, uniform(view_keys(identities, views), len(NUISANCES)))
    p = layout(t, v)
    rot = rotation(v)
    light = light_direction(v)
    chart = face_chart(t, v, spots, p, unturn(rot, light))
    points = landmarks_of(p, rot, chart)
    frame = Frame.of(v, p, points)
    image, parsing = compose(t, v, p, rot, chart, frame, light, size)
    landmarks = frame.to_pixels(points) * (size / FRAME)
    return image, landmarks, parsing, raw[:, :len(TRAITS)] * 3**0.5


def light_direction(v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vector towards the key light in turned coordinates."""
    x, y = 0.85 * v.light_x, -0.35 + 0.5 * v.light_y
    norm = torch.sqrt(x * x + y * y + 0.55)
    return x / norm, y / norm, 0.55**0.5 / norm


def unturn(rot, vector):
    """Turned -> head coordinates: the transpose of `turn`."""
    cy, sy, cp, sp = rot
    x, y, z = vector
    depth = z * cp - y * sp
    return x * cy - depth * sy, y * cp + z * sp, x * sy + depth * cy


def landmarks_of(p, rot, chart) -> torch.Tensor:
    """The five points in turned coordinates [B, 5, 2]."""
    zero = torch.zeros_like(p["eye_x"])
    x = torch.cat((-p["eye_x"], p["eye_x"], zero, -p["mouth_half"], p["mouth_half"]), 1)
    y = torch.cat((zero, zero, p["nose_tip"], p["corner"], p["corner"]), 1)
    X, Y, _ = turn(rot, x, y, surface_depth(chart["shape"], x, y))
    return torch.cat((X, Y), -1)


@dataclass
class Frame:
    """Similarity from turned coordinates to the 128-pixel frame: zoom, roll, and the point that lands on `target`."""

    zoom: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    centre: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, v, p, points):
        # FFHQ's crop: its side is the larger of 4 eye distances and 3.6 eye-to-mouth lengths, here a little wider
        side = torch.maximum(4.65 * 2 * p["eye_x"], 3.95 * p["mouth"])
        zoom = (FRAME / side * (1 + 0.05 * v.zoom))
        roll = v.roll * 0.16
        target = torch.stack((64 + 2.5 * v.shift_x, 58 + 2.5 * v.shift_y), -1)[:, 0]
        eyes = points[:, :2].mean(1, keepdim=True)
        return cls(zoom, torch.cos(roll), torch.sin(roll), eyes, target)

    def to_pixels(self, points):
        x, y = (points - self.centre).unbind(-1)
        x, y = x[..., None], y[..., None]
        turned = torch.cat((x * self.cosine - y * self.sine, x * self.sine + y * self.cosine), -1)
        return turned * self.zoom + self.target

    def from_pixels(self, px, py):
        x, y = (px - self.target[..., :1]) / self.zoom, (py - self.target[..., 1:]) / self.zoom
        return (x * self.cosine + y * self.sine + self.centre[..., :1],
                y * self.cosine - x * self.sine + self.centre[..., 1:])
