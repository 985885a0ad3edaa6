"""Apply Identity in ComfyUI's own sampling, in this process, on random nano weights."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


def attend(q, k, v, heads):
    """Multi-head softmax(QK^T/sqrt(d))V, written out, in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("people", [1, 3])
def test_patch_is_decoupled_attention(pack, people):
    """Three images, negative and positive chunk: person i for image i, nobody for the negative chunk."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, length, 32, generator=g) for length in (10, 7, 7))
    keys, values = (torch.randn(people + 1, 4, 32, generator=g) for _ in range(2))
    patch = pack.nodes.id_attention.IdentityAttention(keys, values, 0.7)
    out = patch(q, k, v, {"n_heads": 2, "attn_precision": None, "cond_or_uncond": [1, 0], "sigmas": torch.ones(3)})
    rows = [people] * 3 + (list(range(3)) if people == 3 else [0] * 3)
    expected = attend(q, k, v, 2) + 0.7 * attend(q, keys[rows], values[rows], 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_layer_fires_at_every_step(sample, pack, nano, apply, adapter, identity, monkeypatch):
    fired = Counter()
    call = pack.nodes.id_attention.IdentityAttention.__call__

    def counted(self, q, k, v, extra_options):
        fired[extra_options["block"] + (extra_options["block_index"],)] += 1
        return call(self, q, k, v, extra_options)

    monkeypatch.setattr(pack.nodes.id_attention.IdentityAttention, "__call__", counted)
    sample(apply(identity), nano.prompt, steps=3)
    assert fired == dict.fromkeys(adapter.adapter.layers, 3)
    assert len(fired) == 16 and fired["middle", 0, 0] == 3


@pytest.mark.parametrize("strength, start, end", [(0.0, 0.0, 1.0), (1.0, 0.5, 0.5), (1.0, 0.8, 0.2)])
def test_no_strength_or_no_time_is_no_change(sample, nano, apply, identity, strength, start, end):
    plain = sample(nano.model, nano.prompt)
    assert torch.equal(sample(apply(identity, strength, start, end), nano.prompt), plain)
    assert not torch.equal(sample(apply(identity), nano.prompt), plain)


def test_start_and_end(sample, nano, apply, identity):
    """The only step of a one-step run lies at the start."""

    def one_step(model):
        return sample(model, nano.prompt, steps=1, sampler="euler")

    assert not torch.equal(one_step(nano.model), one_step(apply(identity)))
    assert torch.equal(one_step(nano.model), one_step(apply(identity, start=0.5)))
    assert torch.equal(one_step(apply(identity)), one_step(apply(identity, end=0.5)))


def test_start_and_end_add_up(sample, nano, apply, identity):
    """The two parts of the run, one after the other in a chain, are the whole."""
    parts, whole = apply(identity, start=0.4, model=apply(identity, end=0.4)), apply(identity)
    torch.testing.assert_close(sample(parts, nano.prompt, steps=4), sample(whole, nano.prompt, steps=4))


def test_chained_strengths_add_up(sample, nano, apply, identity):
    chained = sample(apply(identity, 0.5, model=apply(identity, 0.7)), nano.prompt)
    torch.testing.assert_close(chained, sample(apply(identity, 1.2), nano.prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [None, 0])
def test_another_packs_patch_is_kept(sample, nano, apply, identity, index):
    """A patch that doubles the text attention, under either kind of key, goes on doing so and is moved."""

    class Doubled:
        moved = 0

        def __call__(self, q, k, v, extra_options):
            return 2 * attend(q, k, v, extra_options["n_heads"]).to(q)

        def to(self, target):
            Doubled.moved += 1
            return self

    doubled = nano.model.clone()
    doubled.set_model_attn2_replace(Doubled(), "middle", 0, index)
    both, plain = sample(apply(identity, 1e-6, model=doubled), nano.prompt), sample(nano.model, nano.prompt)
    torch.testing.assert_close(both, sample(doubled, nano.prompt), rtol=1e-3, atol=1e-3)
    assert Doubled.moved and (both - plain).abs().max() > 0.01


@pytest.mark.parametrize("index", [None, 0])
def test_no_patch_hides_ours(nano, apply, identity, adapter, pack, index):
    """ComfyUI takes the patch of (block, id, index) if there is one, else that of (block, id)."""
    patched = nano.model.clone()
    patched.set_model_attn2_replace(lambda q, k, v, extra_options: q, "middle", 0, index)
    patches = apply(identity, model=patched).model_options["transformer_options"]["patches_replace"]["attn2"]
    for place in adapter.adapter.layers:
        assert isinstance(patches.get(place, patches.get(place[:2])), pack.nodes.id_attention.IdentityAttention)


def test_each_image_gets_its_person(sample, nano, apply, identity):
    """Image i of a batch is what it would be with person i alone."""
    both = sample(apply(identity), nano.prompt)
    for i in range(2):
        alone = sample(apply(replace(identity, people=identity.people[i : i + 1])), nano.prompt)
        torch.testing.assert_close(both[i], alone[i])
        assert (both[i] - alone[1 - i]).abs().max() > 0.01


def test_negative_chunk_has_nobody(nano, apply, identity):
    """The negative chunk is as with a person of zero embedding and the CLIP states of the zero image."""
    import comfy.model_management
    from comfy.conds import CONDRegular
    from comfy.samplers import calc_cond_batch

    cond = [{"model_conds": {"c_crossattn": CONDRegular(nano.prompt[0][0])}, "uuid": "0"}]
    x, sigma = torch.randn(2, 4, 16, 16), torch.full((2,), 5.0)

    def denoised(identity, conds):
        model = apply(identity)
        comfy.model_management.load_models_gpu([model])
        model.pre_run()
        return calc_cond_batch(model.model, conds, x, sigma, model.model_options)

    positive, negative = denoised(identity, [cond, cond])
    assert (positive - negative).abs().max() > 0.01
    nobody = replace(identity.people[0], embeddings=torch.zeros(1, 512), clip=identity.clip_uncond[None])
    expected = denoised(replace(identity, people=(nobody,)), [cond])[0]
    torch.testing.assert_close(negative, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(positive, denoised(identity, [cond])[0], rtol=1e-4, atol=1e-4)


def test_the_same_photo_twice_is_the_photo_once(sample, nano, apply, identity):
    person = identity.people[0]
    twice = replace(person, embeddings=person.embeddings.repeat(2, 1), clip=person.clip.repeat(2, 1, 1))
    once = [sample(apply(replace(identity, people=(p,))), nano.prompt) for p in (person, twice)]
    torch.testing.assert_close(*once, rtol=1e-4, atol=1e-4)


def test_more_people_than_images(sample, nano, apply, identity):
    with pytest.raises(ValueError, match=r"identity has 2 people but the latent batch has 3 images"):
        sample(apply(identity), nano.prompt, batch=3)


def test_identity_survives_unloading(sample, nano, apply, identity):
    import comfy.model_management

    before = sample(apply(identity), nano.prompt)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(apply(identity), nano.prompt), before)


def test_sdxl_adapter_on_sd15(nodes, nano, pack, identity):
    """A narrow adapter with SDXL's 70 layers."""
    core = pack.ridfr_core.adapter
    sdxl = pack.nodes.managed.ManagedAdapter(
        "sdxl.bin", core.IdentityAdapter((64,) * 70, 64, 128, depth=1), True, pack.nodes.managed.managed
    )
    with pytest.raises(ValueError, match=r"sdxl.bin is for SDXL .* but the model is for SD1.5 .*load an adapter"):
        nodes["RIDFR_ApplyIdentity"].execute(nano.model, sdxl, identity, 1.0, 0.0, 1.0)


def test_identity_of_another_clip(apply, identity):
    wide = replace(identity.people[0], clip=torch.zeros(1, 257, 1280))
    with pytest.raises(ValueError, match="needs a CLIP vision model of width 128 but .* width 1280"):
        apply(replace(identity, people=(wide,)))
