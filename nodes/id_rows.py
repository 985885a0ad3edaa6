"""Whom each row of a prediction is for: which prompt, which image of the batch, which part of the picture.

ComfyUI says only at which place of a list a prompt was, and nothing of what was cut. But it batches, crops and windows
the conditioning along with the latents. So each prompt gets a conditioning of the latents' shape that numbers their
pixels, and what arrives of it tells where the rows belong, whoever has cut them: prompts with an area or "mask bounds",
context windows, tiled diffusion.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfy.conds import CONDNoiseShape
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..ridfr_core.errors import RidfrError
from .noise_range import NoiseRange

KEY = "ridfr_identity"
ROLLS = "SpotDiffusion"  # of tiled diffusion: moves the latents by random steps before it cuts tiles


@dataclass(frozen=True, eq=False)
class Run:
    """A sampler run on latents [images, channels, *size]; sampling: ComfyUI's model_sampling."""

    images: int
    size: tuple[int, int]
    sampling: object
    _levels: dict[NoiseRange, tuple[float, float]] = field(default_factory=dict)

    def levels(self, part: NoiseRange) -> tuple[float, float]:
        """The range's noise levels (first, last), asked of the model once."""
        if part not in self._levels:
            self._levels[part] = part.sigmas(self.sampling)
        return self._levels[part]


class Rows:
    """The rows of one call of the UNet; what layers ask for in common is computed once.

    images: how many the whole batch has. nobody [rows]: of a prompt without the person. image [rows]: its number in the
    batch. pixel [rows or 1, h, w]: the numbers of the predicted pixels in the whole picture, whose size is `size`. Both
    are None where that is not known. sigma [rows or 1]: noise levels.
    """

    def __init__(
        self,
        images: int,
        size: tuple[int, int] | None,
        nobody: Tensor,
        image: Tensor | None,
        pixel: Tensor | None,
        sigma: Tensor | None,
        run: Run | None = None,
    ):
        self.images, self.size, self.nobody, self.image, self.pixel = images, size, nobody, image, pixel
        self.sigma, self._run, self._known = sigma, run, {}

    def _once(self, key, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def person(self, people: int) -> Tensor:
        """[rows]: the number of each row's person, `people` for no one. One person is in all images."""
        if people == 1:
            return self._once(people, self.nobody.long)
        image = self._image(people, "The identity has {} people")
        return self._once(people, lambda: image.masked_fill(self.nobody, people))

    def each(self, values: Tensor, what: str) -> Tensor:
        """[1 or images, ...] -> [1 or rows, ...]. what: names the values in an error."""
        return values if len(values) == 1 else values.index_select(0, self._image(len(values), what))

    def mask(self, region, height: int, width: int) -> Tensor:
        """A Region's masks at the size of a layer [1 or rows, height * width, 1]."""
        return self._once((region, height, width), lambda: self._mask(region, height, width))

    def _mask(self, region, height: int, width: int) -> Tensor:
        if self.pixel is None:
            raise RidfrError(
                "The mask of Apply Identity cannot be used here, since only a part of the picture is predicted and it "
                "is not known which: disconnect the mask, or the node that draws the picture in parts."
            )
        masks = region.at(*self.size, self.pixel.device)
        pixel = self.pixel
        if len(masks) > 1:
            pixel = pixel + self._image(len(masks), "There are {} masks").view(-1, 1, 1) * masks[0].numel()
        return resized(masks.flatten()[pixel], height, width).flatten(1)[..., None]

    def within(self, part: NoiseRange | None, levels: tuple[float, float] | None) -> Tensor | None:
        """[rows or 1,1,1], true where the noise is between two levels; None for no limits.

        part: of the model's schedule, whose levels the run knows; `levels` hold where there is no run.
        """
        if part is not None and self._run is not None:
            levels = self._run.levels(part)
        if levels is None:
            return None
        first, last = levels
        return self._once(levels, lambda: ((self.sigma <= first) & (self.sigma >= last)).view(-1, 1, 1))

    def _image(self, count: int, what: str) -> Tensor:
        if count != self.images:
            raise RidfrError(
                f"{what.format(count)} but the latent batch has {self.images} images: give as many of both, or one for "
                "all."
            )
        if self.image is None:
            raise RidfrError(
                f"{what.format(count)}, and it is not known which of the images are predicted here: give one for all, "
                "or disconnect the node that draws them in parts."
            )
        return self.image


def rows_of(extra_options: dict, q: Tensor) -> Rows:
    """The rows of q [rows,L,C] in an attention patch.

    Where the model is called outside a sampler run, the first place of ComfyUI's list is taken for the person's prompt,
    and what is predicted for the whole picture.
    """
    if isinstance(rows := extra_options.get(KEY), Rows):
        return rows
    chunks = extra_options["cond_or_uncond"]
    images = len(q) // len(chunks)
    nobody = torch.tensor([bool(chunk) for chunk in chunks], device=q.device).repeat_interleave(images)
    image = torch.arange(images, device=q.device).repeat(len(chunks))
    sigma = extra_options["sigmas"][:1] if "sigmas" in extra_options else None
    size = tuple(extra_options.get("activations_shape", (0, 0, 1, q.shape[1]))[2:])
    return Rows(images, size, nobody, image, torch.arange(size[0] * size[1], device=q.device).view(1, *size), sigma)


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """[N,h,w] -> [N,height,width], each value the mean of those it covers, as torch's adaptive pooling.

    Written out, since Apple's GPU cannot pool to sizes that don't divide.
    """
    if x.shape[1:] == (height, width):
        return x
    return averages(x.shape[1], height, x) @ x @ averages(x.shape[2], width, x).T


def averages(old: int, new: int, like: Tensor) -> Tensor:
    """[new,old]: row i has the mean of the values i * old / new to (i + 1) * old / new, rounded outwards."""
    i, j = torch.arange(new, device=like.device)[:, None], torch.arange(old, device=like.device)
    covered = ((j >= i * old // new) & (j * new < (i + 1) * old)).to(like)
    return covered / covered.sum(1, keepdim=True)


def install(model: ModelPatcher) -> None:
    """Let the attention patches of a model know their rows."""
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, number_pixels)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, know_rows)


def number_pixels(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    """Wraps a sampler: gives each of the guider's prompts its numbers, inverted (negative) for no one's prompts."""
    if noise.ndim == 4:
        options = extra_args["model_options"]
        images, _, *size = noise.shape
        options["transformer_options"][KEY] = Run(images, tuple(size), guider.inner_model.model_sampling)
        tiles = options.get("model_function_wrapper")
        if hasattr(tiles, "batched_bboxes"):
            options["model_function_wrapper"] = beside_tiles(tiles)
        numbers = torch.arange(images * size[0] * size[1], device=noise.device).view(images, 1, *size)
        for name, prompts in guider.conds.items():
            numbered = CONDNoiseShape(numbers if has_person(guider, name) else ~numbers)
            for prompt in prompts:
                prompt["model_conds"] = {**prompt["model_conds"], KEY: numbered}
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def beside_tiles(tiles: Callable) -> Callable:
    """The wrapper of ComfyUI-TiledDiffusion, with the numbers cut as it cuts the latents.

    It hands the model a batch of `batched_bboxes` at each call, and fails on conditioning of the latents' size.
    """

    def wrapper(apply_model, args):
        conds, calls = dict(args["c"]), itertools.count()
        numbers = conds.pop(KEY, None)

        def tile(x, t, **c):
            boxes = tiles.batched_bboxes[next(calls)]
            if numbers is not None:
                rolled = type(tiles).__name__ == ROLLS
                c[KEY] = torch.cat([numbers if rolled else numbers[box.slicer] for box in boxes])
            return apply_model(x, t, **c)

        return tiles(tile, {**args, "c": conds})

    return wrapper


def has_person(guider, name: str) -> bool:
    """Whether the person belongs in the guider's prompts of this name.

    ComfyUI's rule is `prompt_type`, else the name. It is asked of the prompts as they were given: during a run, ComfyUI
    adds copies that carry another list's. Raises RidfrError where neither says it.
    """
    given = next(iter(guider.original_conds.get(name, ())), {})
    kind = str(given.get("prompt_type", name))
    if "negative" not in kind and "positive" not in kind:
        raise RidfrError(
            f"The guider {type(guider).__name__} has a prompt called '{kind}', and it is not known whether the person "
            "belongs in it: use a guider with positive and negative prompts, such as CFG Guider."
        )
    return "negative" not in kind


def know_rows(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """Wraps a call of the model: from what has arrived of the numbers, tells the patches what they need.

    A prompt without numbers is not the guider's, such as Perp-Neg's empty one, and has no one.
    """
    numbers = conds.pop(KEY, None)
    transformer_options = transformer_options or {}
    if isinstance(run := transformer_options.get(KEY), Run):
        transformer_options = {**transformer_options, KEY: read(numbers, run, x, t)}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)


def read(numbers: Tensor | None, run: Run, x: Tensor, t: Tensor) -> Rows:
    """The rows of a prediction of latents x [rows,C,h,w] at noise levels t [rows]."""
    pixels = run.size[0] * run.size[1]
    if numbers is None and x.shape[2:] == run.size and len(x) % run.images == 0:
        numbers = ~torch.arange(run.images * pixels, device=x.device).view(-1, 1, *run.size)
        numbers = numbers.repeat(len(x) // run.images, 1, 1, 1)
    if numbers is None:
        nobody = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return Rows(run.images, run.size, nobody, None, None, t, run)
    if len(numbers) != len(x):
        raise RidfrError(
            f"Another node predicts {len(x)} pictures for prompts of {len(numbers)}, so it is not known in which of "
            "them the person belongs: disconnect that node, or Apply Identity."
        )
    numbers = numbers[:, 0].to(x.device)
    nobody = numbers[:, 0, 0] < 0
    numbers = torch.where(numbers < 0, ~numbers, numbers)
    placed = numbers.shape[1:] == x.shape[2:]
    return Rows(run.images, run.size, nobody, numbers[:, 0, 0] // pixels, numbers % pixels if placed else None, t, run)
