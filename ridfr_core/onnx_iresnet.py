"""Reading insightface's ONNX recognisers into the tensors of `recognition.IResNet`."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import RidfrError


class FaceModelError(RidfrError):
    """A face model's file or folder cannot be used; the message says which, why and what to do."""


class Node(NamedTuple):
    op: str
    inputs: list[str]
    output: str
    attributes: dict


class Graph:
    """An ONNX graph as a walk needs it: who reads a tensor, and the constants by name."""

    def __init__(self, path: Path):
        import onnx

        self.name = path.name
        try:
            graph = onnx.load(str(path)).graph
        except Exception as error:  # protobuf and onnx raise several kinds for a damaged file
            raise FaceModelError(f"{path.name} cannot be read as ONNX ({error}); download it again.") from error
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.readers: dict[str, list[Node]] = {}
        for proto in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
            node = Node(proto.op_type, list(proto.input), proto.output[0], attributes)
            if node.op == "Constant" and "value" in attributes:
                self.constants[node.output] = onnx.numpy_helper.to_array(attributes["value"])
            elif node.op in ("Identity", "Unsqueeze") and node.inputs[0] in self.constants:
                # exporters share equal initialisers by the former; the latter only shapes PReLU's slopes
                self.constants[node.output] = self.constants[node.inputs[0]]
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.input = next(value.name for value in graph.input if value.name not in self.constants)
        self.output = graph.output[0].name

    def constant(self, name: str) -> Tensor:
        if name not in self.constants:
            raise self.error(f"{name} is computed, not stored")
        return torch.from_numpy(self.constants[name].copy()).float()

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


def _affine(graph: Graph, node: Node) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNormalization node at inference."""
    weight, bias, mean, variance = (graph.constant(name).double() for name in node.inputs[1:5])
    scale = weight / torch.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    return scale.float(), (bias - mean * scale).float()


def _conv(graph: Graph, node: Node) -> tuple[Tensor, Tensor, str]:
    """(weight, bias, output name) of a Conv node, with the batch norm behind it folded in if there is one."""
    weight = graph.constant(node.inputs[1])
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(len(weight))
    if not graph.reads(node.output, "BatchNormalization"):
        return weight, bias, node.output
    norm = graph.reader(node.output, "BatchNormalization")
    scale, shift = _affine(graph, norm)
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift, norm.output


def read_iresnet(path: Path) -> tuple[dict[str, Tensor], tuple[int, ...], tuple[int, ...]]:
    """(state dict of IResNet, layers, widths), found by following the data from the graph's input to its output.

    Batch norms that the exporter left behind a convolution are folded into it.
    Raises FaceModelError if the file cannot be parsed or its graph is another network.
    """
    graph = Graph(path)
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


def _read_head(graph: Graph, state: dict[str, Tensor], x: str):
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
