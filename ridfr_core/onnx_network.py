"""An ONNX graph as a network in torch, or where that can't be, in onnxruntime."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .errors import first_line
from .onnx_file import FaceModelError, Graph, Node
from .onnx_operators import OPERATORS, Operator, Unsupported

Result = TypeVar("Result")

HOST = "@host"  # after a constant's name: its copy on the CPU
MOST = 2**31  # numbers that all operators together may write for one picture; R100, the largest, needs a tenth
# glibc gives every block that is larger than the largest one freed so far back to the system, and new pages cost time.
# So one of 32 MB, the most it goes by, is freed first: in a fresh process a small detector then takes half the time.
KEPT = 2**23 - 2**12
SIZES = 8  # of inputs, for which what their shapes tell is kept
FRESH = ("Conv", "ConvTranspose", "Add", "BatchNormalization")  # their outputs are tensors of their own, no views
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError, OverflowError)


class Step(NamedTuple):
    """One operator. inputs: their names, "" for one left out; move: those that come from the CPU to the picture's
    device; on_host: it works out shapes, on the CPU; drop: what nobody needs after it; overwrite: its input may become
    its output, but for a gradient."""

    node: Node
    operator: Operator
    inputs: list[str]
    move: frozenset[int]
    on_host: bool
    drop: tuple[str, ...]
    overwrite: bool


class OnnxNetwork(nn.Module):
    """An ONNX graph with one input. Calling it maps the input to the tuple of the outputs.

    Its weights are fp32 whatever the file's are. What is worked out from shapes alone stays on the CPU, so that nothing
    is read back from a GPU. There are gradients where the operators have them.
    Raises FaceModelError where the graph is broken or asks for what `onnx_operators` does not have.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        if len(graph.inputs) != 1 or not graph.outputs:
            raise FaceModelError(f"{graph.name} is not a face network (it has {len(graph.inputs)} inputs).")
        self.name, (self.input,), self.outputs = graph.name, graph.inputs, list(graph.outputs)
        constants = {name: unified(tensor) for name, tensor in graph.tensors.items()}
        self.steps = self._plan(graph, constants)
        used = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        self.host = {name + HOST: tensor for name, tensor in constants.items() if name + HOST in used}
        self.places = [name for name in constants if name in used]
        self.weights = nn.ParameterList(nn.Parameter(constants[name], False) for name in self.places)
        on_host = {name for step in self.steps if step.on_host for name in step.node.outputs}
        read = {name for step in self.steps if not step.on_host for name in step.inputs}
        self.lasting = on_host & (read | set(self.outputs))
        self.from_shapes: dict[torch.Size, dict[str, Tensor]] = {}  # of each size of input, what its shape tells

        torch.empty(KEPT)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.device.type == "cpu" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # twice as fast there
        return self._run(x, [*self.weights])

    @torch.no_grad()
    def try_out(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """The outputs for an input of that size, all zeros.

        Raises FaceModelError where the graph does not fit such an input, or would fill the memory.
        """
        try:
            return self._run(torch.zeros(*size), [*self.weights], limit=MOST)
        except FaceModelError:
            raise
        except FAILURES as error:
            raise FaceModelError(
                f"{self.name} cannot be run on {' x '.join(map(str, size))} numbers ({first_line(error)}): use the "
                "files of an insightface pack such as buffalo_l."
            ) from error

    def _run(self, x: Tensor, weights: list[Tensor], limit: float = math.inf) -> tuple[Tensor, ...]:
        known = self.from_shapes.get(x.shape)
        values = {**self.host, **(known or {}), **dict(zip(self.places, weights)), self.input: x}
        for step in self.steps:
            if step.on_host and known is not None:
                continue
            inputs = [values[name] if name else None for name in step.inputs]
            for place in step.move:
                inputs[place] = inputs[place].to(x.device)
            found = self._step(step, inputs)
            values.update(zip(step.node.outputs, found))
            for name in step.drop:
                values.pop(name, None)
            limit -= sum(out.numel() for out in found)
            if limit < 0:
                raise ValueError("it asks for too much memory")
        if known is None:
            self._remember(x.shape, values)
        return tuple(values[name].to(x.device) for name in self.outputs)

    def _remember(self, size: torch.Size, values: dict[str, Tensor]) -> None:
        """Keep what was worked out from an input's shape, for the next of the same."""
        if len(self.from_shapes) >= SIZES:
            self.from_shapes.clear()
        self.from_shapes[size] = {name: values[name] for name in self.lasting}

    def _step(self, step: Step, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        if step.overwrite and not torch.is_grad_enabled():
            return (torch.relu_(inputs[0]),)
        try:
            if step.on_host:  # not as inference tensors: a later run may need a gradient
                with torch.inference_mode(False), torch.no_grad():
                    found = step.operator.run(step.node, *inputs)
            else:
                found = step.operator.run(step.node, *inputs)
        except Unsupported as reason:
            raise unknown(self.name, str(reason)) from None
        return found if isinstance(found, tuple) else (found,)

    def _plan(self, graph: Graph, constants: dict[str, Tensor]) -> list[Step]:
        """The operators that depend on the input; what depends on constants alone is added to those."""
        host: set[str] = set()
        known = {self.input, *constants}
        found: list[tuple[Node, Operator, list[str], frozenset[int], bool]] = []
        for node in graph.nodes:
            operator = OPERATORS.get(node.op)
            if operator is None:
                raise unknown(graph.name, f"the operator {node.op}")
            if missing := [name for name in node.inputs if name and name not in known]:
                raise FaceModelError(
                    f"{graph.name} is not a whole network: its operator {node.op} reads {missing[0]}, which nothing "
                    "before it gives. Download it again."
                )
            known.update(node.outputs)
            moving = [name for name in node.inputs if name and name not in constants]
            if not moving and not operator.grows:
                constants.update(self._folded(node, operator, constants))
                continue
            on_host = node.op in ("Shape", "Size") or all(name in host for name in moving)
            if on_host:
                host.update(node.outputs)
            inputs, move = [], set()
            for place, name in enumerate(node.inputs):
                needed = on_host and node.op not in ("Shape", "Size") or place in operator.host
                if name in constants:
                    inputs.append(name + HOST if needed else name)
                    continue
                inputs.append(name)
                if name and needed and name not in host:
                    raise unknown(graph.name, f"{node.op} whose shape depends on the picture")
                if name in host and not needed:
                    move.add(place)
            found.append((node, operator, inputs, frozenset(() if on_host else move), on_host))
        if missing := [name for name in self.outputs if name not in known]:
            raise FaceModelError(f"{graph.name} is not a whole network: nothing gives its output {missing[0]}. "
                                 "Download it again.")
        lasting = {name for _, _, inputs, _, on_host in found if not on_host for name in inputs if name in host}
        return with_ends(found, {self.input, *self.outputs, *lasting})

    def _folded(self, node: Node, operator: Operator, constants: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = [constants[name] if name else None for name in node.inputs]
        try:
            found = operator.run(node, *inputs)
        except Unsupported as reason:
            raise unknown(self.name, str(reason)) from None
        except FAILURES as error:
            raise FaceModelError(f"{self.name} is not a whole network: its operator {node.op} cannot be worked out "
                                 f"({first_line(error)}). Download it again.") from error
        found = found if isinstance(found, tuple) else (found,)
        return {name: unified(tensor) for name, tensor in zip(node.outputs, found)}


def with_ends(steps: list, kept: set[str]) -> list[Step]:
    """Steps that know which values nobody needs after them."""
    last = {name: index for index, (_, _, inputs, *_) in enumerate(steps) for name in inputs}
    readers = Counter(name for _, _, inputs, *_ in steps for name in inputs)
    fresh = {node.output for node, *_ in steps if node.op in FRESH} - kept
    drop: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        if name and name not in kept and not name.endswith(HOST):
            drop[index].append(name)
    return [
        Step(node, operator, inputs, move, on_host, tuple(names),
             node.op == "Relu" and inputs[0] in fresh and readers[inputs[0]] == 1)
        for (node, operator, inputs, move, on_host), names in zip(steps, drop)
    ]


def unified(tensor: Tensor) -> Tensor:
    """Fractions as fp32, whole numbers as int64."""
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def unknown(name: str, what: str) -> FaceModelError:
    return FaceModelError(
        f"{name} has {what}, which this pack does not run by itself: install onnxruntime (`pip install onnxruntime` in "
        "ComfyUI's Python), or use an insightface pack such as buffalo_l."
    )


class RuntimeNetwork(nn.Module):
    """A graph that onnxruntime runs, on the processor and without gradients: called like OnnxNetwork."""

    def __init__(self, path: Path):
        """Raises ImportError without onnxruntime, its own errors for a file that it does not run either."""
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (self.input,) = (value.name for value in self.session.get_inputs())

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.session.run(None, {self.input: x.float().cpu().numpy()})
        return tuple(torch.from_numpy(value).to(x.device) for value in found)

    def try_out(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """The outputs for an input of that size, all zeros. Raises onnxruntime's errors."""
        return self.forward(torch.zeros(*size))


def torch_or_onnxruntime(ours: Callable[[], Result], theirs: Callable[[], Result]) -> Result:
    """What `ours` makes of a file, or `theirs` where torch is not taught here what the file has.

    Raises the FaceModelError of `ours` where both fail.
    """
    try:
        return ours()
    except FaceModelError as error:
        try:
            return theirs()
        except Exception:  # onnxruntime is not installed, or raises one of its many errors for a broken file
            raise error from None


def load_network(path: Path, graph: Graph, size: Sequence[int]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """OnnxNetwork of a file, or RuntimeNetwork, and its outputs for zeros of a usual `size`.

    Raises FaceModelError where neither runs it.
    """

    def tried(network: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
        return network, network.try_out(size)

    return torch_or_onnxruntime(lambda: tried(OnnxNetwork(graph)), lambda: tried(RuntimeNetwork(path)))


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights lie; onnxruntime's has none and takes its input from anywhere."""
    return next((weight.device for weight in network.parameters()), torch.device("cpu"))
