"""The torch ArcFace against onnxruntime on the same file, for every form in which such graphs are published."""

import json
import struct
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from ridfr_core import checkpoints
from ridfr_core.errors import RidfrError
from ridfr_core.recognition import FaceModelError, GraphRecogniser, IResNet, embed, load_iresnet, load_recogniser
from ridfr_core.training.recogniser import export_onnx, iresnet, plain_net
from tests.real_faces import real

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


# Copies of an odd kind


def copied(small, path, change):
    state = load_iresnet(small).state_dict()
    checkpoints.write(change(state), path)
    return path


@pytest.mark.parametrize("dtype, close", [(torch.float16, 1e-2), (torch.bfloat16, 0.1), (torch.float64, 1e-5),
                                          (torch.float8_e4m3fn, 0.6)])
def test_a_copy_of_another_precision_computes_in_32_bits(small, tmp_path, dtype, close):
    path = copied(small, tmp_path / "other.safetensors", lambda state: {k: w.to(dtype) for k, w in state.items()})
    net = load_iresnet(path)
    assert {w.dtype for w in net.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(embed(net, crops()), embed(load_iresnet(small), crops()), atol=close, rtol=0)


def header_only(path, **shapes):
    """A safetensors file of tensors without a single number."""
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    head = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    return path


def renamed(state, old, new):
    return {new if key == old else key: w for key, w in state.items()}


ODD = {
    "a far block": lambda s: {**s, "blocks.100000000.conv1.weight": torch.zeros(1)},
    "a farther block": lambda s: {**s, f"blocks.{'9' * 5000}.conv1.weight": torch.zeros(1)},
    "a gap": lambda s: {**s, "blocks.9.conv1.weight": torch.zeros(8, 8, 3, 3)},
    "no number": lambda s: {**s, "blocks.x.conv1.weight": torch.zeros(1)},
    "one word": lambda s: {**s, "blocks.": torch.zeros(1)},
    "whole numbers": lambda s: {k: w.to(torch.int8) for k, w in s.items()},
    "nan": lambda s: {**s, "linear.bias": s["linear.bias"] * torch.nan},
    "infinite": lambda s: {**s, "stem.weight": s["stem.weight"] / 0},
    "0-d features": lambda s: {**s, "features.scale": torch.tensor(1.0)},
    "0-d skip": lambda s: {**s, "blocks.0.skip.weight": torch.tensor(1.0)},
    "wide skip": lambda s: {**s, "blocks.0.skip.weight": torch.zeros(10**6, 1)},
    "empty skip": lambda s: {**s, "blocks.0.skip.weight": torch.zeros(0, 8, 1, 1)},
    "other linear": lambda s: {**s, "linear.weight": torch.zeros(3, 3)},
    "a block too many": lambda s: {**s, **{k.replace("blocks.4", "blocks.5"): w for k, w in s.items()
                                           if k.startswith("blocks.4.")}},
    "nothing but the names": lambda s: {"stem.weight": torch.zeros(1), "features.scale": torch.zeros(1),
                                        "blocks.0.skip.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("what", ODD)
def test_odd_copies_are_refused_at_once(small, tmp_path, what):
    path, start = copied(small, tmp_path / "odd.safetensors", ODD[what]), time.process_time()
    if what == "a block too many":  # it is one of a longer network
        assert len(load_iresnet(path).blocks) == 6
        return
    with pytest.raises(RidfrError, match="odd.safetensors") as failure:
        load_iresnet(path)
    assert "\n" not in str(failure.value) and time.process_time() - start < 5


def test_a_kilobyte_builds_no_large_network(tmp_path):
    """Shapes of nothing: they take no place in the file, however long their sides."""
    shapes = {"stem.weight": [0], "features.scale": [10**9, 0], "blocks.0.skip.weight": [10**9, 0],
              **{f"blocks.{i}.conv1.weight": [10**9, 0] for i in range(3)}}
    with pytest.raises(RidfrError, match="big.safetensors"):
        load_iresnet(header_only(tmp_path / "big.safetensors", **shapes))


def test_blocks_in_a_circle(small, tmp_path):
    """The last block's output is named as the first block's input."""
    def change(graph):
        adds = [node for node in graph.node if node.op_type == "Add"]
        start = next(node for node in graph.node if node.op_type == "PRelu").output[0]
        adds[-1].output[0] = start

    with pytest.raises(FaceModelError, match="circle.onnx"):
        load_iresnet(edit(small, tmp_path / "circle.onnx", change))


@pytest.mark.parametrize("what, change", [
    ("pads", lambda node: node.attribute.extend([helper.make_attribute("pads", [0, 0, 0, 0])])),
    ("group", lambda node: node.attribute.extend([helper.make_attribute("group", 2)])),
    ("fewer inputs", lambda node: node.ClearField("input")),
])
def test_a_network_that_is_nearly_an_iresnet(small, tmp_path, what, change):
    """Convolutions of another kind are not taken for the usual ones."""
    def spoil(graph):
        node = [node for node in graph.node if node.op_type == "Conv"][2]
        kept = [a for a in node.attribute if a.name != what]
        del node.attribute[:]
        node.attribute.extend(kept)
        change(node)

    with pytest.raises(FaceModelError, match="other.onnx"):
        load_iresnet(edit(small, tmp_path / "other.onnx", spoil))


# Other designs


def test_weights_in_half_precision_are_read(small, tmp_path):
    def change(graph):
        for tensor in [*graph.initializer]:
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.half")
            graph.node.insert(0, helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
            graph.initializer.remove(tensor)
            graph.initializer.append(half)

    net = load_recogniser(edit(small, tmp_path / "half.onnx", change))
    assert isinstance(net, IResNet) and net.width == 512
    torch.testing.assert_close(embed(net, crops()), embed(load_iresnet(small), crops()), atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    export_onnx(randomise(plain_net()), path)
    return path


def assert_embeds(net, path):
    with torch.no_grad():
        found = embed(net, crops(3))
    torch.testing.assert_close(found, F.normalize(onnx_embedding(path, crops(3))), atol=1e-5, rtol=0)


def test_another_design_has_gradients(plain):
    net = load_recogniser(plain)
    assert isinstance(net, GraphRecogniser) and net.width == 512 and not net.one_by_one
    assert_embeds(net, plain)
    net, image = net.double(), crops(1).double().requires_grad_()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    target = F.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(4), dtype=torch.double))
    (embed(net, image) * target).sum().backward()
    step = 1e-7
    with torch.no_grad():
        ahead, behind = ((embed(net, image + s * step * direction) * target).sum() for s in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), (image.grad * direction).sum(), rtol=1e-3, atol=1e-9)


def test_a_file_for_one_crop_takes_several(plain, tmp_path):
    """Its last reshape counts on a batch of one, as mobilefacenet's."""
    def change(graph):
        graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "row"))
        last = graph.node[-1]
        output, last.output[0] = last.output[0], "raw"
        graph.node.append(helper.make_node("Reshape", ["raw", "row"], [output]))

    path = edit(plain, tmp_path / "single.onnx", change)
    net = load_recogniser(path)
    assert net.one_by_one
    assert_embeds(net, path)


def test_what_scales_its_pixels_itself(plain, tmp_path):
    """MXNet's exports begin with a subtraction and a product, and want 0..255: insightface goes by their names."""
    def change(graph):
        graph.initializer.extend([numpy_helper.from_array(np.float32(127.5), "mean"),
                                  numpy_helper.from_array(np.float32(1 / 127.5), "scale")])
        graph.node[0].input[0] = "scaled"
        graph.node.insert(0, helper.make_node("Sub", [graph.input[0].name, "mean"], ["shifted"], name="_minusscalar0"))
        graph.node.insert(1, helper.make_node("Mul", ["shifted", "scale"], ["scaled"], name="_mulscalar0"))

    net = load_recogniser(edit(plain, tmp_path / "mxnet.onnx", change))
    with torch.no_grad():
        torch.testing.assert_close(embed(net, crops(3)), embed(load_recogniser(plain), crops(3)), atol=1e-4, rtol=0)


def test_the_real_mobilefacenet():
    path = real("mobilefacenet.onnx")
    net = load_recogniser(path)
    assert net.width == 128 and net.one_by_one
    assert_embeds(net, path)
    image = crops(1).requires_grad_()
    embed(net, image)[0, 0].backward()
    assert image.grad.abs().sum() > 0
