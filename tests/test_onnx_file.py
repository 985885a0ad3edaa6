"""The reader of ONNX files against the package `onnx`, and files that want too much."""

import time
import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ridfr_core.face_model import load_face_model, role_of
from ridfr_core.nano import WEIGHTS
from ridfr_core.onnx_file import FaceModelError, read_graph
from tests.onnx_graphs import save
from tests.real_faces import REAL

NODE = helper.make_node("Add", ["x", "w"], ["y"])
SHIPPED = sorted((WEIGHTS / "insightface" / "models").glob("*/*.onnx"))
FILES = [pytest.param(path, id=path.stem) for path in (*SHIPPED, *sorted(REAL.glob("*.onnx")))]


def as_torch(proto) -> torch.Tensor:
    if proto.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(numpy_helper.to_array(proto).astype(np.float32)).bfloat16()
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def assert_read(path):
    """Nodes, attributes, tensors, inputs and outputs as the package `onnx` reads them."""
    ours, theirs = read_graph(path), onnx.load(str(path)).graph
    assert [(n.op, n.inputs, n.outputs) for n in ours.nodes] == [
        (n.op_type, list(n.input), list(n.output)) for n in theirs.node]
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.initializer}
    for tensor in theirs.initializer:
        found, wanted = ours.tensors[tensor.name], as_torch(tensor)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), tensor.name
    for mine, other in zip(ours.nodes, theirs.node):
        for attribute in other.attribute:
            value, found = helper.get_attribute_value(attribute), mine.attributes[attribute.name]
            if attribute.type == onnx.AttributeProto.TENSOR:
                assert torch.equal(found, as_torch(value))
            else:
                assert found == (value.decode() if isinstance(value, bytes) else value)
    sides = {v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in theirs.input}
    assert ours.inputs == {name: shape for name, shape in sides.items() if name not in ours.tensors}
    assert list(ours.outputs) == [value.name for value in theirs.output]


@pytest.mark.parametrize("path", FILES)
def test_published_and_shipped_files(path):
    assert_read(path)
    names = read_graph(path, weights=False)
    assert names.tensors.keys() == read_graph(path).tensors.keys() and not any(map(len, names.tensors.values()))


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "packed"])
@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL"])
def test_every_type_in_both_forms(tmp_path, kind, raw):
    values = [0.0, 1.0, 1.0, 0.0] if kind == "BOOL" else [1.0, 0.0, 3.0, 2.0 if kind == "UINT8" else -2.0]
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    data = np.array(values).astype(dtype).tobytes() if raw else np.array(values).astype(dtype)
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [2, 2], data, raw=raw)
    assert_read(save(tmp_path / "x.onnx", [NODE], [tensor]))


def test_attributes_of_every_kind(tmp_path):
    node = helper.make_node("Odd", ["x", ""], ["y", "z"], name="one", domain="elsewhere", i=-5, f=0.25, s="word",
                            ints=[1, -2, 2**40], floats=[0.5, -1.5], strings=["a", "b"],
                            t=numpy_helper.from_array(np.arange(3)), zero=0, none=0.0)
    graph = read_graph(save(tmp_path / "x.onnx", [node]))
    (found,) = graph.nodes
    assert found.op == "elsewhere.Odd" and found.inputs == ["x", ""] and found.outputs == ["y", "z"]
    assert found.attributes.pop("t").tolist() == [0, 1, 2] and graph.opset == 13
    assert found.attributes == {"i": -5, "f": 0.25, "s": "word", "ints": [1, -2, 2**40], "floats": [0.5, -1.5],
                                "strings": ["a", "b"], "zero": 0, "none": 0.0}


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"


def sparse(model):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    places = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def shape(*sides):
    def tweak(model):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sides)
    return tweak


def kind(number):
    return lambda model: setattr(model.graph.initializer[0], "data_type", number)


BROKEN = {
    "external": external,
    "sparse": sparse,
    "larger than the file": shape(10**6, 10**6),
    "negative": shape(-1, 4),
    "huge and empty": shape(2**30, 2**30, 2**30, 0),
    "beyond 32 bits": shape(2**40, 0),
    "of many axes": shape(*[1] * 100),
    "of text": kind(TensorProto.STRING),
    "of no type": kind(0),
    "complex": kind(TensorProto.COMPLEX64),
    "no opset": lambda model: model.ClearField("opset_import"),
    "no graph": lambda model: model.ClearField("graph"),
    "no output of a node": lambda model: model.graph.node[0].ClearField("output"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be(tmp_path, what):
    path = save(tmp_path / "odd.onnx", [NODE], {"w": np.ones((2, 2), np.float32)}, tweak=BROKEN[what])
    refused(path)


def refused(path, says="."):
    with pytest.raises(FaceModelError, match=says) as failure:
        read_graph(path)
    message = str(failure.value)
    assert path.name in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers(tmp_path, value):
    weights = np.ones((2, 3), np.float32)
    weights[1, 1] = value
    refused(save(tmp_path / "nan.onnx", [NODE], {"w": weights}), "tensor w has numbers that are NaN or infinite")


@pytest.mark.parametrize("content", [b"", b"\x00", b"<html>404</html>", b"\xff" * 50, bytes(1000), b"\x80" * 30,
                                     b"version https://git-lfs.github.com/spec/v1\n", b":\xff\xff\xff\xff\x7f"])
def test_what_is_no_onnx(tmp_path, content):
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    refused(path)
    with pytest.raises(FaceModelError, match="junk.onnx"):
        role_of(path)


def test_no_file(tmp_path):
    refused(tmp_path / "gone.onnx", "is not a file")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "is not a file")


def test_cut_anywhere(tmp_path):
    """Refused, or whole: the last byte of a file that is cut between two fields may be missed by nobody."""
    data = SHIPPED[0].read_bytes()
    path, noise = tmp_path / "cut.onnx", np.random.default_rng(0)
    for end in [1, 2, 3, *noise.integers(4, len(data) - 20, 60)]:
        path.write_bytes(data[:end])
        refused(path)


def test_flipped_bytes_end_in_a_sentence(tmp_path):
    """Whatever a byte is changed to: the face model loads, or one sentence says that it can't."""
    for name in ("det_nano.onnx", "rec_nano.onnx"):
        (tmp_path / name).write_bytes((WEIGHTS / "insightface" / "models" / "nano" / name).read_bytes())
    path, noise = tmp_path / "det_nano.onnx", np.random.default_rng(1)
    data = path.read_bytes()
    tail = len(data) - 40_000  # most of the rest are weights
    for _ in range(40):
        broken = bytearray(data)
        for place in noise.integers(tail, len(data), 3):
            broken[place] = noise.integers(256)
        path.write_bytes(broken)
        try:
            load_face_model(tmp_path)
        except FaceModelError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("field", [b"\x08\x01", b"\x0a\x00", b"\x3a\x00"])
def test_many_tiny_fields_do_not_hang(tmp_path, field):
    path = tmp_path / "many.onnx"
    path.write_bytes(field * 5_000_000)
    start = time.process_time()
    refused(path)
    assert time.process_time() - start < 30


def test_a_large_claim_takes_no_memory(tmp_path):
    """A kilobyte that says it holds gigabytes."""
    def tweak(model):
        shape(2**15, 2**15)(model)

    path = save(tmp_path / "claim.onnx", [NODE], {"w": np.ones((2, 2), np.float32)}, tweak=tweak)
    tracemalloc.start()
    refused(path, "has 4 numbers in place of 1073741824")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
