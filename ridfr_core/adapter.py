"""Identity injection: the IP-Adapter FaceID-Plus / PlusV2 projection and decoupled cross-attention.

Parameter names follow the published checkpoints (tencent-ailab/IP-Adapter, `ip_adapter_faceid.py`), so their tensors
load as they are. V1 and V2 have the same tensors; V2 is V1 with `shortcut` on, which RIDFR describes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import CheckpointError, flatten

HEAD_DIM = 64

# Cross-attention layers in checkpoint order (down, up, then mid) at ComfyUI's places (block, id, transformer index).
SD15_LAYERS = (
    *(("input", i, 0) for i in (1, 2, 4, 5, 7, 8)),
    *(("output", i, 0) for i in range(3, 12)),
    ("middle", 0, 0),
)
SDXL_LAYERS = (
    *(("input", i, t) for i, depth in ((4, 2), (5, 2), (7, 10), (8, 10)) for t in range(depth)),
    *(("output", i, t) for i, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)) for t in range(depth)),
    *(("middle", 0, t) for t in range(10)),
)
BASES = {"SD1.5": SD15_LAYERS, "SDXL": SDXL_LAYERS}


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
    """The Q-Former: latents [B,N,dim] query CLIP tokens [B,T,clip_dim]."""

    def __init__(self, dim: int, clip_dim: int, depth: int, operations=nn):
        super().__init__()
        self.proj_in = operations.Linear(clip_dim, dim)
        self.proj_out = operations.Linear(dim, dim)
        self.norm_out = operations.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, operations),
                    nn.Sequential(
                        operations.LayerNorm(dim),
                        operations.Linear(dim, 4 * dim, bias=False),
                        nn.GELU(),
                        operations.Linear(4 * dim, dim, bias=False),
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


class IdentityProjection(nn.Module):
    """ArcFace embedding and CLIP tokens -> identity tokens; `image_proj` of FaceID-Plus and PlusV2.

    `dim` is the context width of the UNet (768 for SD1.5, 2048 for SDXL), a multiple of 64, the width of a head.
    """

    def __init__(
        self, dim: int = 768, clip_dim: int = 1280, id_dim: int = 512, tokens: int = 4, depth: int = 4, operations=nn
    ):
        super().__init__()
        self.dim, self.n_tokens = dim, tokens
        self.proj = nn.Sequential(
            operations.Linear(id_dim, 2 * id_dim), nn.GELU(), operations.Linear(2 * id_dim, dim * tokens)
        )
        self.norm = operations.LayerNorm(dim)
        self.perceiver_resampler = PerceiverResampler(dim, clip_dim, depth, operations)

    def forward(self, embedding: Tensor, clip: Tensor, shortcut: bool, s_scale: float = 1.0) -> Tensor:
        """Identity tokens [B,4,dim].

        Args:
            embedding: unit-length ArcFace embedding [B,512].
            clip: penultimate hidden states [B,T,clip_dim] of the CLIP vision model.
            shortcut: False for FaceID-Plus, True for PlusV2: the query plus `s_scale` times what CLIP adds.
        """
        query = self.norm(self.proj(embedding).reshape(-1, self.n_tokens, self.dim))
        out = self.perceiver_resampler(query, clip)
        return query + s_scale * out if shortcut else out


class IdentityAdapter(nn.Module):
    """The projection and the K', V' of each cross-attention layer of the UNet.

    `channels` has the width of each layer's attention in checkpoint order, `dim` that of the tokens.
    """

    def __init__(
        self, channels: tuple[int, ...], dim: int, clip_dim: int, id_dim=512, tokens=4, depth=4, operations=nn
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.base = next((base for base, layers in BASES.items() if len(layers) == len(self.channels)), None)
        if self.base is None:
            raise CheckpointError(
                f"The identity adapter has {len(self.channels)} cross-attention layers, but SD1.5 has 16 and SDXL 70: "
                "use an adapter made for one of these."
            )
        self.image_proj = IdentityProjection(dim, clip_dim, id_dim, tokens, depth, operations)
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * k + 1): nn.ModuleDict(
                    {name: operations.Linear(dim, width, bias=False) for name in ("to_k_ip", "to_v_ip")}
                )
                for k, width in enumerate(self.channels)
            }
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping, operations=nn) -> "IdentityAdapter":
        """Build and load from a checkpoint: {"image_proj": {...}, "ip_adapter": {...}} or flat keys.

        All sizes are read off the tensors. The LoRA tensors of FaceID checkpoints are not loaded (see `lora_of`).
        Raises CheckpointError when the layers are neither SD1.5's nor SDXL's.
        """
        weights = {key: weight for key, weight in flatten(state_dict).items() if not is_lora(key)}
        adapter = cls(**sizes_of(weights), operations=operations)
        adapter.load_state_dict(weights)
        return adapter

    @property
    def layers(self) -> tuple[tuple[str, int, int], ...]:
        """ComfyUI's place (block, id, transformer index) of each layer, in checkpoint order."""
        return BASES[self.base]

    @property
    def cross_attention_dim(self) -> int:
        return self.image_proj.dim

    def tokens(self, embedding: Tensor, clip: Tensor, shortcut: bool = True, s_scale: float = 1.0) -> Tensor:
        """Identity tokens [B,4,dim]; see IdentityProjection."""
        return self.image_proj(embedding, clip, shortcut, s_scale)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(K', V') of each layer in checkpoint order, each [B,4,C]."""
        return [(layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)) for layer in self.ip_adapter.values()]


def sizes_of(weights: Mapping[str, Tensor]) -> dict:
    """Constructor arguments of the IdentityAdapter that flat checkpoint tensors belong to."""
    resampler = "image_proj.perceiver_resampler."
    dim, clip_dim = weights[resampler + "proj_in.weight"].shape
    keys = sorted((key for key in weights if key.endswith(".to_k_ip.weight")), key=lambda key: int(key.split(".")[1]))
    return {
        "channels": tuple(weights[key].shape[0] for key in keys),
        "dim": dim,
        "clip_dim": clip_dim,
        "id_dim": weights["image_proj.proj.0.weight"].shape[1],
        "tokens": weights["image_proj.proj.2.weight"].shape[0] // dim,
        "depth": len({key.split(".")[3] for key in weights if key.startswith(resampler + "layers.")}),
    }


def is_lora(key: str) -> bool:
    """Whether a flat key is one of the LoRA tensors that FaceID checkpoints keep beside K' and V'."""
    return key.startswith("ip_adapter.") and "_lora." in key


def lora_of(state_dict: Mapping) -> dict[str, Tensor]:
    """The LoRA tensors of a FaceID checkpoint, `ip_adapter.N.to_{q,k,v,out}_lora.{down,up}.weight`; maybe none."""
    return {key: weight for key, weight in flatten(state_dict).items() if is_lora(key)}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head softmax(QK^T/sqrt(d) + bias)V for q [B,L,C], k, v [B,T,C] and bias [B,1,1,T]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def decoupled_attention(
    text_out: Tensor,
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    heads: int,
    scale: float | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention(Q,K,V) + scale * Attention(Q,K',V'): RIDFR Eq. 3, before the layer's output projection.

    Args: text_out, q [B,L,C]; k_id, v_id [B,T,C]; scale a number or [B or 1, L or 1, 1]; bias [B,1,1,T], added to the
    logits of the identity tokens: the logarithm of a token's weight, -inf for none. Returns [B,L,C].
    """
    bias = None if bias is None else bias.to(q)
    return text_out + scale * attention(q, k_id.to(q), v_id.to(q), heads, bias)
