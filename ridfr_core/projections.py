"""What turns a face into identity tokens: the `image_proj` networks of the IP-Adapter family.

    kind                      reads               network
    FaceID                    ArcFace             two linear layers
    FaceID-Plus, PlusV2       ArcFace and CLIP    the same, whose tokens then query CLIP's in a Q-Former
    IP-Adapter plus-face      CLIP                learned tokens query CLIP's in a Q-Former

Parameter names follow the published checkpoints (tencent-ailab/IP-Adapter, `ip_adapter_faceid.py`, `resampler.py`), so
their tensors load as they are. `operations` supplies Linear and LayerNorm (torch.nn, or ComfyUI's `comfy.ops`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64


class PerceiverAttention(nn.Module):
    """Latents attend to the image tokens and to themselves."""

    def __init__(self, dim: int, operations=nn):
        super().__init__()
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, dim, bias=False)
        self.to_kv = operations.Linear(dim, 2 * dim, bias=False)
        self.to_out = operations.Linear(dim, dim, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        image, latents = self.norm1(image), self.norm2(latents)
        k, v = self.to_kv(torch.cat([image, latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(latents), k, v, heads=latents.shape[-1] // HEAD_DIM))


class PerceiverResampler(nn.Module):
    """The Q-Former: latents [B,N,width] query CLIP tokens [B,T,clip_dim]; gives [B,N,dim]."""

    def __init__(self, dim: int, clip_dim: int, depth: int, width: int, operations=nn):
        super().__init__()
        self.proj_in = operations.Linear(clip_dim, width)
        self.proj_out = operations.Linear(width, dim)
        self.norm_out = operations.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, operations),
                    nn.Sequential(
                        operations.LayerNorm(width),
                        operations.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        operations.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, latents: Tensor, clip: Tensor) -> Tensor:
        image = self.proj_in(clip)
        for attend, feed_forward in self.layers:
            latents = latents + attend(image, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class FaceIdProjection(nn.Module):
    """FaceID: ArcFace embedding -> identity tokens [B,tokens,dim].

    `dim` is the context width of the UNet: 768 for SD1.5, 2048 for SDXL.
    """

    def __init__(self, dim: int, id_dim: int = 512, tokens: int = 4, operations=nn):
        super().__init__()
        self.dim, self.tokens = dim, tokens
        self.proj = nn.Sequential(
            operations.Linear(id_dim, 2 * id_dim), nn.GELU(), operations.Linear(2 * id_dim, dim * tokens)
        )
        self.norm = operations.LayerNorm(dim)

    def forward(self, embedding: Tensor, clip: Tensor | None, shortcut: bool, s_scale: float) -> Tensor:
        """embedding [B,id_dim], unit length; the rest is of no use here."""
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, self.dim)))


class FaceIdPlusProjection(FaceIdProjection):
    """FaceID-Plus and PlusV2, which have the same tensors; V2 is V1 with `shortcut` on, which RIDFR describes."""

    def __init__(
        self, dim: int, clip_dim: int = 1280, id_dim: int = 512, tokens: int = 4, depth: int = 4, operations=nn
    ):
        super().__init__(dim, id_dim, tokens, operations)
        self.perceiver_resampler = PerceiverResampler(dim, clip_dim, depth, dim, operations)

    def forward(self, embedding: Tensor, clip: Tensor, shortcut: bool, s_scale: float) -> Tensor:
        """embedding [B,id_dim], unit length; clip [B,T,clip_dim]; shortcut: out = query + s_scale * what CLIP adds."""
        query = super().forward(embedding, clip, shortcut, s_scale)
        out = self.perceiver_resampler(query, clip)
        return query + s_scale * out if shortcut else out


class PlusProjection(PerceiverResampler):
    """IP-Adapter plus and plus-face: the queries are learned. `width` is their own, 1280 for SDXL (2048)."""

    def __init__(
        self, dim: int, clip_dim: int = 1280, tokens: int = 16, depth: int = 4, width: int = 768, operations=nn
    ):
        super().__init__(dim, clip_dim, depth, width, operations)
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)

    def forward(self, embedding: Tensor | None, clip: Tensor, shortcut: bool, s_scale: float) -> Tensor:
        """clip [B,T,clip_dim]; the rest is of no use here."""
        return super().forward(self.latents.to(clip).expand(len(clip), -1, -1), clip)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head softmax(QK^T/sqrt(d) + bias)V for q [B,L,C], k, v [B,T,C] and bias [B,1,1,T]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
