"""Every row of every prediction knows whom it is for, whatever guider asks and whatever cuts the latents."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def prompts(nano):
    """Conditioning by its name, told apart by its tensors."""
    tensor = nano.prompt[0][0]
    scale = {"positive": 1.0, "second": 0.9, "negative": 0.5, "empty": 0.25}
    return {name: [[tensor * by, {}]] for name, by in scale.items()}


def guided(guider, noise=None):
    """One step of a guider on position-coded noise."""
    import comfy.samplers

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.sigma_max), float(sampling.sigma_min)])
    noise = coded() if noise is None else noise
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)


def coded(images=2, height=16, width=24):
    """Noise [images,4,h,w] whose channels are image, row, column, and 1."""
    axes = torch.meshgrid(torch.arange(images), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([*axes, torch.ones_like(axes[0])], 1).float()


def cfg_guider(model, prompts):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts["positive"], prompts["negative"])
    guider.set_cfg(2.0)
    return guider


def dual(style):
    def make(model, prompts):
        from comfy_extras.nodes_custom_sampler import DualCFGGuider

        return DualCFGGuider.execute(model, prompts["positive"], prompts["negative"], prompts["empty"], 2, 3, style)[0]

    return make


def dual_model(model, prompts):
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    return DualModelGuider.execute(model, prompts["positive"], 2.0, model, prompts["negative"])[0]


def perp_neg_guider(model, prompts):
    from comfy_extras.nodes_perpneg import PerpNegGuider

    return PerpNegGuider.execute(model, prompts["positive"], prompts["negative"], prompts["empty"], 2.0, 1.0)[0]


def patched(node, *options):
    """CFG on a model that another node has patched."""

    def make(model, prompts):
        import importlib

        module, _, name = node.rpartition(".")
        execute = getattr(importlib.import_module(f"comfy_extras.{module}"), name).execute
        return cfg_guider(execute(model, *(prompts.get(option, option) for option in options))[0], prompts)

    return make


def basic(model, prompts):
    from comfy_extras.nodes_custom_sampler import BasicGuider

    return BasicGuider.execute(model, prompts["positive"])[0]


def areas(model, prompts):
    """Two regional prompts; ComfyUI makes a negative one for each area, with the positive one's id."""
    left, right = ({"area": (16, 12, 0, x), "strength": 1.0} for x in (0, 12))
    positive = [[prompts["positive"][0][0], left], [prompts["second"][0][0], right]]
    return cfg_guider(model, prompts | {"positive": positive})


GUIDERS = {
    "cfg": cfg_guider,
    "basic": basic,
    "dual cfg": dual("regular"),
    "dual cfg, nested": dual("nested"),
    "dual model": dual_model,
    "perp-neg": perp_neg_guider,
    "old perp-neg": patched("nodes_perpneg.PerpNeg", "empty", 1.0),
    "self-attention guidance": patched("nodes_sag.SelfAttentionGuidance", 0.5, 2.0),
    "perturbed attention": patched("nodes_pag.PerturbedAttentionGuidance", 3.0),
    "areas": areas,
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_the_person_is_in_the_positive_prompts_alone(apply, identity, prompts, pack, guider):
    seen = {}

    def note(n, context, value, extra_options):
        rows = pack.nodes.id_rows.rows_of(extra_options, n)
        for prompt, nobody in zip(context, rows.nobody.tolist(), strict=True):
            name = next(name for name, ((tensor, _),) in prompts.items() if torch.equal(prompt, tensor[0].to(prompt)))
            seen.setdefault(name, set()).add(nobody)
        return n, context, value

    model = apply(identity).clone()
    model.set_model_attn2_patch(note)
    guided(GUIDERS[guider](model, prompts))
    assert seen.pop("positive") == {False} and seen.pop("second", {False}) == {False}
    assert all(nobody == {True} for nobody in seen.values())
    assert seen or guider == "basic"


def test_guiders_that_are_cfg_give_what_cfg_gives(apply, identity, prompts):
    """Dual CFG with a second prompt that is the negative one, and Dual Model CFG with the same model twice."""
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    model = apply(identity)
    expected = guided(cfg_guider(model, prompts))
    for cfg2, style in ((2.0, "regular"), (1.0, "nested")):
        twice = DualCFGGuider.execute(
            model, prompts["positive"], prompts["negative"], prompts["negative"], 2.0, cfg2, style
        )[0]
        torch.testing.assert_close(guided(twice), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided(dual_model(model, prompts)), expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_unknown_sense_is_refused(apply, identity, prompts):
    import comfy.samplers

    class Odd(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            conds = [self.conds["style"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[0]

    guider = Odd(apply(identity))
    guider.inner_set_conds({"style": prompts["positive"]})
    with pytest.raises(ValueError, match="The guider Odd has a prompt called 'style'.*: use a guider with positive"):
        guided(guider)


# What cuts latents


class Tiles:
    """Tiled diffusion's protocol: a wrapper of the model's call that hands it several tiles as one batch.

    Whatever has the latents' size is cut in the same way; the tiles of a batch come one after the other.
    """

    def __init__(self, height=8, width=10, batch=3):
        self.size, self.batch = (height, width), batch

    def __call__(self, apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        height, width = (min(a, b) for a, b in zip(self.size, x.shape[2:], strict=True))
        corners = [
            (min(top, x.shape[2] - height), min(left, x.shape[3] - width))
            for top in range(0, x.shape[2], height)
            for left in range(0, x.shape[3], width)
        ]
        out, counts = torch.zeros_like(x), torch.zeros_like(x)
        for first in range(0, len(corners), self.batch):
            part = corners[first : first + self.batch]

            def cut(value, part=part):
                if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[2:] == x.shape[2:]:
                    return torch.cat([value[..., i : i + height, j : j + width] for i, j in part])
                return value.repeat(len(part), *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value

            found = apply_model(cut(x), cut(t), **{name: cut(value) for name, value in c.items()})
            for (i, j), tile in zip(part, found.chunk(len(part)), strict=True):
                out[..., i : i + height, j : j + width] += tile
                counts[..., i : i + height, j : j + width] += 1
        return out / counts


class BoxedTiles(Tiles):
    """ComfyUI-TiledDiffusion's: it says where its tiles are, a list for each call, and cuts nothing but the latents."""

    class Box:
        def __init__(self, i, j, height, width):
            self.slicer = (slice(None), slice(None), slice(i, i + height), slice(j, j + width))

    batched_bboxes = ()

    def __call__(self, apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        assert not any(isinstance(value, torch.Tensor) and value.ndim == 4 for value in c.values())
        height, width = (min(a, b) for a, b in zip(self.size, x.shape[2:], strict=True))
        boxes = [
            self.Box(min(i, x.shape[2] - height), min(j, x.shape[3] - width), height, width)
            for i in range(0, x.shape[2], height)
            for j in range(0, x.shape[3], width)
        ]
        self.batched_bboxes = [boxes[i : i + self.batch] for i in range(0, len(boxes), self.batch)]
        out = torch.zeros_like(x)
        for part in self.batched_bboxes:
            conds = {k: v.repeat(len(part), *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v for k, v in c.items()}
            found = apply_model(torch.cat([x[box.slicer] for box in part]), t.repeat(len(part)), **conds)
            for box, tile in zip(part, found.chunk(len(part)), strict=True):
                out[box.slicer] = tile
        return out


class SpotDiffusion(BoxedTiles):
    """Moves the picture before it cuts it."""

    def __call__(self, apply_model, args):
        moved = super().__call__(apply_model, {**args, "input": args["input"].roll(3, -1)})
        return moved.roll(-3, -1)


def tiled(tiles, guider=cfg_guider):
    def make(model, prompts):
        model = model.clone()
        model.set_model_unet_function_wrapper(tiles)
        return guider(model, prompts)

    return make


def windows(dim, length):
    def make(model, prompts):
        from comfy_extras.nodes_context_windows import ContextWindowsManualNode

        options = (length, 1, "standard_static", 1, False, "pyramid", dim, False)
        return cfg_guider(ContextWindowsManualNode.execute(model, *options)[0], prompts)

    return make


def percentages(model, prompts):
    tensor = prompts["positive"][0][0]
    return cfg_guider(model, prompts | {"positive": [[tensor, {"area": ("percentage", 0.5, 0.5, 0.3, 0.4)}]]})


def bounds(model, prompts):
    mask = torch.zeros(1, 128, 192)
    mask[:, 40:, 64:150] = 1
    options = {"mask": mask, "set_area_to_bounds": True, "mask_strength": 1.0}
    return cfg_guider(model, prompts | {"positive": [[prompts["positive"][0][0], options]]})


CUTTERS = {
    "nothing": cfg_guider,
    "areas": areas,
    "percentages": percentages,
    "mask bounds": bounds,
    "tiles": tiled(Tiles()),
    "tiles of areas": tiled(Tiles(), areas),
    "boxed tiles": tiled(BoxedTiles()),
    "boxed tiles of areas": tiled(BoxedTiles(), areas),
    "windows over images": windows(0, 3),
    "windows over rows": windows(2, 8),
    "windows over columns": windows(3, 16),
}


@pytest.mark.parametrize("cutter", CUTTERS)
def test_rows_know_their_image_and_their_pixels(apply, identity, prompts, pack, cutter):
    """Against latents that carry their own coordinates."""
    from comfy.patcher_extension import WrappersMP

    sizes = set()

    def look(executor, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        rows = transformer_options[pack.nodes.id_rows.KEY]
        image, row, column = (x[:, :3] / x[:, 3:]).round().long().unbind(1)
        assert torch.equal(rows.pixel, row * 24 + column) and torch.equal(rows.image, image[:, 0, 0])
        sizes.add(tuple(x.shape[2:]))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)

    images = 1 if cutter in ("windows over rows", "windows over columns") else 5  # ComfyUI's own limit
    model = apply(each(identity, images)).clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", look)
    guided(CUTTERS[cutter](model, prompts), noise=coded(images))
    assert (sizes == {(16, 24)}) == (cutter in ("nothing", "windows over images"))


def each(identity, images):
    """The identity with that many people."""
    from dataclasses import replace

    people = [identity.people[i % 2] for i in range(images)]
    return replace(identity, people=tuple(people), thumbnails=torch.zeros(images, 3, 112, 112))


def test_windows_over_a_batch_change_nothing(apply, identity, prompts):
    """Each image is predicted alone, with its person, its mask and its strength, in whichever windows it comes."""
    masks = torch.rand(5, 16, 24, generator=torch.Generator().manual_seed(1))
    model = apply(each(identity, 5), mask=masks, strengths=torch.tensor([0.0, 0.4, 0.8, 1.2, 1.6]))
    noise = torch.randn(5, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    plain = guided(cfg_guider(model, prompts), noise=noise)
    torch.testing.assert_close(guided(windows(0, 3)(model, prompts), noise=noise), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cutter", ["areas", Tiles, BoxedTiles])
def test_a_mask_acts_where_it_lies_in_the_whole_picture(apply, nano, identity, prompts, cutter):
    """The left half: a prediction of that half alone changes as without a mask, one of the right half not at all."""
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    left = torch.zeros(1, 128, 192)
    left[..., :96] = 1
    person = each(identity, 1)

    def sampled(model):
        if cutter == "areas":
            guider = areas(model, prompts)
            guider.set_cfg(1.0)  # the negative prompt sees the whole picture at once
            return guided(guider, noise=noise)
        return guided(tiled(cutter(16, 12))(model, prompts), noise=noise)

    blind, full, masked = sampled(nano.model), sampled(apply(person)), sampled(apply(person, mask=left))
    assert (full - blind).abs().amin((0, 1, 2)).max() > 1e-3
    torch.testing.assert_close(masked[..., :12], full[..., :12])
    torch.testing.assert_close(masked[..., 12:], blind[..., 12:])


def crop_of_unknown_place(apply_model, args):
    """Predicts the picture's halves without a word about the conditioning."""
    c, t = args["c"], args["timestep"]
    return torch.cat([apply_model(half, t, **c) for half in args["input"].chunk(2, -1)], -1)


@pytest.mark.parametrize("wrapper", [crop_of_unknown_place, SpotDiffusion()])
def test_an_unknown_place_is_refused_where_it_matters(apply, identity, prompts, wrapper):
    def run(**options):
        return guided(tiled(wrapper)(apply(each(identity, 2), **options), prompts))

    assert torch.isfinite(run()).all()
    with pytest.raises(ValueError, match="mask of Apply Identity cannot be used here, .* disconnect the mask, or"):
        run(mask=torch.ones(1, 128, 192))


def test_rows_that_nothing_tells_apart_are_refused(apply, identity, prompts):
    def twice(apply_model, args):
        return apply_model(args["input"].repeat(2, 1, 1, 1), args["timestep"].repeat(2), **args["c"])

    with pytest.raises(ValueError, match="Another node predicts 8 pictures for prompts of 4, .*: disconnect that node"):
        guided(tiled(twice)(apply(each(identity, 1)), prompts))


@pytest.mark.parametrize(
    ("old", "new"), [((16, 24), (8, 12)), ((65, 33), (33, 17)), ((7, 5), (7, 5)), ((3, 4), (6, 8))]
)
def test_resizing_is_torchs_pooling(pack, old, new):
    x = torch.rand(2, *old, generator=torch.Generator().manual_seed(4))
    got = pack.nodes.id_rows.resized(x, *new)
    torch.testing.assert_close(got, torch.nn.functional.adaptive_avg_pool2d(x, new))
    assert pack.nodes.id_rows.resized(torch.ones_like(x), *new).eq(1).all()


def test_conditioning_is_left_as_it_was(apply, identity, prompts):
    """The numbers are a run's own."""
    guider = cfg_guider(apply(identity), prompts)
    before = [dict(cond["model_conds"]) for conds in guider.original_conds.values() for cond in conds]
    guided(guider)
    after = [cond["model_conds"] for conds in guider.original_conds.values() for cond in conds]
    assert before == after


def time_ranges(positive, negative):
    import node_helpers

    parts = [
        node_helpers.conditioning_set_values(positive, {"start_percent": start, "end_percent": end})
        for start, end in ((0.0, 0.5), (0.5, 1.0))
    ]
    return parts[0] + parts[1], negative


def hooks(positive, negative):
    import comfy.hooks

    return comfy.hooks.set_hooks_for_conditioning(positive, comfy.hooks.create_hook_lora({}, 1.0, 1.0)), negative


def default_elsewhere(positive, negative):
    import comfy.hooks

    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    here = comfy.hooks.set_mask_for_conditioning(positive, mask, "default", 1.0)
    return comfy.hooks.set_default_conds_and_combine([here], [positive])[0], negative


def twice_as_long(positive, negative):
    """ComfyUI repeats the shorter prompt, and predicts both at once."""
    return positive, [[negative[0][0].repeat(1, 2, 1), negative[0][1]]]


@pytest.mark.parametrize("said", [time_ranges, hooks, default_elsewhere, twice_as_long])
def test_the_same_prompts_said_otherwise(apply, identity, prompts, sample, said):
    model = apply(identity)
    positive, negative = prompts["positive"], prompts["negative"]
    plain = sample(model, positive, negative, cfg=2.0, sampler="euler")
    other = sample(model, *said(positive, negative), cfg=2.0, sampler="euler")
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-3)
