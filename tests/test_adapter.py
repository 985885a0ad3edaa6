import re
import time

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core.adapter import BASES, IdentityAdapter, decoupled_attention, find_lora, lora_of, lora_pairs
from ridfr_core.checkpoints import CheckpointError, kind_of
from ridfr_core.layouts import unet_to_ldm

PLACES = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}
SIZES = {
    "SD1.5": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (32, 64, 96, 96),
        "attention_head_dim": 8,
    },
    "SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 96),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (2, 4, 6),
    },
}


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def random_weights(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return module.eval()


def meta_unet(base):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=64, **SIZES[base])


@pytest.mark.parametrize("scale", [0.6, torch.tensor([0.0, 1.0, 0.3]).view(3, 1, 1)])
def test_decoupled_attention_is_equation_3(scale):
    torch.manual_seed(1)
    text, q = torch.randn(3, 10, 32), torch.randn(3, 10, 32)
    k, v = torch.randn(3, 4, 32), torch.randn(3, 4, 32)
    want = text.double().clone()
    for b in range(3):
        for head in range(4):
            columns = slice(8 * head, 8 * head + 8)
            weights = (q[b, :, columns].double() @ k[b, :, columns].double().T / 8**0.5).softmax(-1)
            factor = scale if isinstance(scale, float) else scale[b].double()
            want[b, :, columns] += factor * (weights @ v[b, :, columns].double())
    assert relative_error(decoupled_attention(text, q, k, v, 4, scale), want) < 1e-6


@torch.inference_mode()
def test_a_layer_matches_diffusers_with_one_identity_per_image():
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    processor = IPAdapterAttnProcessor2_0(64, 32, num_tokens=(4,), scale=0.8)
    layer = random_weights(Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16, processor=processor))
    x, text, tokens = torch.randn(3, 16, 64), torch.randn(3, 7, 32), torch.randn(3, 4, 32)
    want = layer(x, (text, [tokens[:, None]]))

    layer.set_processor(type("Projected", (), {"__call__": lambda _, attn, x, text: attn.to_q(x)})())
    q = layer.to_q(x)
    text_out = decoupled_attention(torch.zeros_like(q), q, layer.to_k(text), layer.to_v(text), 4, 1.0)
    k_id, v_id = processor.to_k_ip[0](tokens), processor.to_v_ip[0](tokens)
    got = layer.to_out[0](decoupled_attention(text_out, q, k_id, v_id, 4, 0.8))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("base", ["SD1.5", "SDXL"])
def test_layers_are_where_the_checkpoint_order_puts_them(base):
    """Published order is diffusers' `attn_processors`; ComfyUI's place follows from the ldm key of the same layer."""
    unet = meta_unet(base)
    ldm = dict(zip(unet.state_dict(), unet_to_ldm(unet.state_dict()), strict=True))
    widths, places = [], []
    for name in unet.attn_processors:
        if ".attn2." in name:
            key = name.replace("processor", "to_k.weight")
            block, number, *_, index = ldm[key].split(".attn2")[0].split(".")
            places.append((PLACES[block], 0 if block == "middle_block" else int(number), int(index)))
            widths.append(unet.get_parameter(key).shape[0])
    with torch.device("meta"):
        adapter = IdentityAdapter(widths, dim=64, clip_dim=64)
    assert adapter.base == base
    assert list(adapter.layers) == places


KINDS = {
    "FaceID": dict(clip_dim=None),
    "FaceID-portrait": dict(clip_dim=None, tokens=16),
    "FaceID-Plus": dict(clip_dim=96),
    "plus-face": dict(clip_dim=96, id_dim=None, tokens=16, width=192),
}


def published(unet, lora, rank=2):
    """`ip_adapter` of a published file: its ModuleList runs over `attn_processors`, so N counts these."""
    state = {}
    for n, name in enumerate(unet.attn_processors):
        width, context = unet.get_parameter(name.replace("processor", "to_k.weight")).shape
        if ".attn2." in name:
            state |= {f"ip_adapter.{n}.{key}.weight": torch.randn(width, 64) for key in ("to_k_ip", "to_v_ip")}
        for key in ("q", "k", "v", "out") if lora else ():
            inside = context if key in "kv" else width
            state[f"ip_adapter.{n}.to_{key}_lora.down.weight"] = torch.randn(rank, inside)
            state[f"ip_adapter.{n}.to_{key}_lora.up.weight"] = torch.randn(width, rank)
    return state


@pytest.mark.parametrize(("base", "count"), [("SD1.5", 288), ("SDXL", 1260)])
@pytest.mark.parametrize("kind", KINDS)
def test_published_files_load(base, count, kind):
    """The number of tensors of `ip_adapter` is that of the published files."""
    unet, lora = meta_unet(base), kind.startswith("FaceID")
    state = published(unet, lora)
    assert len(state) == (count if lora else count // 9)
    template = IdentityAdapter([64] * (16 if base == "SD1.5" else 70), dim=64, **KINDS[kind])
    state |= {f"image_proj.{key}": weight for key, weight in template.image_proj.state_dict().items()}
    adapter = IdentityAdapter.from_state_dict(state)
    assert kind_of(state) == "identity-adapter"
    assert (adapter.base, adapter.dim) == (base, 64)
    assert {key: getattr(adapter, key) for key in ("clip_dim", "id_dim")} == {"id_dim": 512} | {
        key: value for key, value in KINDS[kind].items() if key in ("clip_dim", "id_dim")
    }
    assert (adapter.needs_face, adapter.needs_clip) == (kind != "plus-face", kind in ("FaceID-Plus", "plus-face"))
    embedding = torch.randn(2, 512) if adapter.needs_face else None
    tokens = adapter.tokens(embedding, torch.randn(2, 9, 96) if adapter.needs_clip else None)
    assert tokens.shape == (2, KINDS[kind].get("tokens", 4), 64)
    for n, (k, _) in enumerate(adapter.keys_values(tokens)):
        torch.testing.assert_close(k, tokens @ state[f"ip_adapter.{2 * n + 1}.to_k_ip.weight"].T)


@pytest.mark.parametrize("base", ["SD1.5", "SDXL"])
def test_lora_gets_the_names_of_its_layers(base):
    """Layer N is diffusers' Nth attention; its ldm name follows from the conversion of a whole UNet."""
    unet = meta_unet(base)
    state = published(unet, lora=True)
    ldm = dict(zip(unet.state_dict(), unet_to_ldm(unet.state_dict()), strict=True))
    want = {}
    for n, name in enumerate(unet.attn_processors):
        for key in ("q", "k", "v", "out"):
            module = name.replace("processor", "to_out.0" if key == "out" else f"to_{key}")
            target = "diffusion_model." + ldm[f"{module}.weight"].removesuffix(".weight")
            for side in ("down", "up"):
                want[f"{target}.lora_{side}.weight"] = state[f"ip_adapter.{n}.to_{key}_lora.{side}.weight"]
    got = lora_of(state)
    assert got.keys() == want.keys() and all(got[key] is want[key] for key in want)


def test_a_lora_beside_the_file_is_found_where_there_is_none_inside(tmp_path):
    path, beside = tmp_path / "faceid.bin", {"unet.mid.processor.to_q_lora.down.weight": torch.ones(1)}
    assert find_lora(path, {}) == {}
    save_file(beside, tmp_path / "faceid_lora.safetensors")
    inside = published(meta_unet("SD1.5"), lora=True)
    assert find_lora(path, {}) == beside and find_lora(path, inside).keys() == lora_of(inside).keys()


def test_every_missing_tensor_is_named():
    state = IdentityAdapter([64] * 16, dim=64, clip_dim=64, id_dim=8, depth=1).state_dict()
    for key in state:
        with pytest.raises(CheckpointError, match=f"'x.bin' lacks {re.escape(key)}, which belongs to an ident"):
            IdentityAdapter.from_state_dict({k: w for k, w in state.items() if k != key}, name="x.bin")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ip_adapter.31.to_k_ip.weight": None, "ip_adapter.31.to_v_ip.weight": None}, "has 15 cross-attention layers"),
        ({"image_proj.norm.bias": torch.zeros(3)}, r"'x.bin' has image_proj.norm.bias of shape \[3\], but .* \[64\]"),
        ({"image_proj.time.weight": torch.zeros(3)}, "'x.bin' holds 1 tensors, such as image_proj.time.weight"),
        ({"ip_adapter.7.to_v_ip.weight": torch.zeros(64, 32)}, r"'x.bin' has ip_adapter.7.to_v_ip.weight of shape"),
    ],
)
def test_odd_files_are_refused(change, sentence):
    state = IdentityAdapter([64] * 16, dim=64, clip_dim=64, id_dim=8, depth=1).state_dict() | change
    with pytest.raises(CheckpointError, match=sentence):
        IdentityAdapter.from_state_dict({k: w for k, w in state.items() if w is not None}, name="x.bin")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ip_adapter.100000000.to_k_ip.weight": torch.zeros(64, 64)}, "holds 1 tensors, such as ip_adapter.100000000"),
        ({"ip_adapter.9999.to_k_ip.weight": torch.zeros(64, 64)}, "lacks ip_adapter.33.to_k_ip.weight"),
        ({"ip_adapter.x.to_v_ip.weight": torch.zeros(64, 64)}, "holds 1 tensors, such as ip_adapter.x"),
        ({f"ip_adapter.{'9' * 5000}.to_k_ip.weight": torch.zeros(64, 64)}, "holds 1 tensors"),
        ({"ip_adapter.7.to_k_ip.weight": torch.tensor(1.0)}, r"ip_adapter.7.to_k_ip.weight of shape \[\], which no"),
        ({"image_proj.norm.weight": torch.zeros(4, 4)}, r"has image_proj.norm.weight of shape \[4, 4\], which no"),
        ({"image_proj.norm.weight": torch.zeros(0)}, r"has image_proj.norm.weight of shape \[0\], which no"),
        ({"image_proj.proj.0.weight": torch.zeros(0, 10**15)}, r"proj.0.weight of shape \[0, 10+\], which"),
        ({"image_proj.proj.2.weight": torch.zeros(5)}, r"has image_proj.proj.2.weight of shape \[5\], which no"),
        ({"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(5)}, r"proj_in.weight of shape \[5\], which no"),
        ({f"image_proj.perceiver_resampler.layers.{i}.0.x": torch.zeros(1) for i in range(9999)}, "has 9999 layers"),
        ({f"ip_adapter.{i}.to_q_lora.{s}.weight": torch.zeros(2, 2) for i in range(9) for s in ("up", "down")},
         "LoRA in the identity adapter is for 9 attention layers"),
    ],
)
def test_nothing_that_a_file_says_is_built(change, sentence):
    state = IdentityAdapter([64] * 16, dim=64, clip_dim=64, id_dim=8, depth=1).state_dict() | change
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=sentence):
        IdentityAdapter.from_state_dict(state, name="x.bin")
        lora_of(state)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("change", [{"image_proj.latents": torch.zeros(16, 128)}, {"image_proj.proj_in.weight": None}])
def test_an_odd_plus_face(change):
    plus = IdentityAdapter([64] * 16, dim=64, clip_dim=96, id_dim=None, tokens=16, depth=1, width=128).state_dict()
    state = {key: weight for key, weight in (plus | change).items() if weight is not None}
    with pytest.raises(CheckpointError, match="'x.bin' (has image_proj.latents of shape|lacks image_proj.proj_in)"):
        IdentityAdapter.from_state_dict(state, name="x.bin")


def test_a_q_former_of_odd_width_is_refused():
    state = IdentityAdapter([64] * 16, dim=48, clip_dim=64, id_dim=8, depth=1).state_dict()
    with pytest.raises(CheckpointError, match="has a Q-Former of width 48, not a multiple of 64, which no identity"):
        IdentityAdapter.from_state_dict(state, name="x.bin")


def test_instantid_is_no_plus_face():
    state = IdentityAdapter([64] * 70, dim=64, clip_dim=512, id_dim=None, tokens=16, depth=1, width=128).state_dict()
    assert kind_of(state) == "instantid"
    for width in (1024, 1280, 1664):
        state["image_proj.proj_in.weight"] = torch.zeros(128, width)
        assert kind_of(state) == "identity-adapter"


@torch.inference_mode()
def test_portraits_tokens_of_several_photos_stand_side_by_side():
    """As published: n photos give n times 16 tokens, each photo's as alone."""
    adapter = random_weights(IdentityAdapter([64] * 16, dim=64, clip_dim=None, tokens=16))
    photos = torch.nn.functional.normalize(torch.randn(5, 512), dim=1)
    tokens = adapter.tokens(photos, None)
    assert adapter.kind == "FaceID portrait" and tokens.shape == (5, 16, 64)
    torch.testing.assert_close(tokens[3:4], adapter.tokens(photos[3:4], None))


def test_the_files_own_tensors_may_be_kept():
    _, state = checkpoint()
    half = {key: weight.half() for key, weight in state.items()}
    kept = IdentityAdapter.from_state_dict(half, keep_dtype=True).state_dict()
    assert all(kept[key].data_ptr() == half[key].data_ptr() for key in half)


@pytest.mark.parametrize("names", [("lora_up", "lora_down"), ("lora.up", "lora.down"), ("lora_B", "lora_A")])
def test_half_a_pair_of_a_lora(names):
    up, down = (f"mid.to_q.{name}.weight" for name in names)
    assert lora_pairs({up: torch.ones(2, 1), down: torch.ones(1, 2), "mid.to_q.alpha": torch.ones(())}, "x") == [up]
    for alone, other in ((up, down), (down, up)):
        with pytest.raises(CheckpointError, match=f"'x' lacks {re.escape(other)}"):
            lora_pairs({alone: torch.ones(2, 1)}, "x")


def checkpoint():
    adapter = random_weights(IdentityAdapter(range(64, 64 + 16 * 8, 8), dim=128, clip_dim=96, depth=2))
    return adapter, adapter.state_dict()


@pytest.mark.parametrize("nested", [False, True])
@torch.inference_mode()
def test_loads_a_checkpoint(nested):
    adapter, state = checkpoint()
    state = dict(sorted(state.items()))  # a file's order: "ip_adapter.11" before "ip_adapter.3"
    if nested:
        parts = [(key.split(".", 1), weight) for key, weight in state.items()]
        state = {top: {key: w for (head, key), w in parts if head == top} for top in ("image_proj", "ip_adapter")}
    loaded = IdentityAdapter.from_state_dict(state)
    assert loaded.dim == 128
    assert loaded.channels == tuple(range(64, 64 + 16 * 8, 8))
    assert lora_of(state) == {}
    embedding, clip = torch.randn(2, 512), torch.randn(2, 9, 96)
    tokens = loaded.tokens(embedding, clip, shortcut=True)
    assert torch.equal(tokens, adapter.tokens(embedding, clip, shortcut=True))
    pairs = loaded.keys_values(tokens)
    for n, (k, v) in enumerate(pairs):
        flat = adapter.state_dict()
        assert torch.equal(k, tokens @ flat[f"ip_adapter.{2 * n + 1}.to_k_ip.weight"].T)
        assert torch.equal(v, tokens @ flat[f"ip_adapter.{2 * n + 1}.to_v_ip.weight"].T)


@torch.inference_mode()
def test_each_image_has_its_own_identity():
    adapter, _ = checkpoint()
    embedding, clip = torch.randn(3, 512), torch.randn(3, 9, 96)
    batch = adapter.tokens(embedding, clip)
    for i in range(3):
        assert relative_error(batch[i : i + 1], adapter.tokens(embedding[i : i + 1], clip[i : i + 1])) < 1e-5
    assert relative_error(batch[:1], batch[1:2]) > 0.1


def test_half_precision_files_compute_in_single():
    _, state = checkpoint()
    loaded = IdentityAdapter.from_state_dict({key: weight.half() for key, weight in state.items()})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_another_base_is_refused():
    with pytest.raises(CheckpointError, match="has 5 cross-attention layers, but SD1.5 has 16 and SDXL 70"):
        IdentityAdapter([64] * 5, dim=128, clip_dim=96)
    assert [len(layers) for layers in BASES.values()] == [16, 70]


def test_weighted_and_masked_tokens():
    """softmax with a bias log(w) is attention in which a token counts w times; -inf leaves it out."""
    torch.manual_seed(2)
    text, q, k, v = (torch.randn(2, length, 16) for length in (9, 9, 5, 5))
    counts = torch.tensor([[1.0, 1, 3, 3, 0], [2.0, 2, 1, 0, 0]])
    want = text.double().clone()
    for b in range(2):
        for head in range(2):
            columns = slice(8 * head, 8 * head + 8)
            scores = counts[b] * (q[b, :, columns].double() @ k[b, :, columns].double().T / 8**0.5).exp()
            want[b, :, columns] += 0.7 * (scores / scores.sum(-1, keepdim=True)) @ v[b, :, columns].double()
    got = decoupled_attention(text, q, k, v, 2, 0.7, counts.log()[:, None, None])
    assert relative_error(got, want) < 1e-6
