"""Colour transfer: a restored face keeps its detail and takes the colours of the LQ image."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # BT.601, of R, G, B
METHODS = ("wavelet", "adain")
CHROMA = ("auto", "tone", "original", "restored")

LEVELS = 16  # of luma, at which a tone curve is known
PLACES = 16  # areas to a side in which colour is judged; finer chroma is noise or JPEG
# An image has one tone if its `colour` is below this. Measured, in 1/255: 0 for R = G = B; 0 to 5.1 for casts, sepia,
# blue and split tones, clean, with JPEG of quality 30 to 90, noise of 15 or a mild `degrade` (22 photos and portraits);
# 11 and more for 18 colour photos, faces before an orange wall among them; 5.6 and more for 288 drawn portraits, 6 of
# them below 7. Coarse colour noise looks like colour: 3 to 14 for grey or sepia at 16x16 pixels with noise of 10.
COLOURLESS = 5.3 / 255


def luma(images: Tensor) -> Tensor:
    """[...,3,H,W] -> [...,1,H,W]."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(-3, keepdim=True)


def fix_colors(content: Tensor, style: Tensor, method: str, chroma: str = "auto", levels: int = 5) -> Tensor:
    """`content` in the colours of `style`.

    Args:
        content, style: [B,3,H,W] of one size, in [0,1].
        method: "wavelet" (with `levels`) or "adain".
        chroma: where chroma, which is RGB - luma, comes from. Luma is the method's in any case.
            "restored": from the method as it is, which keeps fine or relative chroma of `content`.
            "tone": a function of luma, the tone curve of `style` (see `tone_curve`). Nothing of `content`'s is left.
            "original": from `style`, pixel by pixel.
            "auto": "tone" for each image whose `style` has one tone (see `colour`), otherwise "restored".
    Returns [B,3,H,W], not clamped.
    """
    pairs = zip(content.split(1), style.split(1), strict=True)  # one by one: that bounds the memory of long batches
    return torch.cat([_fix_one(*pair, method, chroma, levels) for pair in pairs])


def _fix_one(content: Tensor, style: Tensor, method: str, chroma: str, levels: int) -> Tensor:
    transfer = partial(wavelet_transfer, levels=levels) if method == "wavelet" else adain_transfer
    curve = tone_curve(style[0])
    if chroma == "auto":
        chroma = "tone" if colour(style[0], curve) < COLOURLESS else "restored"
    if chroma == "restored":
        return transfer(content, style)
    light = transfer(luma(content), luma(style))
    if chroma == "original":
        return light + style - luma(style)
    darkest, brightest = luma(style).aminmax()
    return light + tone(curve, light[0].clamp(darkest, brightest))


def tone_curve(image: Tensor) -> Tensor:
    """The chroma that an image [3,H,W] in [0,1] has at each luma: a stiff smoothing spline [3,LEVELS].

    Black-and-white, sepia, blue-toned and split-toned photos lie on such a curve. It is stiff (a penalty of 1 on its
    second differences, where the pixels weigh 1 in all), so that it does not bend to single objects of a colour photo.
    """
    on_cpu = image.cpu().double()
    light = luma(on_cpu)
    weight = _room(light).flatten()
    weight = weight / weight.sum()
    level = (light.flatten() * LEVELS).long().clamp(0, LEVELS - 1)
    pixels = torch.bincount(level, weight, LEVELS)
    chroma = torch.stack([torch.bincount(level, weight * c, LEVELS) for c in (on_cpu - light).flatten(1)], 1)
    bend = torch.diff(torch.eye(LEVELS, dtype=torch.float64), n=2, dim=0)
    stiff = bend.mT @ bend + 1e-6 * torch.eye(LEVELS, dtype=torch.float64)  # a flat image leaves the slope open
    return torch.linalg.solve(torch.diag(pixels) + stiff, chroma).mT.to(image)


def tone(curve: Tensor, light: Tensor) -> Tensor:
    """Chroma [3,H,W] of the luma [1,H,W], linear between the centres of a curve's levels."""
    place = (light.flatten() * LEVELS - 0.5).clamp(0, LEVELS - 1)
    below = place.long().clamp(max=LEVELS - 2)
    return torch.lerp(curve[:, below], curve[:, below + 1], place - below).unflatten(1, light.shape[1:])


def colour(image: Tensor, curve: Tensor) -> Tensor:
    """How far an image [3,H,W] in [0,1] is from having one tone: a number, in units of its values.

    The root mean square of the chroma that `curve` does not explain (length of the RGB vector), averaged over each of
    PLACES x PLACES areas first: what is finer is noise or JPEG's. Pixels weigh luma (1 - luma), since what is black or
    white can't show colour.
    """
    light = luma(image)
    room = _room(light)
    weight = F.adaptive_avg_pool2d(room, PLACES)
    left = F.adaptive_avg_pool2d(room * (image - light - tone(curve, light)), PLACES) / weight
    return ((weight * left.square()).sum() / weight.sum()).sqrt()


def _room(light: Tensor) -> Tensor:
    """What chroma there is room for at a luma in [0,1], up to a factor."""
    return (light * (1 - light)).clamp(min=1e-6)


def wavelet_transfer(content: Tensor, style: Tensor, levels: int = 5) -> Tensor:
    """High frequencies of `content`, low frequencies of `style`: high(content) + low(style).

    Low pass: the a-trous wavelet of StableSR, `levels` times [1,2,1]x[1,2,1]/16 with dilation 2^i, replicate padding.
    The low pass is linear, so the sum is content + low(style - content), exactly `content` where both are the same.

    Args: content, style [B,C,H,W] of one size (any size, any range). Returns [B,C,H,W], not clamped.
    """
    low = style - content
    channels, height, width = content.shape[1:]
    taps = content.new_tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(taps, taps) / 16).expand(channels, 1, 3, 3)
    for level in range(levels):
        down, right = (min(2**level, max(1, size - 1)) for size in (height, width))  # farther out all is padding
        padded = F.pad(low, (right, right, down, down), mode="replicate")
        low = F.conv2d(padded, kernel, groups=channels, dilation=(down, right))
    return content + low


def adain_transfer(content: Tensor, style: Tensor) -> Tensor:
    """`content` with the mean and standard deviation of `style`, per image and channel (Huang & Belongie 2017, Eq. 8).

    Args: content [B,C,H,W], style [B,C,h,w], any range. Returns [B,C,H,W], not clamped; a flat channel takes the mean.
    """
    content_std, content_mean = torch.std_mean(content, dim=(2, 3), keepdim=True, correction=0)
    style_std, style_mean = torch.std_mean(style, dim=(2, 3), keepdim=True, correction=0)
    flat = content_std < 1e-6  # rounding noise of a constant channel must not be amplified
    scale = torch.where(flat, 0, style_std / content_std.clamp_min(1e-6))
    return content * scale + (style_mean - scale * content_mean)
