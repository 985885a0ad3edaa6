"""Colour transfer: a restored face keeps its detail and takes the colours of the LQ image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wavelet_transfer(content: Tensor, style: Tensor, levels: int = 5) -> Tensor:
    """High frequencies of `content`, low frequencies of `style`: high(content) + low(style).

    Low pass: the a-trous wavelet of StableSR, `levels` times [1,2,1]x[1,2,1]/16 with dilation 2^i, replicate padding.
    The low pass is linear, so the sum is content + low(style - content), exactly `content` where both are the same.

    Args: content, style [B,C,H,W] of one size (any size, any range). Returns [B,C,H,W], not clamped.
    """
    low = style - content
    channels = content.shape[1]
    taps = content.new_tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(taps, taps) / 16).expand(channels, 1, 3, 3)
    for level in range(levels):
        radius = 2**level
        low = F.conv2d(F.pad(low, (radius,) * 4, mode="replicate"), kernel, groups=channels, dilation=radius)
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
