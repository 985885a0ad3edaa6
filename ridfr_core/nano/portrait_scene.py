"""The portrait around the face's chart: light, head, hair, ears, neck, clothes, glasses and background."""

import torch
import torch.nn.functional as F

from .portrait_chart import CLASS, colour, hsv, skin_colour
from .portrait_geometry import FRAME, bell, cast, sample, signed_root, smooth, turn


class Canvas:
    """Layers painted back to front: linear-light colour [B, 3, S, S] and classes [B, S, S]."""

    def __init__(self, image: torch.Tensor):
        self.image = image
        self.classes = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.uint8, device=image.device)

    def put(self, pigment, alpha, name: str | torch.Tensor):
        self.image.lerp_(pigment.expand_as(self.image), alpha[:, None].expand_as(self.image))
        value = CLASS[name] if isinstance(name, str) else name
        self.classes = torch.where(alpha > 0.5, value, self.classes)


def lit(normal, light, key, ambient, rim):
    """Wrapped Lambert shading of unit normals (x, y, z), each [B, h, w] -> [B, 3, h, w]."""
    x, y, z = normal
    diffuse = ((x * light[0] + y * light[1] + z * light[2] + 0.25) / 1.25).clamp_min(0)
    grazing = (1 - z.clamp(0, 1)) ** 3 * smooth(-(x * torch.sign(light[0])), 0.8)
    sky = 0.85 - 0.25 * y
    return key * diffuse[:, None] + ambient * sky[:, None] + rim * grazing[:, None]


def lights(v):
    """Colours of key, ambient and rim light [B, 3, 1, 1]."""
    saturation = 0.04 + 0.29 * (0.5 + 0.5 * v.light_colour) ** 2
    power = 1.24 + 0.16 * v.light_power
    key = hsv(0.88 + 0.29 * v.light_hue, saturation, power)  # blue over red to yellow: no green light
    ambient = hsv(0.5 + 0.5 * v.back_hue, 0.12, 0.68 + 0.10 * v.fill)
    rim = hsv(0.5 + 0.5 * v.rim_hue, 0.5, 0.9 * smooth(v.rim_power - 0.1, 1.2))
    return key, ambient, rim


def background(v, px, py):
    angle = v.back_angle * torch.pi
    along = ((px - 64) * torch.cos(angle) + (py - 64) * torch.sin(angle)) / 150 + 0.5
    first = hsv(0.5 + 0.5 * v.back_hue, 0.40, 0.58 + 0.30 * v.back_light)
    second = hsv(0.5 + 0.5 * v.back_hue + 0.16 * v.back_hue2, 0.45, 0.55 + 0.30 * v.back_light2)
    image = torch.lerp(first, second, along.clamp(0, 1)[:, None])
    dx, dy = px - 64 - 52 * v.back_shape_x, py - 40 - 45 * v.back_shape_y
    spot = bell(torch.sqrt(dx * dx + dy * dy), 30 + 14 * v.back_shape_size)
    return image * (1 + 0.55 * v.back_shape_size.sign()[:, None] * spot[:, None] * 0.8)


def hair_style(v, p):
    """Length (y of the ends), volumes and whether it covers the ears."""
    kind = v.hair_length
    length = torch.where(kind < -0.3, 6 + 6 * v.hair_flare,
                         torch.where(kind < 0.3, p["chin"] * (0.72 + 0.25 * v.hair_flare), 95 + 0 * kind))
    volume = torch.where(kind < -0.3, 3.2 + 2.4 * v.hair_volume, 5.2 + 2.6 * v.hair_volume)
    return length, volume, (kind > -0.3).float()


def hair_field(v, p, rot, X, Y):
    """Signed distance inside the hair's outline, the strand coordinate across it, and the covered length."""
    cy, sy, cp, sp = rot
    length, volume, covers = hair_style(v, p)
    y = Y / cp - 6 * sp
    top = p["top"] + volume
    half = torch.sqrt((p["width"] * cy) ** 2 + (37 * sy) ** 2) + 0.5 + 0.65 * volume
    x = X + 7 * sy  # the back of the head lies behind the axis
    flare = 1 + (0.10 + 0.22 * v.hair_flare) * (y.clamp_min(0) / 60) * covers
    outline = half * torch.where(y < 0, signed_root(1 - (y.clamp_max(0).abs() / top) ** 2.25, 0.5), flare)
    wave = (1.5 * (v.hair_wave + 0.2).clamp_min(0)) * torch.sin(y * 0.33 + 6 * v.hair_phase + (x > 0) * 1.7)
    u = x / outline.clamp_min(4)
    ends = length + 2.0 * torch.sin(9 * u + 5 * v.hair_phase) + 1.2 * torch.sin(23 * u) - 6 * covers * u * u - y
    inside = torch.minimum(outline + wave * (y > -20) - x.abs(), 0.8 * ends)
    return inside, u, y, wave


def hair_colour(v, u, y, wave, light, key, ambient, rim):
    """Shaded strands [B, 3, h, w]."""
    phase = 12 * v.hair_phase
    sweep = u + 0.004 * (y + 20) * v.hair_part + 0.02 * wave
    strands = (torch.sin(31 * sweep + phase) + torch.sin(57 * sweep + 0.05 * y + 2.3 * phase)
               + 0.8 * torch.sin(97 * sweep - 0.04 * y + 3.1 * phase)) * 0.33
    nx = u.clamp(-1, 1) * 0.95
    ny = (y.clamp(-50, 0) / 52) * 0.9
    nz = torch.sqrt((1 - nx * nx - ny * ny).clamp_min(0.05))
    level = 0.5 + 0.5 * v.hair_light
    natural = hsv(0.065 + 0.03 * v.hair_hue, 0.72 - 0.22 * level, 0.20 + 0.62 * level**1.5)
    dyed = hsv(0.5 + 0.5 * v.hair_hue, 0.5, 0.35 + 0.35 * level)
    pigment = torch.where((v.hair_phase.abs() > 0.86)[:, None], dyed, natural)
    shade = lit((nx, ny, nz), light, key, ambient, rim) * (1 + 0.34 * strands)[:, None]
    band = bell(y + 31 - 8 * light[1] + 5 * u * u * 2 + 2.5 * strands, 6.0) * (0.6 + 0.5 * strands).clamp_min(0)
    return pigment * shade + (0.20 * pigment.sqrt() + 0.03) * key * band[:, None]


def compose(t, v, p, rot, chart, frame, light, size):
    """Image [B, 3, S, S] in [0, 1] and parsing [B, S, S]."""
    device = v.yaw.device
    cy, sy, cp, sp = rot
    key, ambient, rim = lights(v)
    ticks = torch.arange(size, device=device) * (FRAME / size)
    X, Y = frame.from_pixels(ticks[None, None], ticks[None, :, None])
    pixel = FRAME / size / frame.zoom

    coarse = torch.linspace(0, float(ticks[-1]), size // 2, device=device)
    hit = cast(rot, chart["shape"], *frame.from_pixels(coarse[None, None], coarse[None, :, None]))
    fields = torch.cat((torch.stack((hit["x"], hit["y"], hit["z"], hit["edge"]), 1), hit["normal"]), 1)
    fields = F.interpolate(fields, size=(size, size), mode="bilinear", align_corners=True)
    x, y, z, edge, nx, ny, nz = fields.unbind(1)
    edge = edge / steepness(edge, pixel)

    canvas = Canvas(background(v, ticks[None, None], ticks[None, :, None]))
    length, volume, covers = hair_style(v, p)
    outline, u, hy, wave = hair_field(v, p, rot, X, Y)
    outline = outline / steepness(outline, pixel)
    hair = hair_colour(v, u, hy, wave, light, key, ambient, rim)
    body(t, v, p, rot, canvas, X, Y, edge, pixel, light, key, ambient, rim, hair, outline)
    for side in (-1, 1):
        ear(t, p, rot, canvas, X, Y, side, pixel, light, key, ambient, 1 - covers)

    surface = sample(chart["surface"], x, y)
    slope_x, slope_y = surface[:, 0], surface[:, 1]
    normal = torch.stack((nx - nz * slope_x, ny - nz * slope_y, nz), 1)
    normal = normal * torch.rsqrt((normal * normal).sum(1, keepdim=True) + 1e-12)
    normal = turn(rot, *normal.unbind(1))
    shade = lit(normal, light, key, ambient, rim)
    half_x, half_y, half_z = light[0], light[1], light[2] + 1
    norm = torch.sqrt(half_x**2 + half_y**2 + half_z**2)
    facing = ((normal[0] * half_x + normal[1] * half_y + normal[2] * half_z) / norm).clamp_min(0)
    glint = surface[:, 5] * facing ** 14
    skin = surface[:, 2:5] * shade + 0.22 * key * glint[:, None]
    classes = sample(chart["classes"], x, y, "nearest")[:, 0].to(torch.uint8)
    canvas.put(skin, smooth(edge, pixel), classes)

    # hair over the skull: the charted hairline in front, and all that lies behind the temples
    behind = 6 + 7 * covers - 3 * (y + 10).clamp(-10, 30) * 0.1 * (1 - covers)
    sides = smooth(behind - z, 2.5) * smooth(length - 2 - hy, 3.0) * smooth(0.75 * p["chin"] - hy, 26.0)
    over = torch.maximum(surface[:, 6] * (y < 10), sides) * smooth(outline, pixel)
    canvas.put(hair, over, "hair")
    for side in (-1, 1):
        _, _, facing_z = turn(rot, side * p["width"], 0 * v.yaw, -4 + 0 * v.yaw)
        ear(t, p, rot, canvas, X, Y, side, pixel, light, key, ambient, smooth(facing_z - 1, 6.0) * (1 - covers))
    glasses(v, p, rot, canvas, X, Y, pixel)
    image = canvas.image.clamp_min(0)
    image = torch.sqrt(image * (1 + image * 0.16) / (1 + 0.36 * image))
    return image.clamp_(0, 1), canvas.classes


def steepness(field: torch.Tensor, pixel) -> torch.Tensor:
    """Gradient length of a field [B, S, S] whose horizontal slope is 1, per head pixel."""
    slope = F.pad(field[:, 2:] - field[:, :-2], (0, 0, 1, 1)) / (2 * pixel)
    return torch.sqrt(1 + slope.clamp(-6, 6) ** 2)


def body(t, v, p, rot, canvas, X, Y, edge, pixel, light, key, ambient, rim, hair, outline):
    """Clothes, hair behind the head, and neck."""
    cy, sy, cp, sp = rot
    x, floor = X + 5 * sy, p["chin"] + 13
    cloth = hsv(0.5 + 0.5 * v.clothes_hue, 0.5, 0.45 + 0.3 * v.clothes_light)
    half = 0.60 * p["width"] + 1.2 * t.jaw_width
    u = (x / (half + 1.5)).clamp(-1, 1)
    shoulder = Y - floor - 5.0 * (x.abs() / 40) ** 2 + 3 * bell(x, half)
    fold = 1 + 0.10 * torch.sin(0.23 * x + 0.11 * Y + 7 * v.collar)
    nx = (x / 55).clamp(-0.9, 0.9)
    ny = -0.4 + 0 * nx
    shade = lit((nx, ny, torch.sqrt(1 - nx * nx - 0.16).clamp_min(0.1)), light, key, ambient, rim) * fold[:, None]
    _, _, covers = hair_style(v, p)
    behind = smooth(outline, 1.2 * pixel)
    canvas.put(hair * 0.62, behind, "hair")
    canvas.put(cloth * shade, smooth(shoulder, pixel), "clothes")
    canvas.put(hair * 0.75, behind * covers * smooth(x.abs() - half - 2, 4.0), "hair")
    neck_edge = half + 3.5 * ((Y - floor + 12) / 14).clamp_min(0) ** 2 - x.abs()
    collar = floor + 3 + (4 + 4 * v.collar) * (1 - u * u) - Y
    nz = torch.sqrt(1 - 0.9 * u * u)
    under = 1 - 0.62 * torch.exp(edge.clamp_max(0) / 9)
    neck = skin_colour(t) * lit((0.95 * u, 0.2 + 0 * u, nz), light, key, ambient, 0 * rim) * under[:, None]
    inside = torch.minimum(neck_edge, collar)
    canvas.put(neck, smooth(inside, pixel) * smooth(Y - 10, 4.0), "neck")
    canvas.put(cloth * shade * 0.7, smooth(1.2 - collar.abs(), pixel) * smooth(neck_edge, pixel), "clothes")


def ear(t, p, rot, canvas, X, Y, side, pixel, light, key, ambient, alpha):
    cy, sy, cp, sp = rot
    size = 8.2 + 1.7 * t.ear_size
    out = p["width"] * 1.0 + 1.2 + 1.4 * t.ear_out
    cx, cy_, _ = turn(rot, side * out, 5 + 2.2 * t.ear_height + 0 * sy, -4 + 0 * sy)
    wide = (3.6 + 1.2 * t.ear_out + 0.3 * size * (-side * sy).clamp_min(0)) * cy
    dx, dy = (X - cx) * side, Y - cy_
    lean = dx + 0.16 * dy
    narrow = wide * (1 - 0.22 * (dy / size).clamp(-1, 1))
    r = torch.sqrt((lean / narrow) ** 2 + (dy / size) ** 2 + 1e-5)
    inner = bell(torch.sqrt(((lean - 0.3) / (0.55 * narrow)) ** 2 + ((dy + 1) / (0.62 * size)) ** 2 + 1e-5) - 0.55, 0.5)
    fold = 0.86 + 0.25 * smooth(r - 0.78, 0.25) - 0.42 * inner
    normal = (side * 0.45 + 0 * r, 0.0 * r, 0.85 + 0 * r)
    pigment = skin_colour(t) * lit(normal, light, key, ambient, 0 * key) * fold[:, None]
    tint = torch.tensor([1.0, 0.86, 0.82], device=X.device).view(1, 3, 1, 1)
    canvas.put(pigment * tint, smooth((1 - r) * narrow, 1.2 * pixel) * alpha, "ear")


def glasses(v, p, rot, canvas, X, Y, pixel):
    """Rims, bridge and temples for the views that wear them."""
    worn = (v.glasses > 0.4).float()
    cy, sy, cp, sp = rot
    half_w, half_h = 9.6 + 1.4 * v.glasses_width, 7.2 + 1.6 * v.glasses_round
    power = 2.6 + 1.2 * v.glasses_width
    level = 0.22 + 0.16 * v.glasses_dark
    pigment = colour(level, 0.8 * level, 0.75 * level)
    thick = 1.05 + 0.45 * v.glasses_dark
    ink, lens = torch.zeros_like(X), torch.zeros_like(X)
    centres = []
    for side in (-1, 1):
        cx, cy_, _ = turn(rot, side * (p["eye_x"] + 0.6), 1.5 + 0 * sy, 37.0 + 0 * sy)
        centres.append((cx, cy_))
        dx, dy = ((X - cx) / cy).abs(), (Y - cy_).abs()
        r = ((dx / half_w) ** power + (dy / half_h) ** power + 1e-6) ** (1 / power)
        distance = (r - 1) * half_h
        ink = torch.maximum(ink, smooth(thick - distance.abs() * 1.6, 1.3 * pixel))
        lens = torch.maximum(lens, smooth(-distance, pixel))
        ax, ay, _ = turn(rot, side * (p["width"] + 0.5), 0 * sy, 2 + 0 * sy)
        start = cx + side * half_w * cy
        along = ((X - start) / (ax - start + 1e-3)).clamp(0, 1)
        ink = torch.maximum(ink, smooth(0.8 - (Y - cy_ + 2 - along * (ay - cy_ + 2)).abs(), pixel)
                            * smooth((X - start) * side, 1.0) * smooth((ax - X) * side, 1.0))
    (lx, ly), (rx, _) = centres
    gap = (0.5 * (rx - lx) - half_w * cy).clamp_min(0.3)
    bridge = smooth(0.8 - (Y - ly + 2.0 - 1.2 * (1 - ((X - 0.5 * (lx + rx)) / gap) ** 2)).abs(), 1.2 * pixel)
    ink = torch.maximum(ink, bridge * ((X - 0.5 * (lx + rx)).abs() < gap + 0.5))
    canvas.image.lerp_(canvas.image * 0.92 + 0.02, (0.7 * worn * lens)[:, None].expand_as(canvas.image))
    canvas.put(pigment, ink * worn, "glasses")
