"""ONNX graphs in torch against onnxruntime, operator by operator and whole."""

import math
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ridfr_core.nano import WEIGHTS
from ridfr_core.onnx_file import FaceModelError, read_graph
from ridfr_core.onnx_network import OnnxNetwork, RuntimeNetwork, load_network
from tests.onnx_graphs import save
from tests.real_faces import real

SIZE = (2, 4, 6, 8)  # of x where a case does not say
PACK = WEIGHTS / "insightface" / "models" / "nano"


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def fed(op, opset=13, size=SIZE, **given):
    """A single operator of x and tensors of its own (None: left out). Keywords with an underscore are attributes."""
    attributes = {key[1:]: value for key, value in given.items() if key.startswith("_")}
    tensors = {key: value for key, value in given.items() if not key.startswith("_") and value is not None}
    inputs = ["x", *(key if value is not None else "" for key, value in given.items() if not key.startswith("_"))]
    return [helper.make_node(op, inputs, ["y"], **attributes)], tensors, opset, size


K = numbers(6, 4, 3, 3)
CASES = {
    "conv": fed("Conv", w=K, b=numbers(6), _pads=[1, 1, 1, 1], _strides=[2, 1]),
    "conv, unequal padding": fed("Conv", w=K, _pads=[0, 1, 2, 0]),
    "conv, dilated, in groups": fed("Conv", w=numbers(8, 2, 3, 3), _group=2, _dilations=[2, 2], _pads=[2, 2, 2, 2]),
    "conv, same upper": fed("Conv", w=K, _auto_pad="SAME_UPPER", _strides=[2, 2], size=(1, 4, 7, 8)),
    "conv, same lower": fed("Conv", w=numbers(6, 4, 2, 4), _auto_pad="SAME_LOWER", _strides=[1, 2]),
    "conv, valid": fed("Conv", w=K, _auto_pad="VALID"),
    "conv of a line": fed("Conv", w=numbers(5, 4, 3), _pads=[1, 1], size=(2, 4, 9)),
    "transposed conv": fed("ConvTranspose", w=numbers(4, 5, 2, 2), b=numbers(5), _strides=[2, 2]),
    "transposed conv, padded": fed("ConvTranspose", w=numbers(4, 3, 3, 3), _strides=[2, 2], _pads=[1, 1, 1, 1],
                                   _output_padding=[1, 1], _group=2),
    "batch norm": fed("BatchNormalization", a=numbers(4), b=numbers(4), c=numbers(4), d=numbers(4) ** 2, _epsilon=1e-3),
    "gemm": fed("Gemm", w=numbers(5, 7), b=numbers(7), _alpha=0.5, _beta=2.0, size=(3, 5)),
    "gemm, transposed": fed("Gemm", w=numbers(7, 5), b=numbers(1, 7), _transB=1, size=(3, 5)),
    "gemm of the other way round": fed("Gemm", w=numbers(3, 7), _transA=1, size=(3, 5)),
    "matmul": fed("MatMul", w=numbers(4, 8, 5)),
    "max pool": fed("MaxPool", _kernel_shape=[3, 3], _strides=[2, 2], _pads=[1, 1, 1, 1]),
    "max pool, ceiling": fed("MaxPool", _kernel_shape=[2, 2], _strides=[2, 2], _ceil_mode=1, size=(1, 3, 7, 5)),
    "max pool, unequal padding": fed("MaxPool", _kernel_shape=[3, 3], _strides=[2, 2], _pads=[0, 0, 1, 1]),
    "average pool": fed("AveragePool", _kernel_shape=[2, 2], _strides=[2, 2], _ceil_mode=1, size=(1, 3, 7, 5)),
    "average pool, padding counts": fed("AveragePool", _kernel_shape=[3, 3], _pads=[1, 1, 1, 1], _count_include_pad=1),
    "average pool, padding does not count": fed("AveragePool", _kernel_shape=[3, 3], _pads=[1, 1, 1, 1]),
    "global average": fed("GlobalAveragePool"),
    "global max": fed("GlobalMaxPool"),
    "prelu by channel": fed("PRelu", w=numbers(4, 1, 1)),
    "prelu, one slope": fed("PRelu", w=numbers(1)),
    "prelu along the last axis": fed("PRelu", w=numbers(8)),
    "prelu of a row": fed("PRelu", w=numbers(5), size=(3, 5)),
    "leaky relu": fed("LeakyRelu", _alpha=0.3),
    "hard sigmoid": fed("HardSigmoid", _alpha=0.4, _beta=0.3),
    "hard swish": fed("HardSwish", opset=14),
    "clip": fed("Clip", a=np.float32(-0.5), b=np.float32(0.7)),
    "clip from above": fed("Clip", a=None, b=np.float32(0.7)),
    "clip, old": fed("Clip", _min=-0.1, _max=0.5, opset=6),
    "softmax": fed("Softmax", _axis=-1),
    "min": fed("Min", a=numbers(8), b=numbers(6, 1)),
    "max": fed("Max", a=numbers(4, 1, 1)),
    "add": fed("Add", w=numbers(4, 1, 1)),
    "sub": fed("Sub", w=numbers(1, 8)),
    "div": fed("Div", w=numbers(4, 1, 1)),
    "pow": fed("Pow", w=np.float32(2)),
    "where": ([helper.make_node("Greater", ["x", "w"], ["g"]), helper.make_node("Where", ["g", "x", "w"], ["y"])],
              {"w": numbers(8)}, 13, SIZE),
    "reduce mean": fed("ReduceMean", _axes=[2, 3], _keepdims=0),
    "reduce sum": fed("ReduceSum", a=ints(1)),
    "reduce l2": fed("ReduceL2", _axes=[1]),
    "reduce all": fed("ReduceMax"),
    "flatten": fed("Flatten", _axis=2),
    "reshape": fed("Reshape", a=ints(0, -1, 8)),
    "reshape, old": fed("Reshape", _shape=[2, 4, -1], opset=1),
    "transpose": fed("Transpose", _perm=[2, 3, 0, 1]),
    "transpose backwards": fed("Transpose"),
    "unsqueeze": fed("Unsqueeze", a=ints(0, -1)),
    "unsqueeze, old": fed("Unsqueeze", _axes=[1, 3], opset=11),
    "squeeze": fed("Squeeze", a=ints(0), size=(1, 4, 5)),
    "squeeze, old": fed("Squeeze", _axes=[0, -1], opset=11, size=(1, 4, 1)),
    "slice": fed("Slice", a=ints(1, -5), b=ints(3, 2**62), c=ints(1, 3), d=ints(1, 2)),
    "slice, old": fed("Slice", _starts=[1], _ends=[-1], _axes=[2], opset=9),
    "gather": fed("Gather", a=ints(3, -1, 0), _axis=1),
    "gather one": fed("Gather", a=np.int64(-2), _axis=3),
    "concat": fed("Concat", w=numbers(2, 3, 6, 8), _axis=1),
    "expand": fed("Expand", a=ints(3, 1, 5), size=(1, 4, 1)),
    "tile": fed("Tile", a=ints(1, 2, 1, 3)),
    "pad": fed("Pad", a=ints(0, 1, 2, 0, 0, 0, 1, 3), b=np.float32(0.5)),
    "pad by reflection": fed("Pad", a=ints(0, 0, 2, 1, 0, 0, 1, 3), _mode="reflect"),
    "pad by the edge": fed("Pad", a=ints(0, 0, 2, 1, 0, 0, 1, 3), _mode="edge"),
    "pad, old": fed("Pad", _pads=[0, 0, 1, 1, 0, 0, 1, 1], _value=2.0, opset=10),
    "cumulative sum": fed("CumSum", a=np.int64(2)),
    "upsample": fed("Upsample", a=np.array([1, 1, 2, 2], np.float32), opset=9),
    "upsample, old": fed("Upsample", _scales=[1.0, 1.0, 2.0, 3.0], opset=7),
    "resize by scales": fed("Resize", r=None, s=np.array([1, 1, 2, 2], np.float32), _mode="nearest",
                            _coordinate_transformation_mode="asymmetric", _nearest_mode="floor"),
    "resize to a size": fed("Resize", r=None, s=None, t=ints(2, 4, 12, 24), _mode="nearest"),
    "resize smoothly": fed("Resize", r=None, s=None, t=ints(2, 4, 9, 5), _mode="linear"),
    "resize, corners": fed("Resize", r=None, s=None, t=ints(2, 4, 9, 5), _mode="linear",
                           _coordinate_transformation_mode="align_corners"),
    "resize, cubic": fed("Resize", r=None, s=None, t=ints(2, 4, 9, 15), _mode="cubic"),
    "dropout": fed("Dropout"),
    "identity": fed("Identity"),
    "cast": ([helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
              helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT)], {}, 13, SIZE),
    "cast to whole numbers": ([helper.make_node("Cast", ["x"], ["h"], to=TensorProto.INT64),
                               helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT)], {}, 13, SIZE),
    "grid sample": fed("GridSample", g=numbers(2, 5, 7, 2) / 2, opset=16, _padding_mode="border", _align_corners=1),
    "split": ([helper.make_node("Split", ["x", "s"], ["a", "b"], axis=1),
               helper.make_node("Concat", ["b", "a"], ["y"], axis=1)], {"s": ints(1, 3)}, 13, SIZE),
    "split in halves": ([helper.make_node("Split", ["x"], ["a", "b"], axis=1),
                         helper.make_node("Sub", ["a", "b"], ["y"])], {}, 11, SIZE),
    **{op.lower(): fed(op) for op in ("Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Exp", "Erf", "Floor", "Ceil",
                                      "Softplus")},
    "square root": ([helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Sqrt", ["a"], ["s"]),
                     helper.make_node("Reciprocal", ["s"], ["y"])], {}, 13, SIZE),
}


def run_both(path, x):
    net = OnnxNetwork(read_graph(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return net, net(x), [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.parametrize("case", CASES)
def test_operator(tmp_path, case):
    nodes, tensors, opset, size = CASES[case]
    path = save(tmp_path / "one.onnx", nodes, tensors, size, opset=opset)
    _, ours, theirs = run_both(path, torch.from_numpy(numbers(*size, seed=9)))
    assert ours[0].shape == theirs[0].shape
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-3 if case == "cast" else 1e-5)


def upsampled():
    """What exporters make of an upsampling to another map's size, with its arithmetic of shapes."""
    return [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four", "zero"], ["sides"]),
        helper.make_node("Shape", ["small"], ["shape2"]),
        helper.make_node("Gather", ["shape2", "one"], ["channels"], axis=0),
        helper.make_node("Unsqueeze", ["channels", "zero"], ["channels1"]),
        helper.make_node("Gather", ["shape2", "nought"], ["batch"], axis=0),
        helper.make_node("Mul", ["batch", "one"], ["batch1"]),
        helper.make_node("Unsqueeze", ["batch1", "zero"], ["batch2"]),
        helper.make_node("Concat", ["batch2", "channels1", "sides"], ["size"], axis=0),
        helper.make_node("Cast", ["size"], ["fraction"], to=TensorProto.FLOAT),
        helper.make_node("Floor", ["fraction"], ["floored"]),
        helper.make_node("Cast", ["floored"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Resize", ["small", "", "", "whole"], ["large"], mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        helper.make_node("ConstantOfShape", ["whole"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Add", ["large", "ones"], ["more"]),
        helper.make_node("Add", ["more", "x"], ["y"]),
    ], {"two": ints(2), "four": ints(4), "zero": ints(0), "one": np.int64(1), "nought": np.int64(0)}


def test_arithmetic_of_shapes_at_any_size(tmp_path):
    path = save(tmp_path / "up.onnx", *upsampled(), (1, 3, "h", "w"))
    for size in ((1, 3, 8, 8), (1, 3, 12, 20), (1, 3, 7, 5)):
        _, ours, theirs = run_both(path, torch.from_numpy(numbers(*size)))
        torch.testing.assert_close(ours[0], theirs[0])


class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
    """Stands for a GPU: notes each value that is read back to the host from a tensor on it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.read = torch.device(device), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function) and args[0].device == self.device:
            self.read.append(args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("file", ["det_nano.onnx", "upsampled"])
def test_nothing_is_read_back_from_another_device(tmp_path, file):
    """On `meta` there is nothing to read: shapes and what is worked out from them stay on the CPU, weights do not."""
    path = PACK / file if file != "upsampled" else save(tmp_path / "up.onnx", *upsampled(), (1, 3, "h", "w"))
    net = OnnxNetwork(read_graph(path)).to("meta")
    with Elsewhere("meta") as watch:
        found = net(torch.empty(1, 3, 128, 160, device="meta"))
    expected = OnnxNetwork(read_graph(path))(torch.zeros(1, 3, 128, 160))
    assert [out.shape for out in found] == [out.shape for out in expected] and not watch.read
    assert all(out.device.type == "meta" for out in found)


def test_weights_are_parameters_of_leaves(tmp_path):
    """So that ComfyUI's model management counts and moves them: 16-bit ones too, as 32-bit."""
    net = OnnxNetwork(read_graph(PACK / "det_nano.onnx"))
    parameters = dict(net.named_parameters())
    assert sum(w.numel() for w in parameters.values()) > 600_000 and not list(net.buffers())
    assert {w.dtype for w in parameters.values()} == {torch.float32} and not any(
        w.requires_grad for w in parameters.values())
    assert all(not list(module.children()) for module in net.modules() if list(module.parameters(recurse=False)))


def test_gradients_against_finite_differences(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
             helper.make_node("PRelu", ["a", "s"], ["b"]),
             helper.make_node("GlobalAveragePool", ["b"], ["c"]), helper.make_node("Flatten", ["c"], ["d"]),
             helper.make_node("Gemm", ["d", "m"], ["y"])]
    tensors = {"w": numbers(5, 3, 3, 3), "s": numbers(5, 1, 1), "m": numbers(5, 4)}
    net = OnnxNetwork(read_graph(save(tmp_path / "net.onnx", nodes, tensors))).double()
    x = torch.from_numpy(numbers(2, 3, 8, 8)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x)[0], x)


# What cannot be run


def refused(path, says, size=(1, 3, 8, 8)):
    with pytest.raises(FaceModelError, match=says) as failure:
        OnnxNetwork(read_graph(path)).try_out(size)
    message = str(failure.value)
    assert path.name in message and "\n" not in message and message.endswith(".")


def chain(*ops):
    names = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
    return [helper.make_node(op, [a], [b]) for op, a, b in zip(ops, names, names[1:])]


def test_a_circle(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Relu", ["b"], ["y"])]
    refused(save(tmp_path / "circle.onnx", nodes), "its operator Add reads b, which nothing before it gives")


def test_an_output_that_nothing_gives(tmp_path):
    refused(save(tmp_path / "none.onnx", chain("Relu"), outputs=("z",)), "nothing gives its output z")


def test_two_inputs(tmp_path):
    def tweak(model):
        model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))

    refused(save(tmp_path / "two.onnx", chain("Relu"), tweak=tweak), "it has 2 inputs")


def row_and_column(op):
    """Two long lines, and what becomes of them."""
    return [
        helper.make_node("Reshape", ["x", "column"], ["a"]),
        helper.make_node("Reshape", ["x", "row"], ["b"]),
        *(helper.make_node("Concat", [name] * 64, [name * 2], axis=axis) for axis, name in enumerate("ab")),
        helper.make_node(op, ["aa", "bb"], ["y"]),
    ]


HUGE = {
    "constant": [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
    "expand": [helper.make_node("Expand", ["x", "s"], ["y"])],
    "tile": [helper.make_node("Tile", ["x", "s"], ["y"])],
    "range": [helper.make_node("Range", ["i", "j", "i"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])],
    "resize": [helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="nearest",
                                coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
    "pad": [helper.make_node("Pad", ["x", "p"], ["y"])],
    "conv": [helper.make_node("Conv", ["x", "w"], ["y"], pads=[10**6] * 4)],
    "transposed conv": [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[10**5, 10**5])],
    "pool": [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2 * 10**6] * 2, pads=[10**6] * 4)],
    "sum": row_and_column("Add"),
    "product": row_and_column("MatMul"),
}
TENSORS = {
    "s": ints(1, 3, 10**5, 10**5), "i": np.int64(1), "j": np.int64(10**12), "w": numbers(3, 3, 3, 3),
    "p": ints(0, 0, 0, 0, 0, 0, 10**5, 10**5), "column": ints(-1, 1), "row": ints(1, -1),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_asks_for_too_much_memory(tmp_path, what):
    refused(save(tmp_path / "huge.onnx", HUGE[what], TENSORS), "a tensor of the size|too much memory")


def test_many_large_tensors(tmp_path):
    nodes = [helper.make_node("Expand", ["x", "s"], ["v0"])]
    nodes += [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(200)]
    nodes.append(helper.make_node("Relu", ["v200"], ["y"]))
    path = save(tmp_path / "many.onnx", nodes, {"s": ints(1000, 3, 100, 100)}, (1, 3, 1, 1))
    refused(path, "too much memory", (1, 3, 1, 1))


ODD = {
    "operator": chain("Relu", "Mish"),
    "domain": [helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft")],
    "of integers": [helper.make_node("QuantizeLinear", ["x", "f", "z"], ["q"]),
                    helper.make_node("DequantizeLinear", ["q", "f", "z"], ["y"])],
    "branch": [helper.make_node("If", ["t"], ["y"], then_branch=helper.make_graph([], "g", [], []),
                                else_branch=helper.make_graph([], "g", [], []))],
    "mode": [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear",
                              coordinate_transformation_mode="tf_crop_and_resize")],
    "shape from the picture": [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
                               helper.make_node("Reshape", ["x", "i"], ["y"])],
    "gather from the picture": [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
                                helper.make_node("Gather", ["x", "i"], ["y"])],
    "gather beyond": [helper.make_node("Gather", ["x", "far"], ["y"], axis=3)],
}
ODD_TENSORS = {"w": numbers(3, 3, 3, 3), "f": np.float32(1), "z": np.uint8(0), "t": np.bool_(True),
               "s": np.array([1, 1, 2, 2], np.float32), "far": ints(3, 8)}


@pytest.mark.parametrize("what", ODD)
def test_what_is_not_known_names_onnxruntime(tmp_path, what):
    refused(save(tmp_path / "odd.onnx", ODD[what], ODD_TENSORS), r"pip install onnxruntime")


MISFITS = {
    "conv": [helper.make_node("Conv", ["x", "w"], ["y"])],
    "reshape": [helper.make_node("Reshape", ["x", "s"], ["y"])],
    "no kernel": [helper.make_node("MaxPool", ["x"], ["y"])],
    "fewer inputs": [helper.make_node("Conv", ["x"], ["y"])],
    "more inputs": [helper.make_node("Relu", ["x", "x"], ["y"])],
    "bad constant": [helper.make_node("Reshape", ["w", "s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
    "attribute of another kind": [helper.make_node("Concat", ["x", "x"], ["y"], axis="one")],
    "division by nothing": [helper.make_node("Range", ["n", "n", "n"], ["c"]),
                            helper.make_node("Add", ["x", "c"], ["y"])],
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit(tmp_path, what):
    tensors = {"w": numbers(3, 5, 3, 3), "s": ints(7, 7), "n": np.int64(0)}
    refused(save(tmp_path / "misfit.onnx", MISFITS[what], tensors), "misfit.onnx")


def test_onnxruntime_runs_what_is_not_known(tmp_path):
    nodes = [helper.make_node("Acos", ["x"], ["y"])]
    path = save(tmp_path / "acos.onnx", nodes)
    network, outputs = load_network(path, read_graph(path), (1, 3, 8, 8))
    assert isinstance(network, RuntimeNetwork) and outputs[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(network(torch.full((1, 3, 8, 8), 0.5))[0], torch.full((1, 3, 8, 8), math.acos(0.5)))


def test_without_onnxruntime_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = save(tmp_path / "acos.onnx", [helper.make_node("Acos", ["x"], ["y"])])
    with pytest.raises(FaceModelError, match="acos.onnx has the operator Acos, .*: install onnxruntime"):
        load_network(path, read_graph(path), (1, 3, 8, 8))


# Real ones


@pytest.mark.parametrize("name, sizes", [
    ("scrfd_2.5g_bnkps.onnx", ((640, 640), (128, 320))),
    ("scrfd_500m_bnkps.onnx", ((640, 640),)),
    ("mobilefacenet.onnx", ((112, 112),)),
])
def test_real_networks(name, sizes):
    for height, width in sizes:
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        _, ours, theirs = run_both(real(name), x)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_nanos_detector_at_any_size():
    for height, width in ((128, 128), (160, 320)):
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        _, ours, theirs = run_both(PACK / "det_nano.onnx", x)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
