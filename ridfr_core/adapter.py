"""Identity injection: adapters of the IP-Adapter family and decoupled cross-attention.

Parameter names follow the published checkpoints (tencent-ailab/IP-Adapter), so their tensors load as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .checkpoints import CheckpointError, check_tensors, expect, flatten, lacks, read
from .projections import FaceIdPlusProjection, FaceIdProjection, PlusProjection, attention

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

# A layer of index k in checkpoint order has number 2k+1; the number before it is the self-attention beside it.
LORA = re.compile(r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


class IdentityAdapter(nn.Module):
    """The projection of a face to identity tokens, and K', V' of each cross-attention layer of the UNet.

    channels: width of each layer's attention, in checkpoint order. dim: width of the tokens (the UNet's context).
    clip_dim: width of the CLIP features, None for FaceID, which needs none. id_dim: width of the face embedding, None
    for IP-Adapter plus-face, which needs none. tokens, depth: of the projection. width: of plus-face's Q-Former.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        dim: int,
        clip_dim: int | None,
        id_dim: int | None = 512,
        tokens: int = 4,
        depth: int = 4,
        width: int = 768,
        operations=nn,
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.dim, self.clip_dim, self.id_dim = dim, clip_dim, id_dim
        self.base = next((base for base, layers in BASES.items() if len(layers) == len(self.channels)), None)
        if self.base is None:
            raise CheckpointError(
                f"The identity adapter has {len(self.channels)} cross-attention layers, but SD1.5 has 16 and SDXL 70: "
                "use an adapter made for one of these."
            )
        if clip_dim is None:
            self.image_proj = FaceIdProjection(dim, id_dim, tokens, operations)
        elif id_dim is None:
            self.image_proj = PlusProjection(dim, clip_dim, tokens, depth, width, operations)
        else:
            self.image_proj = FaceIdPlusProjection(dim, clip_dim, id_dim, tokens, depth, operations)
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * k + 1): nn.ModuleDict(
                    {name: operations.Linear(dim, channels, bias=False) for name in ("to_k_ip", "to_v_ip")}
                )
                for k, channels in enumerate(self.channels)
            }
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping, operations=nn, name: str = "this") -> "IdentityAdapter":
        """Build and load from a checkpoint: {"image_proj": {...}, "ip_adapter": {...}} or flat keys.

        The kind and all sizes are read off the tensors. FaceID's LoRA is not loaded (see `lora_of`).
        Raises CheckpointError, which calls the file `name`: tensors are missing or of another shape, or the layers are
        neither SD1.5's nor SDXL's.
        """
        weights = {key: weight for key, weight in flatten(state_dict).items() if not LORA.fullmatch(key)}
        adapter = cls(**sizes_of(weights, name), operations=operations)
        check_tensors(weights, adapter.state_dict(), "identity-adapter", name)
        adapter.load_state_dict(weights)
        return adapter

    @property
    def layers(self) -> tuple[tuple[str, int, int], ...]:
        """ComfyUI's place (block, id, transformer index) of each layer, in checkpoint order."""
        return BASES[self.base]

    @property
    def needs_clip(self) -> bool:
        """Whether `tokens` reads CLIP features."""
        return self.clip_dim is not None

    @property
    def needs_face(self) -> bool:
        """Whether `tokens` reads a face embedding."""
        return self.id_dim is not None

    def tokens(
        self, embedding: Tensor | None, clip: Tensor | None, shortcut: bool = True, s_scale: float = 1.0
    ) -> Tensor:
        """Identity tokens [B,tokens,dim].

        Args:
            embedding: unit-length ArcFace embedding [B,id_dim]; None will do where `needs_face` is False.
            clip: penultimate hidden states [B,T,clip_dim] of the CLIP vision model; None where `needs_clip` is False.
            shortcut, s_scale: of FaceID-Plus and PlusV2 alone, see FaceIdPlusProjection.
        """
        return self.image_proj(embedding, clip, shortcut, s_scale)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(K', V') of each layer in checkpoint order, each [B,tokens,C]."""
        return [(layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)) for layer in self.ip_adapter.values()]


def sizes_of(weights: Mapping[str, Tensor], name: str) -> dict:
    """Constructor arguments of the IdentityAdapter that flat checkpoint tensors of the file `name` belong to."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in weights:
            raise lacks([key], "identity-adapter", name)
        return tuple(weights[key].shape)

    last = max((int(key.split(".")[1]) for key in weights if key.endswith("_ip.weight")), default=0)
    sizes = {"channels": tuple(shape(f"ip_adapter.{n}.to_k_ip.weight")[0] for n in range(1, last + 1, 2))}
    if "image_proj.latents" in weights:
        _, tokens, width = shape("image_proj.latents")
        dim, clip_dim = shape("image_proj.proj_out.weight")[0], shape("image_proj.proj_in.weight")[1]
        return sizes | {
            "dim": dim,
            "clip_dim": clip_dim,
            "id_dim": None,
            "tokens": tokens,
            "depth": _count_layers(weights, "image_proj.layers."),
            "width": width,
        }
    (dim,) = shape("image_proj.norm.weight")
    resampler = "image_proj.perceiver_resampler."
    plus = any(key.startswith(resampler) for key in weights)
    return sizes | {
        "dim": dim,
        "clip_dim": shape(resampler + "proj_in.weight")[1] if plus else None,
        "id_dim": shape("image_proj.proj.0.weight")[1],
        "tokens": shape("image_proj.proj.2.weight")[0] // dim,
        "depth": _count_layers(weights, resampler + "layers."),
    }


def _count_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def lora_of(state_dict: Mapping) -> dict[str, Tensor]:
    """The LoRA inside a FaceID checkpoint, under names that ComfyUI's LoRA loading knows; empty where there is none.

    `ip_adapter.N.to_q_lora.down.weight` becomes `diffusion_model.(the layer's place).attn1.to_q.lora_down.weight`: an
    even N is self-attention (attn1), the odd one after it the cross-attention (attn2) of the same place.
    """
    found = {match: weight for key, weight in flatten(state_dict).items() if (match := LORA.fullmatch(key))}
    count = 1 + max((int(match[1]) for match in found), default=-1)
    layers = next((layers for layers in BASES.values() if 2 * len(layers) == count), ())
    lora = {}
    for match, weight in found.items() if layers else ():
        number, projection, side = int(match[1]), match[2], match[3]
        target = "to_out.0" if projection == "out" else f"to_{projection}"
        lora[f"{_ldm_name(layers[number // 2])}.attn{1 + number % 2}.{target}.lora_{side}.weight"] = weight
    return lora


def find_lora(path: Path, state_dict: Mapping) -> dict[str, Tensor]:
    """The LoRA of the adapter file `path`: inside it, else in NAME_lora.safetensors beside it; empty if in neither.

    Raises CheckpointError if that file holds something else.
    """
    beside = lora_file(path)
    return lora_of(state_dict) or (read_lora(beside) if beside.is_file() else {})


def lora_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_lora.safetensors")


def read_lora(file: Path) -> dict[str, Tensor]:
    """Raises CheckpointError if the file holds something else."""
    lora, _ = read(file)
    expect(lora, "lora", file.name)
    return lora


def _ldm_name(place: tuple[str, int, int]) -> str:
    """("input", 4, 1) -> "diffusion_model.input_blocks.4.1.transformer_blocks.1"."""
    block, number, index = place
    where = "middle_block" if block == "middle" else f"{block}_blocks.{number}"
    return f"diffusion_model.{where}.1.transformer_blocks.{index}"


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
