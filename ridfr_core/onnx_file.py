"""Reading ONNX files: a graph of operators, and the tensors that are stored in it.

A reader of our own, since the package `onnx` brings protobuf and ml_dtypes into the environment, and another protobuf
than the installed one breaks other packs (mediapipe's among them). An ONNX file is a protobuf message: fields, each a
number, a kind of four, and a value; `onnx.proto3` in the ONNX repository has the numbers. Nothing in a file is trusted
for a size: every length is held against the bytes that are there before anything is made of it.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import RidfrError

VARINT, FIXED64, BLOCK, FIXED32 = 0, 1, 2, 5  # kinds of fields
EXTERNAL = 1  # TensorProto.data_location
FIELDS = 2_000_000  # more than any face network's file has, apart from its blocks of numbers
LARGEST_SIDE = 2**31  # of a tensor
TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
FLOATS = {4: torch.float32, 10: torch.float64}  # fields of a tensor without raw data: numbers of 4 or 8 bytes
INTEGERS = (5, 7)  # and those of varints, which stand for the bits of the halves
HALVES = (torch.float16, torch.bfloat16)
EMPTY = {1: 0.0, 2: 0, 3: "", 6: [], 7: [], 8: []}  # attributes by their kind, where the file leaves out a zero


class FaceModelError(RidfrError):
    """A face model's file or folder cannot be used; the message says which, why and what to do."""


class Damaged(Exception):
    """What is wrong with an ONNX file, in a few words."""


class Node(NamedTuple):
    """attributes: numbers, strings, lists of them, and tensors; what else there is (a graph, as of If) is None."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict
    name: str = ""

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass
class Graph:
    """An ONNX graph. inputs and outputs: name -> shape, None where a side may be of any size; opset: its version."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, list[int | None]] = field(default_factory=dict)
    outputs: dict[str, list[int | None]] = field(default_factory=dict)
    opset: int = 0


def read_graph(path: str | Path, weights: bool = True) -> Graph:
    """The graph of an ONNX file. weights: False leaves the stored tensors out, their names are kept; that is quick.

    Raises FaceModelError for a file that is not there, not ONNX, cut short, or that keeps its weights in other files.
    """
    path = Path(path)
    if not path.is_file():
        raise FaceModelError(f"'{path}' is not a file: check the path, or put the file there.")
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise Damaged("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                return _Reader(view, weights).graph(path.name)
    except Damaged as reason:
        raise FaceModelError(f"{path.name} cannot be read as ONNX ({reason}): download it again.") from None


class _Reader:
    """One file's bytes; messages and blocks are given by where they begin and end."""

    def __init__(self, view: memoryview, weights: bool):
        self.view, self.weights, self.left = view, weights, FIELDS

    def graph(self, name: str) -> Graph:
        whole, found = (0, len(self.view)), None
        graph = Graph(name)
        for number, value in self.fields(whole):
            if number == 7:
                found = self.block(value)
            elif number == 8:
                domain, version = self.first(value, 1, b""), self.first(value, 2, 0)
                if domain in (b"", b"ai.onnx"):
                    graph.opset = version
        if found is None or not graph.opset:
            raise Damaged("it holds no graph of operators")
        for number, value in self.fields(found):
            if number == 1:
                graph.nodes.append(self.node(value))
            elif number == 5:
                key, tensor = self.tensor(value)
                graph.tensors[key] = tensor
            elif number == 15:
                raise Damaged("it has sparse tensors, which are not supported")
            elif number in (11, 12):
                key, shape = self.value_info(value)
                (graph.inputs if number == 11 else graph.outputs)[key] = shape
        for key in graph.tensors:  # old files name the stored tensors among the inputs
            graph.inputs.pop(key, None)
        return graph

    def fields(self, span: tuple[int, int]) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """(number, value) of a message's fields; the value is a whole number, or where the field's bytes are."""
        at, end = span
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise Damaged("it has too many fields")
            key, at = self.varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == VARINT:
                value, at = self.varint(at, end)
                yield number, value
                continue
            if kind == BLOCK:
                length, at = self.varint(at, end)
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                raise Damaged("its bytes are of another kind")
            if not 0 <= length <= end - at:
                raise Damaged("it is cut short")
            yield number, (at, at + length)
            at += length

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A number of 64 bits with a sign, seven bits a byte, and where the next begins."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise Damaged("it is cut short")
            byte = self.view[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                value &= 2**64 - 1
                return value - 2**64 if value >= 2**63 else value, at
        raise Damaged("its bytes are of another kind")

    def block(self, value) -> tuple[int, int]:
        if not isinstance(value, tuple):
            raise Damaged("its bytes are of another kind")
        return value

    def whole(self, value) -> int:
        if not isinstance(value, int):
            raise Damaged("its bytes are of another kind")
        return value

    def bytes(self, value) -> bytes:
        start, end = self.block(value)
        return bytes(self.view[start:end])

    def text(self, value) -> str:
        return self.bytes(value).decode("utf-8", "replace")

    def first(self, message, wanted: int, otherwise):
        """One field of a small message."""
        for number, value in self.fields(self.block(message)):
            if number == wanted:
                return value if isinstance(value, int) else self.bytes(value)
        return otherwise

    def integers(self, value) -> list[int]:
        """A repeated field's numbers: one, or a block of them."""
        if isinstance(value, int):
            return [value]
        found, (at, end) = [], value
        while at < end:
            number, at = self.varint(at, end)
            found.append(number)
        self.left -= len(found)
        return found

    def raw(self, value, dtype: torch.dtype) -> Tensor:
        start, end = self.block(value)
        if (end - start) % dtype.itemsize:
            raise Damaged("it is cut short")
        if start == end:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.view[start:end]), dtype=dtype)

    def node(self, span) -> Node:
        inputs, outputs, attributes, op, name, domain = [], [], {}, "", "", ""
        for number, value in self.fields(self.block(span)):
            if number == 1:
                inputs.append(self.text(value))
            elif number == 2:
                outputs.append(self.text(value))
            elif number == 3:
                name = self.text(value)
            elif number == 4:
                op = self.text(value)
            elif number == 5:
                key, found = self.attribute(value)
                attributes[key] = found
            elif number == 7:
                domain = self.text(value)
        if not outputs:
            raise Damaged(f"its operator {op or name or '?'} has no output")
        return Node(op if domain in ("", "ai.onnx") else f"{domain}.{op}", inputs, outputs, attributes, name)

    def attribute(self, span) -> tuple[str, object]:
        key, found, many, kind = "", None, [], 0
        for number, value in self.fields(self.block(span)):
            if number == 1:
                key = self.text(value)
            elif number == 2:
                found = self.raw(value, torch.float32)[:1].sum().item()
            elif number == 3:
                found = self.whole(value)
            elif number == 4:
                found = self.text(value)
            elif number == 5:
                _, found = self.tensor(value, always=True)
            elif number == 7:
                many += self.raw(value, torch.float32).tolist()
            elif number == 8:
                many += self.integers(value)
            elif number == 9:
                many.append(self.text(value))
            elif number == 20:
                kind = self.whole(value)
        return key, many or (EMPTY.get(kind) if found is None else found)

    def value_info(self, span) -> tuple[str, list[int | None]]:
        key, shape = "", []
        for number, value in self.fields(self.block(span)):
            if number == 1:
                key = self.text(value)
            elif number == 2:  # type
                for kind, tensor in self.fields(self.block(value)):
                    for part, sides in self.fields(self.block(tensor)) if kind == 1 else ():
                        for _, side in self.fields(self.block(sides)) if part == 2 else ():
                            size = self.first(side, 1, 0)
                            shape.append(size if isinstance(size, int) and size > 0 else None)
        return key, shape

    def tensor(self, span, always: bool = False) -> tuple[str, Tensor]:
        """(name, tensor); always: also where the weights are left out."""
        key, shape, kind, raw, floats, integers = "", [], 0, None, [], []
        for number, value in self.fields(self.block(span)):
            if number == 1:
                shape += self.integers(value)
            elif number == 2:
                kind = self.whole(value)
            elif number == 8:
                key = self.text(value)
            elif number == 13 or number == 14 and value == EXTERNAL:
                raise Damaged("its weights are in other files, which is not supported")
            elif not (self.weights or always):
                continue
            elif number == 9:
                raw = self.block(value)
            elif number in FLOATS:
                floats.append(self.raw(value, FLOATS[number]))
            elif number in INTEGERS:
                integers += self.integers(value)
        if not all(0 <= side < LARGEST_SIDE for side in shape):
            raise Damaged(f"its tensor {key} has a shape that cannot be")
        if not self.weights and not always:
            return key, torch.empty(0)
        if kind not in TYPES:
            raise Damaged(f"its tensor {key} is of a type that is not supported")
        dtype = TYPES[kind]
        if raw:
            values = self.raw(raw, dtype)
        else:
            values = torch.cat(floats).to(dtype) if floats else integers_as(integers, dtype)
        if len(values) != math.prod(shape):
            raise Damaged(f"its tensor {key} has {len(values)} numbers in place of {math.prod(shape)}")
        if len(values) > 1 and values.is_floating_point() and not torch.isfinite(values).all():
            raise Damaged(f"its tensor {key} has numbers that are NaN or infinite")  # one alone may bound a Clip
        try:
            return key, values.reshape(shape)
        except RuntimeError:  # too many axes
            raise Damaged(f"its tensor {key} has a shape that cannot be") from None


def integers_as(values: list[int], dtype: torch.dtype) -> Tensor:
    try:
        if dtype in HALVES:
            return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(dtype)
        return torch.tensor(values, dtype=torch.int64).to(dtype)
    except (RuntimeError, OverflowError):
        raise Damaged("one of its tensors holds numbers that do not fit its type") from None
