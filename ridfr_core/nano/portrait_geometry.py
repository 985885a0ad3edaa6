"""The head: a skull of elliptic cross-sections with a height chart of the face on it, turned and projected.

Head coordinates are pixels of the 128-pixel frame at zoom 1: x to the viewer's right, y down from the eye line,
z towards the viewer. The chart samples the face's front over CHART_X x CHART_Y.
"""

import math

import torch
import torch.nn.functional as F

CHART_X = (-40.0, 40.0)
CHART_Y = (-56.0, 64.0)
CHART_STEP = 0.8
FRAME = 128.0


def chart_axes(device) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the chart's samples."""
    def axis(low, high):
        return torch.linspace(low, high, round((high - low) / CHART_STEP) + 1, device=device)
    return axis(*CHART_X)[None, None], axis(*CHART_Y)[None, :, None]


def bell(value: torch.Tensor, width) -> torch.Tensor:
    return torch.exp(-((value / width) ** 2))


def smooth(value: torch.Tensor, width) -> torch.Tensor:
    """Antialiased step: 0 to 1 as value goes from -width/2 to width/2."""
    return (value / width + 0.5).clamp(0, 1)


def signed_root(value: torch.Tensor, power) -> torch.Tensor:
    return torch.sign(value) * value.abs().clamp_min(1e-6) ** power


def layout(t, v) -> dict:
    """Places of the features in head coordinates, each [B, 1, 1], from traits t and nuisances v."""
    chin = 49 + 7 * t.face_length
    smile, opening = v.smile * 0.5 + 0.3 * v.smile.abs() + 0.08, 5.5 * (v.mouth_open - 0.15).clamp_min(0)
    nose_tip = 0.395 * chin + 3.4 * t.nose_length
    mouth = nose_tip + 0.235 * chin + 2.6 * t.mouth_height
    mouth_half = 10.2 + 2.8 * t.mouth_width + 1.8 * smile
    return dict(
        top=46 + 4 * t.skull_height, chin=chin + 0.6 * opening, width=32.5 + 3.8 * t.skull_width,
        eye_x=14.3 + 2.0 * t.eye_spacing, nose_tip=nose_tip, mouth=mouth, mouth_half=mouth_half, smile=smile,
        opening=opening, corner=mouth - 2.8 * smile,
        eye_half=7.2 + 1.25 * t.eye_size,
    )


def skull(t, p, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half width, half depth and centre depth of the skull's elliptic section at height y; negative beyond its ends."""
    above = 1 - (y.clamp_max(0).abs() / p["top"]) ** 2.3
    s = y.clamp_min(0) / p["chin"]
    jaw = signed_root(1 - s ** (2.6 + 0.95 * t.jaw_square), 1 / (1.75 + 0.45 * t.chin_width))
    jaw = jaw * (1 + 0.14 * t.jaw_width * bell(s - 0.72, 0.3) + 0.07 * t.cheekbone * bell(s - 0.25, 0.2))
    ends = torch.where(y < 0, signed_root(above, 0.5), jaw)
    depth_ends = torch.where(y < 0, signed_root(above, 0.5), signed_root(1 - s**6, 0.5))
    centre = (15 + 2.5 * t.chin_out) * s.clamp_max(1.2) ** 2
    return p["width"] * ends, (38 - 15 * s**2 - 4 * s).clamp_min(8) * depth_ends, centre


def rotation(v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosine and sine of the yaw, then of the pitch, each [B, 1, 1]."""
    yaw, pitch = v.yaw * math.radians(30), v.pitch * math.radians(13)
    return torch.cos(yaw), torch.sin(yaw), torch.cos(pitch), torch.sin(pitch)


def turn(rot, x, y, z):
    """Head -> turned coordinates (orthographic image x, y and depth)."""
    cy, sy, cp, sp = rot
    depth = z * cy - x * sy
    return x * cy + z * sy, y * cp - depth * sp, y * sp + depth * cp


def sample(chart: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Chart [B, C, H, W] read at head coordinates x, y [B, h, w] -> [B, C, h, w]."""
    u = (x - CHART_X[0]) * (2 / (CHART_X[1] - CHART_X[0])) - 1
    w = (y - CHART_Y[0]) * (2 / (CHART_Y[1] - CHART_Y[0])) - 1
    return F.grid_sample(chart, torch.stack((u, w), -1), mode=mode, padding_mode="border", align_corners=True)


def cast(rot, shape: torch.Tensor, X: torch.Tensor, Y: torch.Tensor, steps: int = 5) -> dict:
    """Meets each ray (X, Y) [B, h, w] with the head.

    shape [B, 5, H, W] charts the section's half width, half depth, height, and the y slopes of the first two.

    At a fixed height y the section is an ellipse shifted by the chart's height, met in closed form; y and the height
    follow by fixed-point iteration. Returns head coordinates x, y, z, the unnormalised base normal, and `edge`, the
    signed distance inside the silhouette.
    """
    cy, sy, cp, sp = rot
    depth = torch.full_like(X, 18.0)
    y = (Y + depth * sp) / cp
    for step in range(steps):
        x = X * cy - depth * sy
        width, deep, height, dwidth, ddeep = sample(shape, x, y).unbind(1)
        w2, d2 = width.clamp_min(1) ** 2, deep.clamp_min(1) ** 2
        forward = X * sy - height
        a = sy**2 / w2 + cy**2 / d2
        b = forward * cy / d2 - X * cy * sy / w2
        c = (X * cy) ** 2 / w2 + forward**2 / d2 - 1
        depth = (torch.sqrt((b * b - a * c).clamp_min(0)) - b) / a
        y = torch.lerp(y, (Y + depth * sp) / cp, 1.0 if step < 2 else 0.7)
    x, z = X * cy - depth * sy, X * sy + depth * cy
    front = (z - height).clamp_min(0.5)
    normal = torch.stack((x / w2, -(x**2 * dwidth / (w2 * width.clamp_min(1)) + front**2 * ddeep / (
        d2 * deep.clamp_min(1))), front / d2), 1)
    half = torch.sign(width) * torch.sqrt(width**2 * cy**2 + deep**2 * sy**2)
    return dict(x=x, y=y, z=z, normal=normal, edge=half + 0.7 - torch.sqrt((X - height * sy) ** 2 + 2))


def surface_depth(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """z of the head's front at head coordinates x, y [B, h, w]."""
    width, deep, height = sample(shape, x, y)[:, :3].unbind(1)
    return height + deep * torch.sqrt((1 - (x / width) ** 2).clamp_min(0))
