"""Alignment in regions and for pictures of half precision."""

import pytest
import torch
import torch.nn.functional as F

from ridfr_core.faces import ARCFACE_TEMPLATE, align, similarity_transform, warp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_geometry_is_float32_in_an_autocast_region_and_for_pictures_of_half_precision(dtype):
    chance = torch.Generator().manual_seed(0)
    points = (ARCFACE_TEMPLATE - 56) * 1.3 + torch.tensor([125.0, 100.0]) + 3 * torch.randn(4, 5, 2, generator=chance)
    picture = F.interpolate(torch.rand(4, 3, 25, 31, generator=chance), (200, 248), mode="bicubic").clamp(0, 1)
    matrix = similarity_transform(points, ARCFACE_TEMPLATE)
    whole = warp(picture, matrix, 112)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(similarity_transform(points, ARCFACE_TEMPLATE), matrix)
        torch.testing.assert_close(align(picture, points), whole, rtol=0, atol=1e-4)
    half = warp(picture.to(dtype), matrix, 112)
    assert half.dtype == dtype and (half.float() - whole).abs().max() < 0.01
    assert similarity_transform(points.to(dtype), ARCFACE_TEMPLATE).dtype == torch.float32
