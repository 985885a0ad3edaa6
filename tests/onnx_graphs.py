"""ONNX files made on the spot, for tests of what reads and runs them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes, tensors=(), size=(1, 3, 8, 8), outputs=("y",), opset: int = 13, tweak=None) -> Path:
    """A graph from the input x of `size` (names stand for any size) to outputs of any shape.

    tensors: name -> array, or TensorProtos. tweak: changes the model before it is written.
    """
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()] if isinstance(tensors, dict) \
        else list(tensors)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, size)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "test", [x], ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    if tweak:
        tweak(model)
    onnx.save(model, str(path))
    return path
