"""What reaches a node is held to the node's schema, in one place for all nodes.

ComfyUI checks the numbers and words of widgets, but not those that come over a wire, lets NaN pass in both, and never
looks into what a wire carries.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from numbers import Real

import torch
from torch import Tensor

from ..ridfr_core.errors import RidfrError
from ..ridfr_core.identity import Identity
from .guidance_record import Record
from .managed import ManagedAdapter, ManagedFaceModel

DARKEST, BRIGHTEST = -0.5, 2.0  # sharpening and half precision overshoot 0..1 a little; -1..1 and 0..255 are mistakes
FILES = ("file", "pack")  # choices among files: the loader knows where it looked
NAMED = 6  # how many options an error lists
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAKER = "look at the node that made it"

# What else a wire may carry: its name, and its class or, where other packs have classes of their own, what nodes use.
OBJECTS = {
    "RIDFR_FACE_MODEL": ("a face model", ManagedFaceModel),
    "RIDFR_IDENTITY": ("an identity", Identity),
    "RIDFR_IDENTITY_ADAPTER": ("an identity adapter", ManagedAdapter),
    "RIDFR_GUIDANCE": ("the guidance of ID-Preserving Sampling", Record),
    "STRING": ("text", str),
    "BOOLEAN": ("true or false", bool),
    "MODEL": ("a diffusion model", "get_model_object"),
    "VAE": ("a VAE", "first_stage_model"),
    "CLIP_VISION": ("a CLIP vision model", "encode_image"),
}


def checked(execute: Callable) -> Callable:
    """Decorates a node's `execute(cls, ...)`: every value is held to its input in the schema before the node runs.

    Numbers are finite and between min and max, words are among the options, wires carry what they are named after, and
    the tensors on them are finite. Raises RidfrError naming the node, the input and, in a batch, the image.
    """
    names = list(signature(execute).parameters)[1:]

    @wraps(execute)
    def run(cls, *args, **kwargs):
        values = dict(zip(names, args)) | kwargs
        schema = cls.define_schema()
        for slot in schema.inputs:
            if slot.id in values and not (slot.optional and values[slot.id] is None):
                values[slot.id] = check(values[slot.id], slot, f"{schema.display_name}: {label(slot)}")
        return execute(cls, **values)

    return run


def label(slot) -> str:
    """What the editor calls an input."""
    return slot.display_name or slot.id.replace("_", " ")


def check(value, slot, what: str):
    """The value, whole numbers as int, tensors without a gradient. what: node and input, for the error."""
    kind = slot.get_io_type()
    if kind in ("INT", "FLOAT"):
        return _number(value, slot, what)
    if kind == "COMBO":
        return _text(value, what) if slot.id in FILES else _choice(value, slot.options, what)
    if kind in TENSORS:
        return TENSORS[kind](value, what)
    name, expected = OBJECTS[kind]
    if not (hasattr(value, expected) if isinstance(expected, str) else isinstance(value, expected)):
        raise _foreign(value, name, what)
    return value


def refused(what: str, found: str, expected: str, remedy: str) -> RidfrError:
    return RidfrError(f"{what} {found}, but {expected}: {remedy}.")


def _foreign(value, kind: str, what: str) -> RidfrError:
    found = "nothing" if value is None else f"an object of another kind ({type(value).__name__})"
    return refused(what, f"should be {kind}", f"{found} arrived", "connect the right output")


def _number(value, slot, what: str) -> int | float:
    whole = slot.get_io_type() == "INT"
    if not isinstance(value, Real):
        raise _foreign(value, "a whole number" if whole else "a number", what)
    if not slot.min <= value <= slot.max:  # nor is NaN
        huge = isinstance(value, int) and abs(value) > 10**15
        shown = f"{max(min(value, 10**300), -(10**300)):.4g}" if huge else str(value)
        raise refused(what, f"is {shown}", f"it can be {slot.min} to {slot.max}", "change that number")
    if whole and value != int(value):
        raise _foreign(value, "a whole number", what)
    return int(value) if whole else float(value)


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        raise _foreign(value, "text", what)
    return value


def _choice(value, options: list[str], what: str) -> str:
    if not (isinstance(value, str) and value in options):
        more = f" and {len(options) - NAMED} more" if len(options) > NAMED else ""
        listed = ", ".join(map(repr, options[:NAMED])) + more
        shown = repr(str(value)[:60]) if isinstance(value, (str, Real, type(None))) else f"a {type(value).__name__}"
        raise refused(what, f"is {shown}", "there is no such option", f"choose one of {listed}")
    return value


def _tensor(value, kind: str, what: str) -> Tensor:
    """A tensor of floating-point numbers, at least one and none of them NaN or infinite; detached."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise _foreign(value, kind, what)
    if not value.is_floating_point():
        raise refused(what, f"has values of the type {value.dtype}", f"{kind} has fractions, 0 to 1 in pictures", MAKER)
    if value.numel() == 0:
        raise refused(what, f"is empty (its size is {_size(value)})", f"{kind} is expected", MAKER)
    low, high = _span(value if value.itemsize > 1 else value.float())
    finite = low.isfinite() & high.isfinite()
    if not finite.all():
        number = "" if len(finite) == 1 else f" {int((~finite).nonzero()[0]) + 1}"
        raise refused(what + number, "has values that are not numbers (NaN or infinite)", f"{kind} has none",
                      f"{MAKER}, often a VAE or a model in half precision")
    return value.detach()


def _span(value: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each image, of anything with fewer than three dimensions as one.

    NaN where there is one. Nothing is made of the batch's size, which for a video is many gigabytes.
    """
    each = value if value.ndim > 2 else value.reshape(1, -1)
    inner = tuple(range(1, each.ndim))
    return each.amin(inner), each.amax(inner)


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "1"


def _image(value, what: str) -> Tensor:
    """[B,H,W,C], grey, RGB or RGBA, in [0,1] or nearly so."""
    image = _tensor(value, "an image", what)
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise refused(what, f"has the size {_size(image)}", "images are batch x height x width x 1, 3 or 4 colours",
                      "connect an image output")
    for number, (low, high) in enumerate(torch.stack(_span(image[..., :3]), 1).tolist(), 1):
        _in_range(low, high, f"{what} {number}" if len(image) > 1 else what)
    return image


def _in_range(low: float, high: float, what: str) -> None:
    if low < DARKEST or high > BRIGHTEST:
        raise refused(what, f"has values from {low:.4g} to {high:.4g}", "0 (black) to 1 (white) is expected", MAKER)


def _mask(value, what: str) -> Tensor:
    """[M,H,W] in [0,1] of a mask of 2, 3 or (with one channel) 4 dimensions; whole numbers and yes/no count, too."""
    if isinstance(value, Tensor) and value.dtype in WHOLE:
        value = value.float()
    mask = _tensor(value, "a mask", what)
    if mask.ndim not in (2, 3, 4) or mask.ndim == 4 and mask.shape[1] != 1:
        raise refused(what, f"has the size {_size(mask)}", "masks are batch x height x width", "connect a mask output")
    _in_range(mask.min().item(), mask.max().item(), what)
    return mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1)


def _latent(value, what: str) -> dict:
    """A latent's dict with [B,C,h,w], or a video's [B,C,T,h,w], in "samples"."""
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, Tensor):
        raise _foreign(value, "a latent", what)
    samples = _tensor(samples, "a latent", what)
    if samples.ndim not in (4, 5):
        raise refused(what, f"has the size {_size(samples)}", "latents are batch x channels x height x width",
                      "connect the latent of a picture")
    return value | {"samples": samples}


def _line(kind: str) -> Callable[[object, str], Tensor]:
    def check_line(value, what: str) -> Tensor:
        numbers = _tensor(value, kind, what)
        if numbers.ndim != 1:
            raise refused(what, f"has the size {_size(numbers)}", f"{kind} is one row", "connect the right output")
        return numbers

    return check_line


TENSORS = {
    "IMAGE": _image,
    "MASK": _mask,
    "LATENT": _latent,
    "SIGMAS": _line("a list of noise levels"),
    "RIDFR_STRENGTHS": _line("a list of strengths"),
}
