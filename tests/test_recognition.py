"""The torch ArcFace against onnxruntime on the same file, for every form in which such graphs are published."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from ridfr_core import checkpoints
from ridfr_core.recognition import FaceModelError, IResNet, embed, load_iresnet
from ridfr_core.training.recogniser import export_onnx, iresnet, plain_net

SMALL = dict(layers=(1, 2, 1, 1), widths=(8, 8, 16, 16))


def randomise(net, seed=0):
    """Weights and batch norm statistics as far from their initial values as a trained net's."""
    noise = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=noise)
            module.running_var.uniform_(0.5, 2, generator=noise)
            module.weight.data.uniform_(0.5, 1.5, generator=noise)
            module.bias.data.normal_(0, 0.3, generator=noise)
        elif isinstance(module, torch.nn.PReLU):
            module.weight.data.uniform_(0, 0.5, generator=noise)
    return net.eval()


def crops(count=2):
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(3))


def onnx_embedding(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: (image[None] * 2 - 1).numpy()})[0] for image in images]
    return torch.from_numpy(np.concatenate(rows))


def assert_same(path):
    net = load_iresnet(path)
    reference = onnx_embedding(path, crops())
    raw = net(crops() * 2 - 1)
    torch.testing.assert_close(raw, reference, rtol=1e-3, atol=1e-3)
    assert F.cosine_similarity(raw, reference).min() >= 0.99999
    return net


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export_onnx(randomise(iresnet(**SMALL)), path)
    return path


def test_small(small):
    net = assert_same(small)
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("layers", "nodes", "size"),
    [((3, 4, 14, 3), [53, 25, 26, 24], 43.6e6), ((3, 13, 30, 3), [103, 50, 51, 49], 65.2e6)],
    ids=["R50", "R100"],
)
def test_at_real_size(tmp_path, layers, nodes, size):
    """buffalo_l's and antelopev2's recogniser: Conv, PRelu, BatchNormalization and Add nodes as theirs."""
    path = tmp_path / "real.onnx"
    export_onnx(randomise(iresnet(layers, (64, 128, 256, 512))), path)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert [kinds.count(kind) for kind in ("Conv", "PRelu", "BatchNormalization", "Add")] == nodes
    net = assert_same(path)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(size, rel=0.01)


def test_unfolded_batch_norms(tmp_path):
    path = tmp_path / "unfolded.onnx"
    net = randomise(iresnet(**SMALL))
    torch.onnx.export(net, (torch.zeros(1, 3, 112, 112),), str(path), opset_version=11, dynamo=False,
                      training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("BatchNormalization") > kinds.count("Conv")
    assert_same(path)


def edit(source, target, change):
    model = onnx.load(str(source))
    change(model.graph)
    onnx.save(model, str(target))
    return target


def test_initialisers_as_constant_nodes(small, tmp_path):
    def change(graph):
        constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer]
        nodes = [*constants, *graph.node]
        del graph.initializer[:], graph.node[:]
        graph.node.extend(nodes)

    assert_same(edit(small, tmp_path / "constants.onnx", change))


def replace(graph, kind, nodes):
    place = next(i for i, node in enumerate(graph.node) if node.op_type == kind)
    after = list(graph.node)
    after[place:place + 1] = nodes
    del graph.node[:]
    graph.node.extend(after)


def test_reshape_for_flatten(small, tmp_path):
    def change(graph):
        node = next(node for node in graph.node if node.op_type == "Flatten")
        graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "flat"))
        replace(graph, "Flatten", [helper.make_node("Reshape", [node.input[0], "flat"], [node.output[0]])])

    assert_same(edit(small, tmp_path / "reshape.onnx", change))


def test_matmul_and_add_for_gemm(small, tmp_path):
    def change(graph):
        node = next(node for node in graph.node if node.op_type == "Gemm")
        weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), "matrix"))
        replace(graph, "Gemm", [helper.make_node("MatMul", [node.input[0], "matrix"], ["product"]),
                                helper.make_node("Add", ["product", node.input[2]], [node.output[0]])])

    assert_same(edit(small, tmp_path / "matmul.onnx", change))


def test_embed_gives_unit_length(small):
    found = embed(load_iresnet(small), crops())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found, F.normalize(onnx_embedding(small, crops())), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [(1, 2, 1, 1), (3, 4, 14, 3), (3, 13, 30, 3)], ids=["small", "R50", "R100"])
def test_gradient_against_finite_differences(tmp_path, layers):
    """At the real depths, narrow."""
    export_onnx(randomise(iresnet(layers, (8, 8, 16, 16))), tmp_path / "deep.onnx")
    net = load_iresnet(tmp_path / "deep.onnx").double()
    image = crops(1).double().requires_grad_()
    target = F.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(4), dtype=torch.double))
    (embed(net, image) * target).sum().backward()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    step = 1e-7
    with torch.no_grad():
        ahead, behind = ((embed(net, image + s * step * direction) * target).sum() for s in (1, -1))
    slope = (image.grad * direction).sum()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-3, atol=1e-9)


def test_operations_are_used():
    class Counted(torch.nn.Conv2d):
        made = 0

        def __init__(self, *args):
            super().__init__(*args)
            Counted.made += 1

    class Operations:
        Conv2d = Counted
        Linear = torch.nn.Linear

    IResNet(**SMALL, operations=Operations)
    assert Counted.made == 1 + 2 * 5 + 4


@pytest.mark.parametrize("kind", ["another network", "no ONNX", "missing batch norm"])
def test_errors_say_what_and_where(kind, small, tmp_path):
    path = tmp_path / "bad.onnx"
    if kind == "another network":
        export_onnx(plain_net(), path)
    elif kind == "no ONNX":
        path.write_bytes(b"<html>404</html>")
    else:
        edit(small, path, lambda graph: replace(graph, "BatchNormalization", []))
    with pytest.raises(FaceModelError, match="bad.onnx"):
        load_iresnet(path)


def test_every_missing_tensor_of_a_copy_is_named(small, tmp_path):
    state = load_iresnet(small).state_dict()
    for key in state:
        checkpoints.write({k: w for k, w in state.items() if k != key}, tmp_path / "half.safetensors")
        with pytest.raises(checkpoints.CheckpointError, match=f"'half.safetensors' lacks {key}, which"):
            load_iresnet(tmp_path / "half.safetensors")
