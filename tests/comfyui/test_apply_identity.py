"""Apply Identity in ComfyUI's own sampling, in this process, on random nano weights."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("inference_mode")


def attend(q, k, v, heads, counts=None):
    """Multi-head attention, written out, in float64; key t counts counts[:, t] times, once if None."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    scores = scores if counts is None else scores * counts.double()[:, None, None]
    return (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


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


@pytest.mark.parametrize("people", [1, 3])
def test_patch_with_weights_masks_and_strengths(pack, people):
    """Each image its mask and strength in both chunks, each person its weights; a layer of 4x3 under masks of 8x6."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(6, length, 32, generator=g) for length in (12, 7, 7))
    keys, values = (torch.randn(people + 1, 4, 32, generator=g) for _ in range(2))
    weights = torch.rand(people + 1, 4, generator=g) * torch.tensor([1.0, 1, 1, 0])
    masks, strengths = torch.rand(3, 8, 6, generator=g), torch.tensor([0.0, 0.5, 2.0])
    attention = pack.nodes.id_attention
    patch = attention.IdentityAttention(
        keys, values, strengths, (9.0, 2.0), weights.log()[:, None, None], attention.Region(masks)
    )
    options = {"n_heads": 2, "attn_precision": None, "cond_or_uncond": [1, 0], "activations_shape": [6, 32, 4, 3]}
    with no_value_read():
        out = patch(q, k, v, {**options, "sigmas": torch.full((3,), 5.0)})
    rows = [people] * 3 + (list(range(3)) if people == 3 else [0] * 3)
    scale = masks.view(3, 4, 2, 3, 2).mean((2, 4)).view(3, 12, 1) * strengths.view(3, 1, 1)
    expected = attend(q, k, v, 2) + scale.repeat(2, 1, 1) * attend(q, keys[rows], values[rows], 2, weights[rows])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    late = patch(q, k, v, {**options, "sigmas": torch.full((3,), 1.0)})
    torch.testing.assert_close(late.double(), attend(q, k, v, 2), rtol=1e-5, atol=1e-6)


@contextmanager
def no_value_read():
    """Fails where a tensor's value is read by Python, for which a GPU would have to finish first."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    with Refuse():
        yield


def test_all_layers_share_a_region(pack):
    """It is resized and moved once for each device, however many layers ask, and given up after the run."""
    region = pack.nodes.id_attention.Region(torch.rand(1, 8, 8))
    for device in map(torch.device, ("cpu", "meta")):
        there = region.at(4, 4, device)
        assert there.device == device and region.at(4, 4, device) is there
    region.cleanup()
    assert region.at(4, 4, device) is not there


class Copies(TorchDispatchMode):
    """Counts what is copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = all(isinstance(x, torch.Tensor) for x in (out, *args[:1])) and bool(args)
        self.count += tensors and out.device != args[0].device
        return out


def test_a_patch_works_on_the_device_of_its_call(pack, apply, identity, two_photos, monkeypatch):
    """With all that it may hold. `meta` stands in for a GPU: it refuses the processor's tensors as a GPU does."""
    monkeypatch.setattr(pack.nodes.id_attention, "optimized_attention", lambda q, *args, **kwargs: q)
    person = with_photos(two_photos, [0, 1], [1.0, 0.5])
    people = replace(identity, people=(person, identity.people[1]), thumbnails=torch.zeros(3, 3, 112, 112))
    model = apply(people, 0.8, 0.1, 0.9, mask=torch.rand(2, 16, 16), strengths=torch.tensor([0.5, 1.0]))
    model = apply(people, 0.8, mask=torch.rand(1, 16, 16), model=model)
    for patch in attention_patches(model).values():
        patch.to(torch.device("meta"))  # ComfyUI's call, whose result the model that samples never sees
        width = patch.keys.shape[-1]
        q, k, v = (torch.empty(4, length, width, device="meta", dtype=torch.float16) for length in (4, 7, 7))
        options = {"n_heads": 4, "attn_precision": None, "cond_or_uncond": [1, 0], "activations_shape": [4, 32, 2, 2],
                   "sigmas": torch.empty(2, device="meta")}
        for first in (True, False):
            with Copies() as copies:
                out = patch(q, k, v, options)
            assert out.device.type == "meta" and out.dtype == torch.float16
            assert bool(copies.count) == first, "each is moved once"


def attention_patches(model):
    return model.model_options["transformer_options"]["patches_replace"]["attn2"]


def test_nothing_stays_where_a_run_was(sample, nano, apply, identity):
    """Unlike the weights, what the patches have placed is not ComfyUI's to unload."""
    model = apply(identity, mask=torch.ones(1, 8, 8))
    sample(model, nano.prompt)
    assert not any(patch._placed or patch.region._resized for patch in attention_patches(model).values())


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


def test_start_and_end_are_the_schedules_of_the_model_that_runs(sample, nano, apply, identity):
    """Whether it is changed before or after Apply Identity."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    def zsnr(model):
        return ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]

    before = apply(identity, start=0.1, end=0.6, model=zsnr(nano.model))
    after = zsnr(apply(identity, start=0.1, end=0.6))
    assert torch.equal(sample(before, nano.prompt, steps=6), sample(after, nano.prompt, steps=6))


@pytest.mark.parametrize("end, said", [(0.2, "does nothing in this run: its steps lie between 0.3"),
                                       (0.6, "acts in 3 of 7 steps")])
def test_a_part_that_a_run_never_meets_is_told(nano, apply, identity, shown, end, said):
    from nodes import common_ksampler

    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    options = (7, 1.0, "euler", "normal", nano.prompt, nano.prompt, latent)
    drawn = [common_ksampler(model, 1, *options, denoise=0.7)[0]["samples"]
             for model in (nano.model, apply(identity, end=end))]
    assert said in shown["RIDFR_ApplyIdentity"]
    assert torch.equal(*drawn) == (not said.startswith("acts"))


@pytest.mark.parametrize("options, said", [({"start": 0.8, "end": 0.3}, "its start is not before its end"),
                                           ({"strength": 0.0}, "its strength is 0")])
def test_an_identity_that_does_nothing_is_told(nano, apply, identity, shown, options, said):
    assert apply(identity, **options) is nano.model and said in shown["RIDFR_ApplyIdentity"]


def test_chained_strengths_add_up(sample, nano, apply, identity):
    chained = sample(apply(identity, 0.5, model=apply(identity, 0.7)), nano.prompt)
    torch.testing.assert_close(chained, sample(apply(identity, 1.2), nano.prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [None, 0])
def test_another_packs_patch_is_kept(sample, nano, apply, identity, index):
    """A patch that doubles the text attention, under either kind of key, goes on doing so and is moved."""

    class Doubled:
        moved = cleaned = 0

        def __call__(self, q, k, v, extra_options):
            return 2 * attend(q, k, v, extra_options["n_heads"]).to(q)

        def to(self, target):
            Doubled.moved += 1
            return self

        def cleanup(self):
            Doubled.cleaned += 1

    doubled = nano.model.clone()
    doubled.set_model_attn2_replace(Doubled(), "middle", 0, index)
    both, plain = sample(apply(identity, 1e-6, model=doubled), nano.prompt), sample(nano.model, nano.prompt)
    torch.testing.assert_close(both, sample(doubled, nano.prompt), rtol=1e-3, atol=1e-3)
    assert Doubled.moved and Doubled.cleaned and (both - plain).abs().max() > 0.01


@pytest.mark.parametrize("index", [None, 0])
def test_the_patch_before_is_moved_in_place(nano, apply, identity, index):
    """Also one whose `to` gives another object, as ComfyUI's own clones of a model's options keep the first."""

    class There:
        def __init__(self, device="cpu"):
            self.device = device

        def __call__(self, q, k, v, extra_options):
            return q

        def to(self, target):
            return There(target) if isinstance(target, torch.device) else self

    model = nano.model.clone()
    model.set_model_attn2_replace(There(), "middle", 0, index)
    model = apply(identity, model=model)
    ours = next(patch for place, patch in attention_patches(model).items() if place[0] == "middle")
    model.model_patches_to(torch.device("meta"))
    assert ours.previous.device == torch.device("meta")


class Sum:
    """IPAdapter_plus's protocol, which InstantID and PuLID share: who comes second adds to the patch that is there.

    A term is called as callback(out, q, k, v, extra_options, **options) between sigma_start and sigma_end.
    """

    def __init__(self, callback, **options):
        self.terms = [(callback, options)]

    def add(self, callback, **options):
        self.terms.append((callback, options))

    def __call__(self, q, k, v, extra_options):
        out = attend(q, k, v, extra_options["n_heads"]).to(q)
        sigma = extra_options["sigmas"][0].item()
        for callback, options in self.terms:
            if options["sigma_end"] <= sigma <= options["sigma_start"]:
                out = out + callback(out, q, k, v, extra_options, **options)
        return out

    @classmethod
    def apply(cls, model, weight, start=1e9, end=0.0):
        """As their nodes do: a clone, whose dicts are copied, and in each layer a patch, or a term of the patch."""
        model = model.clone()
        options = model.model_options["transformer_options"] = model.model_options["transformer_options"].copy()
        replaced = options["patches_replace"] = options.get("patches_replace", {}).copy()
        layers = replaced["attn2"] = replaced.get("attn2", {}).copy()
        blocks = [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("output", i) for i in range(3, 12)] + [("middle", 0)]
        for place in blocks:
            term = {"weight": weight, "sigma_start": start, "sigma_end": end}
            if place in layers:
                layers[place].add(cls.term, **term)
            else:
                layers[place] = cls(cls.term, **term)
        return model

    @staticmethod
    def term(out, q, k, v, extra_options, weight, **options):
        return 0 if weight == 0 else weight * q


def test_packs_that_add_to_a_patch_may_come_before_and_after(sample, nano, apply, identity):
    ours = apply(identity)
    theirs_after, ours_after = Sum.apply(ours, 0.3), apply(identity, model=Sum.apply(nano.model, 0.3))
    both = sample(theirs_after, nano.prompt)
    torch.testing.assert_close(both, sample(ours_after, nano.prompt), rtol=1e-3, atol=1e-3)
    alone = sample(ours, nano.prompt)
    assert (both - alone).abs().max() > 0.01
    again = sample(Sum.apply(theirs_after, -0.3), nano.prompt)
    torch.testing.assert_close(again, alone, rtol=1e-3, atol=1e-3)


def test_what_others_add_to_a_clone_is_the_clones_own(sample, nano, apply, identity):
    ours = apply(identity)
    before = sample(ours, nano.prompt)
    first, second = Sum.apply(ours, 0.3), Sum.apply(ours, 0.1)
    assert torch.equal(sample(ours, nano.prompt), before)
    small, large = ((sample(m, nano.prompt) - before).abs().max() for m in (second, first))
    assert 1e-3 < small < large
    Sum.apply(first, 5.0)
    torch.testing.assert_close((sample(first, nano.prompt) - before).abs().max(), large)


def test_what_others_add_acts_in_its_part_of_the_run(sample, nano, apply, identity):
    def one_step(model):
        return sample(model, nano.prompt, steps=1, sampler="euler")

    ours = apply(identity)
    early, late = (Sum.apply(ours, 0.3, *levels) for levels in ((1e9, 1.0), (1.0, 0.0)))
    assert torch.equal(one_step(late), one_step(ours)) and not torch.equal(one_step(early), one_step(ours))


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


def with_photos(person, order, weights):
    """The person with their photos in this order, which may repeat, and with these weights."""
    return replace(person, embeddings=person.embeddings[order], clip=person.clip[order], weights=torch.tensor(weights))


@pytest.fixture(scope="module")
def two_photos(identity):
    """A person with two photos."""
    a, b = identity.people
    return replace(a, embeddings=torch.cat([a.embeddings, b.embeddings]), clip=torch.cat([a.clip, b.clip]))


def test_weights_count_like_repeated_photos(sample, nano, apply, identity, two_photos):
    def sampled(order, weights):
        return sample(apply(replace(identity, people=(with_photos(two_photos, order, weights),))), nano.prompt, batch=1)

    once, twice = sampled([0, 1], [1.0, 1.0]), sampled([0, 0, 1], [1.0, 1.0, 1.0])
    assert (once - twice).abs().max() > 1e-3
    torch.testing.assert_close(sampled([0, 1], [1.0, 0.5]), twice, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampled([0, 1], [0.0, 3.0]), sampled([1], [1.0]), rtol=1e-4, atol=1e-4)


def test_people_with_different_numbers_of_photos(sample, nano, apply, identity, two_photos):
    """Each image of the batch is as with its person alone, also under CFG."""
    two = with_photos(two_photos, [0, 1], [1.0, 0.5])
    negative = [[nano.prompt[0][0] * 0.5, {}]]
    people = (two, identity.people[1])
    both = sample(apply(replace(identity, people=people)), nano.prompt, negative, cfg=2.0)
    for i, person in enumerate(people):
        alone = sample(apply(replace(identity, people=(person,))), nano.prompt, negative, cfg=2.0)
        torch.testing.assert_close(both[i], alone[i], rtol=1e-3, atol=1e-3)


def test_masks_of_one_and_of_nothing(sample, nano, apply, identity):
    whole, nothing = torch.ones(1, 24, 40), torch.zeros(2, 16, 16)
    full = sample(apply(identity), nano.prompt)
    assert torch.equal(sample(apply(identity, mask=whole), nano.prompt), full)
    assert torch.equal(sample(apply(identity, mask=nothing), nano.prompt), sample(nano.model, nano.prompt))
    left = torch.cat([torch.ones(1, 16, 8), torch.zeros(1, 16, 8)], 2)
    moved = (sample(apply(identity, mask=left), nano.prompt) - sample(nano.model, nano.prompt)).abs().mean((0, 1, 2))
    assert moved[:8].mean() > moved[8:].mean()


def test_a_mask_of_nothing_is_told(apply, identity, shown, pack):
    black, white = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)

    def told(*masks, **options):
        shown.pop("RIDFR_ApplyIdentity", None)
        apply(identity, mask=torch.cat(masks), **options)
        return shown.get("RIDFR_ApplyIdentity", "")

    assert "black everywhere: disconnect it" in told(black) and told(black) == told(black, black)
    assert told(black, white) == told(white) == ""
    everyone = pack.nodes.apply_identity.ALL_IN_ONE
    assert "mask of person 2 is black everywhere" in told(white, black, people=everyone)


def test_all_people_in_one_picture(sample, nano, apply, identity, pack):
    """Each in their mask, as if they were applied one after the other."""
    masks = torch.zeros(2, 16, 16)
    masks[0, :, :8], masks[1, :, 8:] = 1, 1
    everyone = apply(identity, mask=masks, people=pack.nodes.apply_identity.ALL_IN_ONE)
    chain = nano.model
    for person, mask in zip(identity.people, masks, strict=True):
        chain = apply(replace(identity, people=(person,)), model=chain, mask=mask)
    assert torch.equal(sample(everyone, nano.prompt, batch=3), sample(chain, nano.prompt, batch=3))
    with pytest.raises(ValueError, match="2 people who are all to be in every picture, but there are 1 masks"):
        apply(identity, mask=masks[:1], people=pack.nodes.apply_identity.ALL_IN_ONE)


def test_each_picture_has_its_strength(sample, nano, apply, identity):
    mixed = sample(apply(identity, strengths=torch.tensor([0.0, 1.0])), nano.prompt)
    assert torch.equal(mixed[0], sample(nano.model, nano.prompt)[0])
    torch.testing.assert_close(mixed[1], sample(apply(identity), nano.prompt)[1])
    with pytest.raises(ValueError, match="There are 3 strengths but the latent batch has 2 images"):
        sample(apply(identity, strengths=torch.ones(3)), nano.prompt)


def test_strength_by_block(sample, nano, apply, identity, adapter, pack):
    """Each part on its own acts in its layers only; all at 0 are no change."""
    off = {"down": 0.0, "middle": 0.0, "up": 0.0}
    assert apply(identity, **off) is nano.model
    found = []
    for part, block in zip(off, ("input", "middle", "output"), strict=True):
        model = apply(identity, 0.5, **{**off, part: 3.0})
        patches = model.model_options["transformer_options"]["patches_replace"]["attn2"]
        assert {key[0] for key in patches} == {block} and {patch.strength for patch in patches.values()} == {1.5}
        found += patches
    assert len(found) == len(adapter.adapter.layers)
    thirds = apply(identity, down=0.3, middle=0.3, up=0.3)
    torch.testing.assert_close(sample(thirds, nano.prompt), sample(apply(identity, 0.3), nano.prompt))


@pytest.mark.parametrize("sizes", [(3e38, 1.0), (1e-20, 1e-21), (1e-45, 1e-45)])
def test_weights_of_any_size_compare(sample, nano, apply, identity, two_photos, sizes):
    """Only their ratio matters."""

    def sampled(weights):
        person = with_photos(two_photos, [0, 1], weights)
        return sample(apply(replace(identity, people=(person,))), nano.prompt, batch=1)

    ratio = sizes[1] / sizes[0]
    torch.testing.assert_close(sampled(list(sizes)), sampled([1.0, max(ratio, 1e-30)]), rtol=1e-3, atol=1e-3)


def test_s_scale(sample, nano, apply, identity):
    """At 0 PlusV2 has the face alone: what CLIP saw does not matter."""
    blind = tuple(replace(person, clip=torch.zeros_like(person.clip)) for person in identity.people)
    blind = replace(identity, people=blind)
    ours, theirs = (sample(apply(one, s_scale=0.0), nano.prompt) for one in (identity, blind))
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, sample(apply(identity), nano.prompt))


def test_the_adapters_lora(nodes, nano, identity, adapter):
    """It changes the model's weights by its strength, and not at all where the identity's strength is 0."""
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    width = nano.model.get_model_object(f"{name}.weight").shape[0]
    lora = {f"{name}.lora_up.weight": torch.ones(width, 1), f"{name}.lora_down.weight": torch.ones(1, width)}
    node, adapter = nodes["RIDFR_ApplyIdentity"], replace(adapter, lora=lora)

    def weights(strength, lora_strength):
        model = node.execute(nano.model, adapter, identity, strength, 0.0, 1.0, lora_strength=lora_strength)[0]
        return {key: patch[0][0] for key, patch in model.patches.items()}

    assert weights(1.0, 0.7) == {f"{name}.weight": 0.7}
    assert weights(1.0, 0.0) == weights(0.0, 1.0) == {}


def test_faceid_needs_no_clip(sample, nodes, nano, identity, adapter, pack):
    core = pack.ridfr_core.adapter
    with torch.inference_mode(False):
        faceid = core.IdentityAdapter(adapter.adapter.channels, adapter.adapter.dim, None)
    managed = pack.nodes.managed
    faceid = managed.ManagedAdapter("faceid.bin", faceid, False, managed.managed(faceid))
    people = tuple(replace(person, clip=None) for person in identity.people)
    no_clip = replace(identity, people=people, clip_uncond=None)
    faceid = replace(faceid, recogniser=identity.digest)
    node = nodes["RIDFR_ApplyIdentity"]
    model = node.execute(nano.model, faceid, no_clip, 1.0, 0.0, 1.0)[0]
    assert not torch.equal(sample(model, nano.prompt), sample(nano.model, nano.prompt))
    with pytest.raises(ValueError, match="needs CLIP features but the identity has none: connect clip_vision"):
        node.execute(nano.model, adapter, no_clip, 1.0, 0.0, 1.0)


def test_no_photo_counts(apply, identity):
    nobody = replace(identity.people[1], weights=torch.zeros(1))
    with pytest.raises(ValueError, match="All photos of person 2 have weight 0"):
        apply(replace(identity, people=(identity.people[0], nobody)))


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


def test_face_models_that_an_adapter_was_not_made_for(apply, adapter, identity, nodes, nano, pack):
    """An adapter whose file says nothing is for photos, so it refuses the drawn portraits' recognisers."""
    nano_model, judge = map(pack.ridfr_core.face_model.digest_of, pack.nodes.paths.own_recognisers())
    assert identity.digest == nano_model == adapter.recogniser
    photos = "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"
    node = nodes["RIDFR_ApplyIdentity"]

    def applied(recogniser, digest):
        node.execute(nano.model, replace(adapter, recogniser=recogniser), replace(identity, digest=digest), 1, 0, 1)

    for recogniser, digest in ((nano_model, nano_model), (None, photos), (None, "bgr-" + photos), (photos, photos)):
        applied(recogniser, digest)
    for digest in (photos, judge, "bgr-" + nano_model):
        with pytest.raises(ValueError, match="adapter identity_adapter.* was made for another face model: use .* nano"):
            applied(nano_model, digest)
    for digest in (nano_model, judge, "bgr-" + judge):
        with pytest.raises(ValueError, match="which knows drawn portraits only, and the adapter .* is for photos"):
            applied(None, digest)


def test_embeddings_of_another_width(apply, identity):
    narrow = replace(identity.people[1], embeddings=torch.randn(1, 128))
    with pytest.raises(ValueError, match="reads face embeddings of width 512, but those of person 2 have width 128"):
        apply(replace(identity, people=(identity.people[0], narrow)))


def test_raw_embeddings(sample, nodes, nano, adapter, identity, pack):
    """FaceID-portrait "unnorm" learnt them as long as the recogniser makes them; their length is the photo's `norm`."""
    quality = pack.ridfr_core.identity.Quality(100, 0.9, 20.0, 1.0)
    long = [replace(person, embeddings=person.embeddings * 20) for person in identity.people]
    known = [replace(person, quality=(quality,)) for person in identity.people]
    node = nodes["RIDFR_ApplyIdentity"]

    def sampled(people, raw):
        model = node.execute(nano.model, replace(adapter, raw=raw), replace(identity, people=tuple(people)), 1, 0, 1)[0]
        return sample(model, nano.prompt)

    assert torch.equal(sampled(known, True), sampled(long, False))
    with pytest.raises(ValueError, match="reads raw face embeddings, whose length is not known for person 1: use the"):
        sampled(identity.people, True)


def test_identity_of_another_clip(apply, identity):
    wide = replace(identity.people[0], clip=torch.zeros(1, 257, 1280))
    with pytest.raises(ValueError, match="needs a CLIP vision model of width 128 but .* width 1280"):
        apply(replace(identity, people=(wide,), clip_uncond=torch.zeros(257, 1280)))


@pytest.mark.parametrize("clip", [torch.zeros(1, 9, 128), torch.zeros(1, 65, 64)])
def test_clip_features_that_differ(apply, identity, clip):
    odd = replace(identity.people[1], clip=clip)
    with pytest.raises(ValueError, match=r"CLIP features of person 2 have the size .* but those of no one \[65, 128\]"):
        apply(replace(identity, people=(identity.people[0], odd)))


def test_an_adapter_for_other_prompts(nodes, nano, adapter, identity, monkeypatch):
    """SD2 has the layers of SD1.5, but reads wider prompts: nothing else would stop an SD1.5 adapter there."""
    monkeypatch.setitem(nano.model.model.model_config.unet_config, "context_dim", 1024)
    with pytest.raises(ValueError, match="reads prompts of width 128, but this one's have width 1024: load an adapter"):
        nodes["RIDFR_ApplyIdentity"].execute(nano.model, adapter, identity, 1.0, 0.0, 1.0)
