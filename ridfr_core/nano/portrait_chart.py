"""The face's front painted on its chart: height, albedo, gloss, classes and hairline."""

import torch
import torch.nn.functional as F

from .portrait_geometry import CHART_STEP, CHART_X, CHART_Y, bell, chart_axes, signed_root, skull, smooth

CLASSES = (
    "background", "skin", "nose", "left_brow", "right_brow", "left_eye", "right_eye", "inner_mouth",
    "upper_lip", "lower_lip", "ear", "hair", "neck", "clothes", "glasses",
)
CLASS = {name: i for i, name in enumerate(CLASSES)}


def colour(*rgb) -> torch.Tensor:
    """Stacks three [B, 1, 1] display values into a linear-light (gamma 2) colour [B, 3, 1, 1]."""
    return torch.stack(torch.broadcast_tensors(*rgb), 1) ** 2


def constant_colour(rgb, device) -> torch.Tensor:
    return torch.tensor(rgb, device=device).view(1, 3, 1, 1) ** 2


def hsv(hue, saturation, value) -> torch.Tensor:
    """Hue (turns), saturation and value, each [B, 1, 1] or a number -> linear-light colour [B, 3, 1, 1]."""
    ramp = [(((hue + shift) % 1.0) * 6 - 3).abs() - 1 for shift in (0, 2 / 3, 1 / 3)]
    return colour(*(value * (1 - saturation * (1 - channel.clamp(0, 1))) for channel in ramp))


def paint(canvas: torch.Tensor, pigment: torch.Tensor, alpha: torch.Tensor) -> None:
    """Blends a colour into canvas [B, 3, h, w] in place under alpha [B, h, w]."""
    canvas.lerp_(pigment.expand_as(canvas), alpha[:, None].expand_as(canvas))


def skin_colour(t) -> torch.Tensor:
    tone = 0.5 + 0.5 * t.skin_tone
    red, green, blue = 0.40 + 0.53 * tone, 0.255 + 0.515 * tone, 0.18 + 0.50 * tone - 0.04 * tone * (1 - tone)
    return colour(red, green + 0.022 * t.skin_hue, blue - 0.03 * t.skin_hue)


def blobs(gx: torch.Tensor, gy: torch.Tensor, spots) -> torch.Tensor:
    """Sum of axis-aligned Gaussians, by one matrix product -> [B, H, W].

    spots: (amplitude, x, y, width_x, width_y), each a number or [B, 1, 1]; a negative width_x mirrors the spot in x.
    """
    spots = [spot for a, x, y, w, h in spots
             for spot in (((a, x, y, -w, h), (a, -x, y, -w, h)) if not torch.is_tensor(w) and w < 0
                          else ((a, x, y, w, h),))]
    batch = max((value.shape[0] for spot in spots for value in spot if torch.is_tensor(value)), default=1)
    def stack(values):
        return torch.cat([v.expand(batch, 1, 1) if torch.is_tensor(v) else gx.new_full((batch, 1, 1), v)
                          for v in values], 1)
    amplitude, x, y, width_x, width_y = (stack(column) for column in zip(*spots, strict=True))
    across = amplitude * bell(gx - x, width_x)
    down = bell(gy.transpose(1, 2) - y, width_y)
    return down.transpose(1, 2) @ across


def window(x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice]:
    """Rows and columns of the chart covering a box of head coordinates."""
    def span(low, high, origin):
        return slice(round((low - origin) / CHART_STEP), round((high - origin) / CHART_STEP) + 1)
    return span(y0, y1, CHART_Y[0]), span(x0, x1, CHART_X[0])


def relief(t, v, p, gx, gy) -> torch.Tensor:
    """Height of the face over the skull's ellipses [B, H, W]."""
    ex, tip, mouth, chin = p["eye_x"], p["nose_tip"], p["mouth"], p["chin"]
    smile = p["smile"].clamp_min(0)
    height = blobs(gx, gy, [
        (-(4.0 + 1.5 * t.eye_depth), ex - 1, 0.5, -9.5, 6.5),
        (3.0 + 0.8 * t.eye_size, ex, 0.3, -6.4, 4.6),
        (1.9 + 1.5 * t.brow_ridge, ex - 1, -9.0, -9.5, 4.0),
        (-0.8 * t.eye_bag - 0.5, ex, 8.5, -6.0, 1.9),
        (2.4 + 1.7 * t.cheekbone + 0.9 * smile, 21.5, 14.0, -8.5, 6.5),
        (-(1.8 + 1.9 * t.cheek_hollow), 22.0, 0.6 * chin, -7.5, 8.0),
        (3.6, 0.0, mouth, 13.0, 8.5),
        (-1.3, 0.0, mouth + 8.2, 8.0, 2.6),
        (4.0 + 2.0 * t.chin_out, 0.0, chin - 7.0, 8.5 + 2.5 * t.chin_width, 5.5),
        (-1.1 * (t.chin_cleft - 0.2).clamp_min(0), 0.0, chin - 6.0, 1.5, 3.5),
        (-0.9, 0.0, 0.5 * (tip + mouth) - 0.6, 1.7, 2.6),
        (-0.6 * (t.forehead_lines + 0.2).clamp_min(0) - 0.8 * (v.brow_raise - 0.5).clamp_min(0), 0.0, -18.0, 16., 1.0),
        (-0.6 * (t.forehead_lines + 0.2).clamp_min(0) - 0.8 * (v.brow_raise - 0.5).clamp_min(0), 0.0, -22.5, 14., 1.0),
        (-0.9 * (v.frown - 0.2).clamp_min(0), 2.8, -9.0, -1.0, 3.5),
    ])
    rows, columns = window(-18, 18, -22, 40)
    height[:, rows, columns] += nose_relief(t, p, gx[..., columns], gy[:, rows])
    rows, columns = window(-30, 30, 8, 58)
    x, y = gx[..., columns].abs(), gy[:, rows]
    start = 5.6 + 1.5 * t.nose_width
    along = ((y - tip + 3) / (p["corner"] + 3 - tip)).clamp_min(-0.3)
    fold = x - start - (p["mouth_half"] + 2.5 - start) * along.clamp_min(0) ** 0.8
    depth = 0.75 + 0.65 * t.nasolabial + 0.6 * smile
    height[:, rows, columns] -= depth * (bell(fold, 1.5) - 0.5 * bell(fold - 3.5, 3.0)) * bell(along - 0.45, 0.55)
    return height


def nose_relief(t, p, x, y) -> torch.Tensor:
    tip = p["nose_tip"]
    along = (y + 4) / (tip + 4)
    rise = (9.0 + 2.4 * t.nose_height) * (0.26 + 0.09 * t.nose_height + 0.74 * along.clamp(0, 1) ** 1.4)
    rise = rise * torch.where(along < 0, bell(along, 0.24), torch.where(along > 1, bell(y - tip, 3.8), 1.0))
    width = 4.3 + 1.1 * t.nose_bridge + (2.2 + 1.0 * t.nose_tip) * along.clamp(0, 1) ** 2.5
    ball = (1.2 + 0.9 * t.nose_tip) * bell(x, 4.0 + 0.9 * t.nose_tip) * bell(y - tip + 0.3, 3.8)
    wing = 5.6 + 1.8 * t.nose_width
    alae = (3.9 + 0.6 * t.nose_width) * bell(x.abs() - wing, 2.7) * bell(y - tip - 0.8, 3.3 + 0.5 * t.nostril)
    return rise * bell(x, width) + ball + alae


def _lip_edges(t, p, x):
    """Contours of the mouth over x [1, 1, w]: outer top, inner top, inner bottom, outer bottom, and the inside mask."""
    u = (x / p["mouth_half"]).clamp(-1.15, 1.15)
    round_ = signed_root(1 - u * u, 0.75)
    line = p["corner"] + (p["mouth"] - p["corner"]) * (1 - u * u) - 0.3 * p["opening"] * round_
    bow = 0.3 + 0.34 * t.cupid
    peaks = 1 + bow * (bell(u.abs() - 0.24, 0.16) - 0.9 * bell(u, 0.13))
    top = line - (2.5 + 1.35 * t.upper_lip) * round_ * peaks
    low = line + p["opening"] * round_
    return top, line + 0.35 * bell(u, 0.2), low, low + (3.3 + 1.7 * t.lower_lip) * round_


def mouth(t, v, p, gx, gy, albedo, gloss, height, classes) -> None:
    rows, columns = window(-20, 20, 16, 60)
    x, y = gx[..., columns], gy[:, rows]
    canvas, skin = albedo[:, :, rows, columns], albedo[:, :, rows, columns].clone()
    top, inner_top, inner_low, bottom = _lip_edges(t, p, x)
    sides = smooth(p["mouth_half"] + 0.4 - x.abs(), 1.2)
    upper = smooth(y - top, 1.0) * smooth(inner_top - y + 0.3, 1.0) * sides
    lower = smooth(y - inner_low + 0.3, 1.0) * smooth(bottom - y, 1.2) * sides
    inside = smooth(torch.minimum(y - inner_top, inner_low - y), 0.9) * sides
    made_up = smooth(v.lipstick - 0.25, 0.7)[:, None]
    rose = constant_colour([0.80, 0.36, 0.36], x.device)
    natural = skin * torch.lerp(colour(0.93 + 0 * t.lip_tone, 0.66 + 0.08 * t.lip_tone, 0.67 + 0.09 * t.lip_tone), rose,
                                0.25)
    natural = torch.lerp(natural, rose, 0.16)
    pigment = torch.lerp(natural, hsv(0.96 + 0.05 * v.lipstick_hue, 0.72 + 0 * v.lipstick, 0.72 + 0 * v.lipstick),
                         0.85 * made_up)
    creases = 1 - 0.10 * torch.sin(x * 3.1 + 0.3 * y).clamp_min(0)
    canvas.lerp_(pigment * 0.72 * creases[:, None], upper[:, None])
    canvas.lerp_(pigment * creases[:, None], lower[:, None])
    dark = constant_colour([0.24, 0.07, 0.08], x.device)
    paint(canvas, dark, torch.maximum(inside, 0.75 * bell(y - inner_top, 0.75) * sides))
    teeth = inside * smooth(inner_top + 0.62 * p["opening"] - y, 0.9) * smooth(p["opening"] - 0.9, 0.8)
    shade = (0.88 - 0.10 * (x / 6) ** 2 - 0.10 * bell(torch.remainder(x, 2.6) - 1.3, 0.25)).clamp_min(0.2)
    canvas.lerp_((shade[:, None] ** 2).expand_as(canvas), teeth[:, None])
    tongue = inside * smooth(y - inner_low + 0.35 * p["opening"], 1.2) * smooth(p["opening"] - 2, 1.0)
    paint(canvas, constant_colour([0.62, 0.25, 0.27], x.device), 0.8 * tongue)
    gloss[:, rows, columns] = torch.lerp(gloss[:, rows, columns], 0.5 + 0.6 * made_up[:, 0], lower)
    middle_low = 0.5 * (inner_low + bottom)
    height[:, rows, columns] += 1.5 * sides * (
        bell(y - 0.5 * (top + inner_top), 1.8 + 0.4 * t.upper_lip) + 1.3 * bell(y - middle_low, 2.0 + 0.7 * t.lower_lip)
        - 1.2 * bell(y - inner_top, 0.9))
    part = classes[:, rows, columns]
    for mask, name in ((upper, "upper_lip"), (lower, "lower_lip"), (inside, "inner_mouth")):
        part[mask > 0.5] = CLASS[name]


def eye(t, v, p, gx, gy, albedo, gloss, height, classes, side: int, light) -> None:
    """One eye, its lids and brow; side -1 is the viewer's left."""
    rows, columns = window(*((-38, 0) if side < 0 else (0, 38)), -26, 16)
    x, y = gx[..., columns] * side - p["eye_x"], gy[:, rows]  # x grows outwards
    canvas = albedo[:, :, rows, columns]
    device = x.device
    tilt = 0.10 * t.eye_tilt + 0.03
    a = p["eye_half"]
    across, down = x - tilt * y, y + tilt * x
    u = across / a
    arch = signed_root((1 - u * u).clamp_min(-1), 0.8)
    b = a * (0.50 + 0.14 * t.eye_aspect) * (1 - 0.38 * (v.squint - 0.1).clamp_min(0) + 0.12 * v.brow_raise.clamp_min(0))
    upper = down + b * arch * (1 - 0.16 * u)
    lower = 0.68 * b * arch * (1 + 0.14 * u) - down
    opening = torch.minimum(upper, lower)
    inside = smooth(opening, 0.9)

    # lid skin, make-up and crease
    crease_gap = 1.7 + 0.9 * t.lid_fold
    lid = smooth(-upper + 0.3, 1.2) * bell((u + 0.05).clamp(-2, 2), 1.1)
    shadow = bell(upper + 3.0, 4.2) * (upper < 1) * bell(u - 0.1, 1.15) * smooth(v.eye_shadow - 0.35, 0.5)
    paint(canvas, hsv(0.5 + 0.5 * v.eye_shadow_hue, 0.55, 0.5 + 0 * v.eye_shadow), 0.6 * shadow)
    crease = bell(upper + crease_gap, 0.75) * smooth(1.15 - u.abs(), 0.4)
    under = bell(lower + 1.8, 1.3) * smooth(1.05 - u.abs(), 0.4)
    canvas *= (1 - 0.42 * crease - (0.10 + 0.08 * t.eye_bag) * under)[:, None]
    height[:, rows, columns] += 0.9 * lid * bell(upper + 0.5, 1.5) + 0.5 * bell(lower + 0.5, 0.9) * (u.abs() < 1.1)

    # eyeball: sclera, iris, pupil, and the lid's shadow on them
    gaze_x, gaze_y = side * 2.1 * v.gaze_x, 1.0 * v.gaze_y
    radius = 3.55 + 0.45 * t.iris_size + 0.12 * t.eye_size
    dx, dy = across - gaze_x, down - gaze_y + 0.35
    distance = torch.sqrt(dx * dx + dy * dy + 1e-4)
    sclera = constant_colour([0.93, 0.90, 0.88], device)
    hue = 0.33 + 0.27 * t.iris_hue  # amber to green to blue
    value = 0.50 + 0.20 * t.iris_light
    amber, cool = hsv(0.075 + 0 * hue, 0.75, value), hsv(hue, 0.55, value + 0.08)
    iris = torch.lerp(amber, cool, smooth(t.iris_hue + 0.45, 0.6)[:, None])
    paint(canvas, sclera, inside)
    disc = smooth(radius - distance, 0.9) * inside
    rays = 0.85 + 0.22 * torch.sin(torch.atan2(dy, dx) * 13 + 6 * t.iris_hue)
    rays = rays + 0.5 * bell(distance - 0.55 * radius, 0.8)
    canvas.lerp_(iris * (rays * (1 - 0.6 * bell(distance - radius, 0.8)))[:, None], disc[:, None])
    paint(canvas, constant_colour([0.03, 0.025, 0.03], device), smooth(0.44 * radius - distance, 0.8) * inside)
    cast = 1 - 0.55 * bell(upper, 1.9) - 0.30 * u.abs().clamp_max(1) ** 4
    canvas *= torch.lerp(torch.ones_like(inside), cast, inside)[:, None]
    paint(canvas, constant_colour([0.80, 0.45, 0.42], device), 0.6 * inside * smooth(-u - 0.84, 0.15))
    glint_x, glint_y = side * 1.5 * light[0], 1.4 * light[1] - 0.5
    glint = bell(dx - glint_x, 0.8) * bell(dy - glint_y, 0.8)
    paint(canvas, constant_colour([1.5, 1.5, 1.5], device), (1.3 * glint).clamp_max(1) * inside)
    # lashes
    edge = smooth(1.12 - u.abs(), 0.25)
    lash = bell(upper + 0.15, 0.72 + 0.2 * u.clamp(-1, 1)) * edge + bell(upper + 0.9, 1.0) * bell(u - 1.0, 0.28) * 0.7
    paint(canvas, constant_colour([0.10, 0.06, 0.05], device), (0.92 * lash).clamp(0, 1))
    canvas *= (1 - 0.45 * bell(lower + 0.1, 0.6) * edge)[:, None]
    gloss[:, rows, columns] *= 1 - inside
    classes[:, rows, columns][opening > 0] = CLASS["left_eye" if side < 0 else "right_eye"]
    brow(t, v, p, x, y, canvas, classes[:, rows, columns], "left_brow" if side < 0 else "right_brow")


def brow(t, v, p, x, y, canvas, classes, name: str) -> None:
    start, end = -8.0 + 2.2 * t.brow_spacing + 0.6 * v.frown, 8.6 + 2.3 * t.brow_length
    s = (x - start) / (end - start)
    inner = s.clamp(0, 1)
    raise_ = 1.7 * v.brow_raise + 0.5
    centre = -(10.2 + 2.0 * t.brow_height + raise_) - (1.7 + 1.7 * t.brow_arch) * torch.sin(3.0 * inner ** 1.25)
    centre = centre - (1.7 * t.brow_angle - 0.2) * (inner - 0.5) * 2 + 1.3 * v.frown.clamp_min(0) * (1 - inner) ** 2
    half = (1.85 + 0.9 * t.brow_thickness) * (1 - 0.72 * inner ** 1.6) * smooth(s + 0.02, 0.14)
    hairs = torch.sin(3.1 * x - (2.6 - 4.2 * inner) * (y - centre) + 1.2 * torch.sin(1.3 * x))
    band = smooth(half + 0.16 * hairs - (y - centre).abs(), 1.15) * smooth(1 - s, 0.1) * smooth(s, 0.12)
    darkness = 0.24 - 0.13 * t.brow_dark
    pigment = colour(darkness * 1.15, darkness * 0.85, darkness * 0.65)
    paint(canvas, pigment, band * (0.80 + 0.12 * t.brow_dark + 0.10 * hairs))
    classes[band > 0.5] = CLASS[name]


def nose_paint(t, p, gx, gy, albedo, gloss, classes) -> None:
    rows, columns = window(-14, 14, -8, 40)
    x, y = gx[..., columns].abs(), gy[:, rows] - p["nose_tip"]
    canvas = albedo[:, :, rows, columns]
    wing = 5.6 + 1.8 * t.nose_width
    canvas.mul_(1 - 0.16 * (bell(x, 7.0) * bell(y, 6.5))[:, None] * torch.tensor(
        [0.0, 1.0, 0.9], device=x.device).view(1, 3, 1, 1))
    place = 3.0 + 0.85 * t.nose_width
    slanted = y - 3.3 - 0.2 * (x - place)
    hole = ((x - place) / (1.7 + 0.5 * t.nostril)) ** 2 + (slanted / (0.85 + 0.35 * t.nostril)) ** 2
    canvas.lerp_(canvas * torch.tensor([0.22, 0.12, 0.11], device=x.device).view(1, 3, 1, 1),
                 (0.9 * smooth(1 - hole, 1.1))[:, None])
    rim = bell(torch.sqrt(((x - wing) / 2.9) ** 2 + ((y - 0.9) / 3.2) ** 2 + 1e-4) - 1, 0.28) * (x > wing - 1.0)
    canvas *= (1 - 0.26 * rim - 0.12 * bell(y - 4.4, 1.2) * bell(x, wing))[:, None]
    gloss[:, rows, columns] += 0.35 * bell(x, 2.0) * bell(y + 1.2, 3.0)
    outline = torch.where(y < 0, 3.2 + (wing - 0.5) * ((y / (p["nose_tip"] + 4) + 1).clamp_min(0)) ** 2.2, wing + 1.8)
    classes[:, rows, columns][(x < outline) & (y < 4.0) & (y > -p["nose_tip"] - 2)] = CLASS["nose"]


def marks(t, v, p, freckle_spots, gx, gy, albedo) -> None:
    """Moles, freckles, blush and stubble."""
    chin, width = p["chin"], p["width"]
    reach = 0.66 * width
    places = (
        (t.mole1_x, t.mole1_y, t.mole1_size, reach * t.mole1_x, 0.46 * chin + 0.30 * chin * t.mole1_y),
        (t.mole2_x, t.mole2_y, t.mole2_size, 0.5 * reach * (1 + t.mole2_x) + 2, 0.34 * chin + 0.3 * chin * t.mole2_y),
        (t.mole3_x, t.mole3_y, t.mole3_size, 0.75 * reach * t.mole3_x, -19 + 6 * t.mole3_y),
    )
    mole = blobs(gx, gy, [((1.6 * (size + 0.75)).clamp(0, 1.6), x, y, 1.05 + 0.42 * size, 1.05 + 0.42 * size)
                          for _, _, size, x, y in places]).clamp_(0, 0.92)
    albedo.lerp_(albedo * torch.tensor([0.10, 0.06, 0.05], device=gx.device).view(1, 3, 1, 1), mole[:, None])
    amount = 0.55 * (t.freckles - 0.1).clamp_min(0)
    dots = blobs(gx, gy, [(amount, 19 * fx, 13 + 8 * fy, 0.75, 0.75) for fx, fy in freckle_spots])
    flush = 0.10 + 0.55 * (v.blush - 0.3).clamp_min(0)
    cheeks = blobs(gx, gy, [(flush, p["eye_x"] + 5, 14.0, -7.5, 5.5)])
    albedo *= 1 - torch.stack((0.3 * dots, 0.62 * dots + 0.55 * cheeks, 0.75 * dots + 0.45 * cheeks), 1)
    beard = (smooth(gy - p["nose_tip"] - 3, 5.0) * smooth(gx.abs() + 0.9 * (gy - 22), 14.0)
             * (1 - 0.8 * bell(gx, p["mouth_half"]) * bell(gy - p["mouth"], 3.8)))
    grain = 0.8 + 0.2 * torch.sin(gx * 5.1 + torch.sin(gy * 3.7)) * torch.sin(gy * 4.7)
    stubble = 0.75 * smooth(v.stubble - 0.62, 0.5) * beard * grain
    albedo *= 1 - stubble[:, None] * torch.tensor([0.72, 0.68, 0.62], device=gx.device).view(1, 3, 1, 1)


def hairline(t, v, p, gx, gy) -> torch.Tensor:
    """Alpha of the hair growing over the forehead [B, H, W]."""
    width = p["width"]
    u = gx / width
    part = 0.55 * v.hair_part
    ragged = 0.7 * torch.sin(23 * u + 9 * v.hair_phase) + 0.5 * torch.sin(47 * u + 20 * v.hair_phase)
    line = -(33 + 4.5 * t.hairline) + (17 + 3 * t.hairline) * (u.abs() / 0.95).clamp_max(1.1) ** 3
    line = line + (3.8 * (t.widow_peak + 0.1).clamp_min(0)) * bell(u, 0.17)
    kind = v.hair_fringe
    side = torch.where(v.hair_part > 0, 1.0, -1.0)
    bangs = -17 + 1.5 * v.hair_volume + 3 * u * u + 1.6 * ragged
    swept = -31 + 14 * smooth(side * (part - u) + 0.15, 1.1) + 1.2 * ragged
    curtain = -33 + 23 * ((u - part).abs().clamp_max(1)) ** 0.8 + ragged
    line = torch.where(kind > 0.6, torch.maximum(line, bangs), line)
    line = torch.where((kind > 0.25) & (kind <= 0.6), torch.maximum(line, swept), line)
    line = torch.where((kind > -0.1) & (kind <= 0.25), torch.maximum(line, curtain), line)
    return smooth(line + 0.4 * ragged - gy, 1.8)


def face_chart(t, v, freckle_spots, p, light) -> dict:
    """Everything charted for a batch. light: the key light's direction in head coordinates, three [B, 1, 1].

    Returns shape [B, 5, H', W'] (for `cast`), surface [B, 7, H, W] (height slopes, albedo, gloss, hair) and
    classes [B, 1, H, W].
    """
    gx, gy = chart_axes(t.skin_tone.device)
    batch, rows, columns = t.skin_tone.shape[0], gy.shape[1], gx.shape[2]
    height = relief(t, v, p, gx, gy)
    albedo = skin_colour(t).expand(batch, 3, rows, columns).clone()
    forehead, cheeks = (0.16, 0.0, -16.0, 14.0, 8.0), (0.14, 21.0, 10.0, -6.0, 5.0)
    gloss = 0.22 + blobs(gx, gy, [forehead, cheeks]).repeat(batch, 1, 1)
    classes = torch.full_like(height, CLASS["skin"])
    marks(t, v, p, freckle_spots, gx, gy, albedo)
    nose_paint(t, p, gx, gy, albedo, gloss, classes)
    mouth(t, v, p, gx, gy, albedo, gloss, height, classes)
    for side in (-1, 1):
        eye(t, v, p, gx, gy, albedo, gloss, height, classes, side, light)

    coarse = F.avg_pool2d(height[:, None], 5, stride=2, padding=2, count_include_pad=False)
    wide = F.avg_pool2d(coarse, 5, stride=1, padding=2, count_include_pad=False)
    crevice = (wide - coarse).clamp(-1, 2)
    shadow = cast_shadow(coarse, light)
    hair = hairline(t, v, p, gx, gy)
    hair_shadow = F.avg_pool2d(hair[:, None], (9, 5), stride=1, padding=(4, 2), count_include_pad=False)
    dim = F.interpolate((1 - 0.22 * crevice) * (1 - 0.42 * shadow), size=(rows, columns), mode="bilinear",
                        align_corners=True)
    albedo *= dim * (1 - 0.4 * hair_shadow)

    width, depth, centre = skull(t, p, gy)
    total = height + centre
    slope_x = F.pad((total[..., 2:] - total[..., :-2]) / (2 * CHART_STEP), (1, 1))
    slope_y = F.pad((total[:, 2:] - total[:, :-2]) / (2 * CHART_STEP), (0, 0, 1, 1))
    def column(profile):
        return profile.expand(batch, rows, columns)
    def rate(profile):
        return F.pad((profile[:, 2:] - profile[:, :-2]) / (2 * CHART_STEP), (0, 0, 1, 1))
    shape = torch.stack((column(width), column(depth), total, column(rate(width)), column(rate(depth))), 1)
    surface = torch.cat((torch.stack((slope_x, slope_y), 1), albedo, gloss[:, None], hair[:, None]), 1)
    return dict(shape=shape[:, :, ::2, ::2].contiguous(), surface=surface, classes=classes[:, None])


def cast_shadow(coarse: torch.Tensor, light) -> torch.Tensor:
    """Soft shadow of the relief on itself: is the surface hidden by what lies towards the light? [B, 1, h, w]."""
    batch, _, h, w = coarse.shape
    identity = F.affine_grid(torch.eye(2, 3, device=coarse.device)[None], (1, 1, h, w), align_corners=True)
    reach = 7.0
    across = reach * light[0] / (0.5 * (CHART_X[1] - CHART_X[0]))
    down = reach * light[1] / (0.5 * (CHART_Y[1] - CHART_Y[0]))
    grid = identity + torch.stack((across, down), -1).reshape(batch, 1, 1, 2)
    towards = F.grid_sample(coarse, grid, padding_mode="border", align_corners=True)
    climb = reach * light[2][:, None].clamp_min(0.2)
    return smooth(towards - coarse - climb + 1.0, 4.0)
