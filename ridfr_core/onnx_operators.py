"""ONNX's operators in torch: those of face detectors and recognisers.

Each function takes its node and the node's inputs (None where an optional one is left out) and gives the outputs.
Inputs at the places that `operator` names under `host` are on the CPU always: shapes, axes and the like, which are
needed as Python numbers, and reading those from a GPU would stall it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .onnx_file import Node

LARGEST = 2**27  # numbers in a tensor; the largest network needs a tenth for a picture of 640 px
SAME = ("SAME_UPPER", "SAME_LOWER")


class Unsupported(Exception):
    """What of an operator this pack does not run, in a few words."""


class Operator(NamedTuple):
    """run(node, *inputs); host: places of inputs that are needed on the CPU; grows: the result may be larger than what
    goes in, so it is not worked out before it is needed."""

    run: Callable
    host: tuple[int, ...] = ()
    grows: bool = False


OPERATORS: dict[str, Operator] = {}


def allowed(shape: Sequence[int]) -> Sequence[int]:
    """The shape, where a tensor may have it."""
    if math.prod(shape) > LARGEST or min(shape, default=1) < 0:
        raise Unsupported(f"a tensor of the size {' x '.join(map(str, shape))}")
    return shape


def together(*shapes: Sequence[int]) -> list[int]:
    """The shape of tensors that are broadcast. (`torch.broadcast_shapes` imports for seconds when first called.)"""
    rank = max(map(len, shapes))
    return [*map(max, zip(*([1] * (rank - len(shape)) + [*shape] for shape in shapes)))]


def operator(*names: str, host: tuple[int, ...] = (), grows: bool = False) -> Callable:
    def register(function: Callable) -> Callable:
        OPERATORS.update(dict.fromkeys(names, Operator(function, host, grows)))
        return function

    return register


def elementwise(**functions: Callable) -> None:
    """Operators without attributes, by functions of their inputs alone, which are broadcast."""

    def bound(function: Callable) -> Callable:
        def run(node: Node, *inputs: Tensor) -> Tensor:
            if len(inputs) > 1:
                allowed(together(*(x.shape for x in inputs)))
            return function(*inputs)

        return run

    OPERATORS.update({name: Operator(bound(function)) for name, function in functions.items()})


def divide(a: Tensor, b: Tensor) -> Tensor:
    whole = not (a.is_floating_point() or b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


elementwise(
    Add=torch.add,
    Sub=torch.sub,
    Mul=torch.mul,
    Div=divide,
    Pow=torch.pow,
    Neg=torch.neg,
    Abs=torch.abs,
    Sqrt=torch.sqrt,
    Exp=torch.exp,
    Erf=torch.erf,
    Floor=torch.floor,
    Ceil=torch.ceil,
    Reciprocal=torch.reciprocal,
    Relu=torch.relu,
    Sigmoid=torch.sigmoid,
    Tanh=torch.tanh,
    Softplus=F.softplus,
    HardSwish=F.hardswish,
    Equal=torch.eq,
    Less=torch.lt,
    Greater=torch.gt,
    Not=torch.logical_not,
    And=torch.logical_and,
    Or=torch.logical_or,
    Where=torch.where,
)


def whole(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else [int(value) for value in tensor.flatten().tolist()]


@operator("Identity", "Dropout")
def identity(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    return x


@operator("Constant")
def constant(node: Node) -> Tensor:
    for name, value in node.attributes.items():
        if name == "value":
            return value
        if name in ("value_int", "value_ints", "value_float", "value_floats"):
            return torch.tensor(value)
    raise Unsupported("a constant that is not a number")


@operator("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    kind = node.attributes.get("to")
    if kind in (1, 10, 11, 16):  # every fraction is kept in one type, that of the weights
        return x if x.is_floating_point() else x.float()
    if kind in (2, 3, 5, 6, 7, 9):
        return x.bool() if kind == 9 else x.long()
    raise Unsupported("Cast to a type that is not a number")


# -- shapes


@operator("Shape")
def shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[node.attributes.get("start", 0):node.attributes.get("end")])


@operator("Size")
def size(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("Reshape", host=(1,))
def reshape(node: Node, x: Tensor, sides: Tensor | None = None) -> Tensor:
    sides = node.attributes["shape"] if sides is None else whole(sides)
    if not node.attributes.get("allowzero", 0):
        sides = [x.shape[i] if side == 0 else side for i, side in enumerate(sides)]
    return x.reshape(sides)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.attributes.get("perm") or [*range(x.ndim)][::-1])


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    axes = whole(axes) or node.attributes["axes"]
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", host=(1,))
def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    axes = whole(axes) or node.attributes.get("axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Concat")
def concat(node: Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node.attributes["axis"])


@operator("Split", host=(1,))
def split(node: Node, x: Tensor, sides: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = node.attributes.get("axis", 0)
    sides = whole(sides) or node.attributes.get("split")
    return x.split(sides or -(-x.shape[axis] // len(node.outputs)), axis)


@operator("Slice", host=(1, 2, 3, 4))
def cut(node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    starts, ends, axes, steps = [*map(whole, given), *[None] * (4 - len(given))] if given else [
        node.attributes.get(name) for name in ("starts", "ends", "axes", "steps")]
    axes, steps = axes or [*range(len(starts))], steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise Unsupported("Slice backwards")
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
    return x


@operator("Gather", host=(1,))
def gather(node: Node, x: Tensor, places: Tensor) -> Tensor:
    axis = node.attributes.get("axis", 0) % x.ndim
    count = x.shape[axis]
    if not all(-count <= place < count for place in whole(places)):  # a GPU would not survive it
        raise Unsupported("Gather beyond the end")
    rows = x.index_select(axis, (places.flatten().long() % count).to(x.device))
    return rows.reshape(x.shape[:axis] + places.shape + x.shape[axis + 1:])


@operator("Expand", host=(1,), grows=True)
def expand(node: Node, x: Tensor, sides: Tensor) -> Tensor:
    return x.expand(allowed(together(x.shape, whole(sides))))


@operator("Tile", host=(1,), grows=True)
def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    repeats = whole(repeats)
    allowed([side * count for side, count in zip(x.shape, repeats, strict=True)])
    return x.repeat(repeats)


@operator("ConstantOfShape", host=(0,), grows=True)
def constant_of_shape(node: Node, sides: Tensor) -> Tensor:
    value = node.attributes.get("value", torch.zeros(1)).flatten()[0]
    value = value.float() if value.is_floating_point() else value.long()
    return value.expand(allowed(whole(sides))).clone()


@operator("Range", host=(0, 1, 2), grows=True)
def count_up(node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    start, limit, step = start.item(), limit.item(), step.item()
    allowed([max(math.ceil((limit - start) / step), 0)])
    return torch.arange(start, limit, step) if (limit - start) / step > 0 else torch.tensor([start])[:0]


@operator("CumSum", host=(1,))
def cumulate(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    if node.attributes.get("exclusive", 0) or node.attributes.get("reverse", 0):
        raise Unsupported("CumSum that is exclusive or reverse")
    return x.cumsum(*whole(axis))


@operator("Pad", host=(1, 2, 3), grows=True)
def pad(node: Node, x: Tensor, sides: Tensor | None = None, value: Tensor | None = None, axes=None) -> Tensor:
    if axes is not None:
        raise Unsupported("Pad of some axes")
    sides = node.attributes["pads"] if sides is None else whole(sides)
    value = node.attributes.get("value", 0.0) if value is None else value.item()
    before, after = sides[:x.ndim], sides[x.ndim:]
    allowed([low + side + high for low, side, high in zip(before, x.shape, after, strict=True)])
    kinds = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    kind = kinds[node.attributes.get("mode", "constant")]
    ends = [end for pair in list(zip(before, after))[::-1] for end in pair]
    if kind != "constant":  # torch does so for the last axes only
        ends = ends[:2 * (x.ndim - 2)]
    return F.pad(x, ends, kind, value if kind == "constant" else None)


# -- activations


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.attributes.get("alpha", 0.01))


@operator("PRelu")
def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    each = slope.ndim >= x.ndim - 1 and slope.numel() == slope.shape[1 - x.ndim:][0] == x.shape[1]
    if slope.numel() == 1 or each:  # one for each channel
        return F.prelu(x, slope.flatten())
    allowed(together(x.shape, slope.shape))
    return torch.where(x > 0, x, slope * x)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    return (x * node.attributes.get("alpha", 0.2) + node.attributes.get("beta", 0.5)).clamp(0, 1)


@operator("Clip", host=(1, 2))
def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low = node.attributes.get("min") if low is None else low.item()
    high = node.attributes.get("max") if high is None else high.item()
    return x if low is None and high is None else x.clamp(low, high)


@operator("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    axis = node.attributes.get("axis", -1)
    if axis not in (-1, x.ndim - 1):  # before opset 13 it meant something else
        raise Unsupported("Softmax over another axis than the last")
    return x.softmax(-1)


@operator("Min", "Max")
def extreme(node: Node, *parts: Tensor) -> Tensor:
    allowed(together(*(part.shape for part in parts)))
    return functools.reduce(torch.minimum if node.op == "Min" else torch.maximum, parts)


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", host=(1,))
def reduce(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    axes = node.attributes.get("axes") if axes is None else whole(axes)
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return x
        axes = [*range(x.ndim)]
    keep = bool(node.attributes.get("keepdims", 1))
    functions = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
                 "ReduceL2": torch.linalg.vector_norm}
    return functions[node.op](x, dim=axes, keepdim=keep)


# -- layers


def strides(node: Node, name: str, rank: int) -> list[int]:
    return node.attributes.get(name) or [1] * rank


def padded(node: Node, x: Tensor, kernel: list[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """(x, padding) for torch's layers, which pad both sides alike: else x is padded here, by `value`."""
    rank = len(kernel)
    before = after = [0] * rank
    if pads := node.attributes.get("pads"):
        before, after = pads[:rank], pads[rank:]
    elif (kind := node.attributes.get("auto_pad", "NOTSET")) in SAME:
        steps, spread = strides(node, "strides", rank), strides(node, "dilations", rank)
        needed = [max((-(-side // step) - 1) * step + (k - 1) * d + 1 - side, 0)
                  for side, step, k, d in zip(x.shape[2:], steps, kernel, spread)]
        less, more = [need // 2 for need in needed], [need - need // 2 for need in needed]
        before, after = (less, more) if kind == "SAME_UPPER" else (more, less)
    allowed([*x.shape[:2], *(low + side + high for low, side, high in zip(before, x.shape[2:], after, strict=True))])
    if before == after:
        return x, before
    ends = [end for pair in list(zip(before, after))[::-1] for end in pair]
    return F.pad(x, ends, value=value), [0] * rank


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    x, padding = padded(node, x, [*weight.shape[2:]])
    steps, spread = strides(node, "strides", rank), strides(node, "dilations", rank)
    groups = node.attributes.get("group", 1)
    if rank == 2 and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # `convolution` would choose slower ones for small pictures with channels last
        return torch.mkldnn_convolution(x, weight, bias, padding, steps, spread, groups)
    return torch.convolution(x, weight, bias, steps, padding, spread, False, [0] * rank, groups)


@operator("ConvTranspose", grows=True)
def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    pads = node.attributes.get("pads") or [0] * 2 * rank
    plain = node.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and "output_shape" not in node.attributes
    if pads[:rank] != pads[rank:] or not plain:
        raise Unsupported("ConvTranspose with unequal padding")
    steps, spread = strides(node, "strides", rank), strides(node, "dilations", rank)
    more = node.attributes.get("output_padding") or [0] * rank
    allowed([len(x), weight.shape[1], *(side * step for side, step in zip(x.shape[2:], steps))])
    return torch.convolution(x, weight, bias, steps, pads[:rank], spread, True, more, node.attributes.get("group", 1))


@operator("BatchNormalization")
def batch_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, eps=node.attributes.get("epsilon", 1e-5))


@operator("MatMul")
def matrix_product(node: Node, a: Tensor, b: Tensor) -> Tensor:
    if min(a.ndim, b.ndim) > 1:
        allowed([*together(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]])
    return a @ b


@operator("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if node.attributes.get("transA", 0) else a
    b = b if node.attributes.get("transB", 0) else b.T
    allowed([len(a), len(b)])
    product = F.linear(a, b) * node.attributes.get("alpha", 1.0)
    return product if c is None else product + c * node.attributes.get("beta", 1.0)


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.attributes["kernel_shape"]
    x, padding = padded(node, x, kernel, -math.inf)
    return F.max_pool2d(x, kernel, strides(node, "strides", 2), padding, strides(node, "dilations", 2),
                        ceil_mode=bool(node.attributes.get("ceil_mode", 0)))


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    kernel, counted = node.attributes["kernel_shape"], bool(node.attributes.get("count_include_pad", 0))
    if strides(node, "dilations", 2) != [1, 1]:
        raise Unsupported("AveragePool with dilations")
    size = x.shape
    x, padding = padded(node, x, kernel)
    if x.shape != size and not counted:
        raise Unsupported("AveragePool with unequal padding")
    return F.avg_pool2d(x, kernel, strides(node, "strides", 2), padding, bool(node.attributes.get("ceil_mode", 0)),
                        counted)


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("Resize", "Upsample", host=(1, 2, 3), grows=True)
def resize(node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    """inputs after x: scales (Upsample, and Resize of opset 10); or region, scales, sizes."""
    early = len(given) < 2
    _, scales, sizes, *_ = [*[None] * early, *given, None, None]
    if sizes is not None:
        size = whole(sizes)
    else:
        scales = scales.tolist() if scales is not None else node.attributes["scales"]
        size = [math.floor(side * scale) for side, scale in zip(x.shape, scales, strict=True)]
    place = node.attributes.get("coordinate_transformation_mode", "asymmetric" if early else "half_pixel")
    mode = node.attributes.get("mode", "nearest")
    halves = place in ("half_pixel", "pytorch_half_pixel")
    if x.ndim != 4 or tuple(size[:2]) != x.shape[:2] or node.attributes.get("antialias", 0):
        raise Unsupported("Resize of anything but pictures")
    allowed(size)
    if mode == "nearest":
        rounding = node.attributes.get("nearest_mode", "floor" if early else "round_prefer_floor")
        multiple = all(new % old == 0 for new, old in zip(size[2:], x.shape[2:]))
        doubled = all(new in (old, 2 * old) for new, old in zip(size[2:], x.shape[2:]))
        if (place, rounding) == ("asymmetric", "floor") or halves and multiple and rounding.startswith("round") or (
                place == "asymmetric" and doubled and rounding == "round_prefer_floor"):
            return F.interpolate(x, size[2:], mode="nearest")
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode)
    if kind and (halves or place == "align_corners") and node.attributes.get("cubic_coeff_a", -0.75) == -0.75:
        return F.interpolate(x, size[2:], mode=kind, align_corners=not halves)
    raise Unsupported(f"Resize by {mode} and {place}")


@operator("GridSample")
def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = node.attributes.get("mode", "bilinear")
    return F.grid_sample(x, grid, "bilinear" if mode == "linear" else mode,
                         node.attributes.get("padding_mode", "zeros"), bool(node.attributes.get("align_corners", 0)))
