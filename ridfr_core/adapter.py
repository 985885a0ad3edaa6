"""Identity injection: adapters of the IP-Adapter family and decoupled cross-attention.

Parameter names follow the published checkpoints (tencent-ailab/IP-Adapter), so their tensors load as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import SOURCES, CheckpointError, check_tensors, expect, flatten, lacks, read
from .projections import HEAD_DIM, FaceIdPlusProjection, FaceIdProjection, PlusProjection, attention

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
LORA = re.compile(r"ip_adapter\.(\d{1,4})\.to_(q|k|v|out)_lora\.(down|up)\.weight")
LAYER = re.compile(r"ip_adapter\.(\d{1,4})\.to_[kv]_ip\.weight")
PAIRS = (("lora_up", "lora_down"), ("lora.up", "lora.down"), ("lora_B", "lora_A"), ("layer.up", "layer.down"))
DEEPEST = 64  # layers of a Q-Former; published ones have 4
PORTRAIT = 16  # tokens of FaceID-portrait, other FaceID adapters have 4


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
    def from_state_dict(
        cls, state_dict: Mapping, operations=nn, name: str = "this", keep_dtype: bool = False
    ) -> "IdentityAdapter":
        """Build and load from a checkpoint: {"image_proj": {...}, "ip_adapter": {...}} or flat keys.

        The kind and all sizes are read off the tensors. FaceID's LoRA is not loaded (see `lora_of`).
        keep_dtype: the weights are the checkpoint's own tensors, for `operations` that compute in their inputs'
        precision; else they are copies in float32.
        Raises CheckpointError, which calls the file `name`: tensors are missing or of another shape, or the layers are
        neither SD1.5's nor SDXL's.
        """
        weights = {key: weight for key, weight in flatten(state_dict).items() if not LORA.fullmatch(key)}
        with torch.device("meta"):  # no memory before the file has been checked
            adapter = cls(**sizes_of(weights, name), operations=operations)
        check_tensors(weights, adapter.state_dict(), "identity-adapter", name)
        if not keep_dtype:
            weights = {key: weight.to(torch.float32, copy=True) for key, weight in weights.items()}
        adapter.load_state_dict(weights, assign=True)
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

    @property
    def kind(self) -> str:
        """What the adapter is called; FaceID Plus and PlusV2 are told apart by how they are run alone."""
        if not self.needs_face:
            return "plus-face"
        if self.needs_clip:
            return "FaceID Plus"
        return "FaceID portrait" if self.image_proj.tokens == PORTRAIT else "FaceID"

    def tokens(
        self, embedding: Tensor | None, clip: Tensor | None, shortcut: bool = True, s_scale: float = 1.0
    ) -> Tensor:
        """Identity tokens [B,tokens,dim].

        Args:
            embedding: ArcFace embedding [B,id_dim], unit-length (but for FaceID-portrait "unnorm", which learnt raw
                ones); None will do where `needs_face` is False.
            clip: penultimate hidden states [B,T,clip_dim] of the CLIP vision model; None where `needs_clip` is False.
            shortcut, s_scale: of FaceID-Plus and PlusV2 alone, see FaceIdPlusProjection.
        """
        return self.image_proj(embedding, clip, shortcut, s_scale)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(K', V') of each layer in checkpoint order, each [B,tokens,C]."""
        return [(layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)) for layer in self.ip_adapter.values()]


def sizes_of(weights: Mapping[str, Tensor], name: str) -> dict:
    """Constructor arguments of the IdentityAdapter that flat checkpoint tensors of the file `name` belong to.

    Raises CheckpointError where they cannot be such: nothing is built from what a file says before this.
    """

    def shape(key: str, dimensions: int = 2) -> tuple[int, ...]:
        if key not in weights:
            raise lacks([key], "identity-adapter", name)
        if weights[key].ndim != dimensions or weights[key].numel() == 0:
            raise odd(f"{key} of shape {[*weights[key].shape]}")
        return tuple(weights[key].shape)

    def depth(prefix: str) -> int:
        layers = {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}
        if len(layers) > DEEPEST:
            raise odd(f"{len(layers)} layers called {prefix}")
        return len(layers)

    def odd(what: str) -> CheckpointError:
        return CheckpointError(f"'{name}' has {what}, which no identity adapter has: {SOURCES['identity-adapter']}.")

    last = max((int(match[1]) for key in weights if (match := LAYER.fullmatch(key))), default=0)
    sizes = {"channels": tuple(shape(f"ip_adapter.{n}.to_k_ip.weight")[0] for n in range(1, last + 1, 2))}
    resampler = "image_proj.perceiver_resampler."
    if "image_proj.latents" in weights:
        _, tokens, width = shape("image_proj.latents", 3)
        dim, clip_dim = shape("image_proj.proj_out.weight")[0], shape("image_proj.proj_in.weight")[1]
        sizes |= {"dim": dim, "clip_dim": clip_dim, "id_dim": None, "tokens": tokens, "width": width}
        sizes |= {"depth": depth("image_proj.layers.")}
    else:
        (width,) = shape("image_proj.norm.weight", 1)
        plus = any(key.startswith(resampler) for key in weights)
        sizes |= {"dim": width, "clip_dim": shape(resampler + "proj_in.weight")[1] if plus else None}
        sizes |= {"id_dim": shape("image_proj.proj.0.weight")[1], "depth": depth(resampler + "layers.")}
        sizes |= {"tokens": shape("image_proj.proj.2.weight")[0] // width}
    if sizes["clip_dim"] is not None and width % HEAD_DIM:
        raise odd(f"a Q-Former of width {width}, not a multiple of {HEAD_DIM}")
    return sizes


def lora_of(state_dict: Mapping) -> dict[str, Tensor]:
    """The LoRA inside a FaceID checkpoint, under names that ComfyUI's LoRA loading knows; empty where there is none.

    `ip_adapter.N.to_q_lora.down.weight` becomes `diffusion_model.(the layer's place).attn1.to_q.lora_down.weight`: an
    even N is self-attention (attn1), the odd one after it the cross-attention (attn2) of the same place.
    Raises CheckpointError where N runs neither over SD1.5's layers nor over SDXL's.
    """
    found = {match: weight for key, weight in flatten(state_dict).items() if (match := LORA.fullmatch(key))}
    if not found:
        return {}
    count = 1 + max(int(match[1]) for match in found)
    layers = next((layers for layers in BASES.values() if 2 * len(layers) == count), None)
    if layers is None:
        raise CheckpointError(
            f"The LoRA in the identity adapter is for {count} attention layers, but SD1.5 has 32 and SDXL 140: the "
            f"file is incomplete; {SOURCES['identity-adapter']}."
        )
    lora = {}
    for match, weight in found.items():
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


def lora_pairs(lora: Mapping[str, Tensor], name: str) -> list[str]:
    """The tensors that widen again (up, B), one for each layer. Raises CheckpointError where half a pair is missing."""
    words = {word: other for pair in PAIRS for word, other in (pair, pair[::-1])}
    found = {key: word for key in lora for word in words if word in key}
    partners = [key.replace(word, words[word]) for key, word in found.items()]
    if missing := [key for key in partners if key not in lora]:
        raise lacks(missing, "lora", name)
    widening = {up for up, _ in PAIRS}
    return [key for key, word in found.items() if word in widening]


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
