"""Reading insightface's ONNX recognisers into the tensors of `recognition.IResNet`."""

import torch
from torch import Tensor

from . import onnx_file
from .onnx_file import FaceModelError, Node


class Walk:
    """An ONNX graph as a walk needs it: who reads a tensor, and the constants by name."""

    def __init__(self, graph: onnx_file.Graph):
        self.name, self.constants = graph.name, dict(graph.tensors)
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "Constant" and isinstance(node.attributes.get("value"), Tensor):
                self.constants[node.output] = node.attributes["value"]
            elif node.op in ("Identity", "Unsqueeze", "Cast") and self.constants.keys() & node.inputs[:1]:
                # exporters share equal initialisers by the first; the second only shapes PReLU's slopes
                self.constants[node.output] = self.constants[node.inputs[0]]
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise self.error(f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs")
        (self.input,), (self.output,) = graph.inputs, graph.outputs

    def constant(self, name: str) -> Tensor:
        if name not in self.constants:
            raise self.error(f"{name} is computed, not stored")
        return self.constants[name].float()

    def reader(self, tensor: str, *ops: str) -> Node:
        """The node of one of these kinds that reads a tensor; the shape arithmetic of a Reshape is passed over."""
        found = [node for node in self.readers.get(tensor, []) if node.op in ops]
        if not found:
            kinds = ", ".join(node.op for node in self.readers.get(tensor, [])) or "nothing"
            raise self.error(f"{kinds} stands where {' or '.join(ops)} should")
        return found[0]

    def reads(self, tensor: str, op: str) -> bool:
        return any(node.op == op for node in self.readers.get(tensor, []))

    def error(self, reason: str) -> FaceModelError:
        return FaceModelError(f"{self.name} is not an ArcFace IResNet ({reason}); use a recogniser such as "
                              "buffalo_l's w600k_r50.onnx or antelopev2's glintr100.onnx.")


def _affine(graph: Walk, node: Node) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNormalization node at inference."""
    weight, bias, mean, variance = (graph.constant(name).double() for name in node.inputs[1:5])
    scale = weight / torch.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    return scale.float(), (bias - mean * scale).float()


def _conv(graph: Walk, node: Node) -> tuple[Tensor, Tensor, str]:
    """(weight, bias, output name) of a Conv node, with the batch norm behind it folded in if there is one."""
    weight = graph.constant(node.inputs[1])
    pads = [side // 2 for side in weight.shape[2:]] * 2
    usual = {"pads": pads, "dilations": [1, 1], "group": 1, "auto_pad": "NOTSET"}
    if odd := [name for name, value in usual.items() if node.attributes.get(name, value) != value]:
        raise graph.error(f"a convolution with other {odd[0]}")
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(len(weight))
    if not graph.reads(node.output, "BatchNormalization"):
        return weight, bias, node.output
    norm = graph.reader(node.output, "BatchNormalization")
    scale, shift = _affine(graph, norm)
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift, norm.output


def read_iresnet(file: onnx_file.Graph) -> tuple[dict[str, Tensor], tuple[int, ...], tuple[int, ...]]:
    """(state dict of IResNet, layers, widths), found by following the data from the graph's input to its output.

    Batch norms that the exporter left behind a convolution are folded into it.
    Raises FaceModelError if the graph is of another network.
    """
    graph = Walk(file)
    try:
        return _follow(graph)
    except (IndexError, RuntimeError, StopIteration, TypeError) as error:  # fewer inputs, other shapes
        raise graph.error(f"{type(error).__name__} on the way") from error


def _follow(graph: Walk) -> tuple[dict[str, Tensor], tuple[int, ...], tuple[int, ...]]:
    state: dict[str, Tensor] = {}

    def conv(key: str, node: Node) -> str:
        state[f"{key}.weight"], state[f"{key}.bias"], output = _conv(graph, node)
        return output

    def activate(key: str, tensor: str) -> str:
        node = graph.reader(tensor, "PRelu")
        state[f"{key}.weight"] = graph.constant(node.inputs[1]).flatten()
        return node.output

    def affine(key: str, tensor: str) -> str:
        node = graph.reader(tensor, "BatchNormalization")
        state[f"{key}.scale"], state[f"{key}.shift"] = _affine(graph, node)
        return node.output

    x = activate("stem_act", conv("stem", graph.reader(graph.input, "Conv")))
    layers: list[int] = []
    widths: list[int] = []
    while graph.reads(x, "Add") or graph.reads(x, "Conv"):
        key = f"blocks.{sum(layers)}"
        if sum(layers) > len(graph.readers):
            raise graph.error("its blocks run in a circle")
        first = graph.reads(x, "Conv")
        if first:
            conv(f"{key}.skip", graph.reader(x, "Conv"))
        inner = conv(f"{key}.conv1", graph.reader(affine(f"{key}.norm", x), "Conv"))
        second = graph.reader(activate(f"{key}.act", inner), "Conv")
        if second.attributes.get("strides", [1, 1])[0] != (2 if first else 1):
            raise graph.error("only the first block of a stage may stride")
        x = graph.reader(conv(f"{key}.conv2", second), "Add").output
        if first:
            layers.append(0)
            widths.append(len(state[f"{key}.conv2.weight"]))
        if not layers:
            raise graph.error("its first block has no strided skip")
        layers[-1] += 1
    _read_head(graph, state, affine("norm", x))
    return state, tuple(layers), tuple(widths)


def _read_head(graph: Walk, state: dict[str, Tensor], x: str):
    """Flatten, a linear layer (Gemm, or MatMul and Add), batch norm."""
    linear = graph.reader(graph.reader(x, "Flatten", "Reshape").output, "Gemm", "MatMul")
    weight = graph.constant(linear.inputs[1])
    if linear.op == "MatMul":
        add = graph.reader(linear.output, "Add")
        bias = graph.constant(next(name for name in add.inputs if name != linear.output))
        weight, x = weight.T, add.output
    else:
        bias, x = graph.constant(linear.inputs[2]), linear.output
        weight = weight if linear.attributes.get("transB", 0) else weight.T
    norm = graph.reader(x, "BatchNormalization")
    state["linear.weight"], state["linear.bias"] = weight.contiguous(), bias
    state["features.scale"], state["features.shift"] = _affine(graph, norm)
    if norm.output != graph.output:
        raise graph.error("something follows its last batch norm")
