"""Hundreds of damaged and strange files for every reader: each is read, or refused with one sentence, at once.

Seeded: a failure names its number, with which `random.Random(number)` makes that file again.
"""

import io
import random
import re
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save

from ridfr_core import checkpoints
from ridfr_core.adapter import IdentityAdapter, find_lora, read_lora
from ridfr_core.content import ContentSpec, check_layout, understand
from ridfr_core.errors import RidfrError
from ridfr_core.face_model import load_face_model
from ridfr_core.identity_files import load_identity
from ridfr_core.recognition import IResNet, load_iresnet
from ridfr_core.training import detector, recogniser

FILES = 120  # for each reader
SECONDS = 2.0  # for one file; a tenth of it is usual
MEMORY = 4 << 30  # more than the process has already

pytestmark = pytest.mark.filterwarnings("ignore")


# Files as they should be


def adapter_file():
    net = IdentityAdapter((8,) * 16, dim=64, clip_dim=16, id_dim=32, depth=1)
    lora = {f"ip_adapter.{n}.to_q_lora.{side}.weight": torch.rand(2, 2) for n in range(32) for side in ("down", "up")}
    return {**net.state_dict(), **lora}, {}


def content_file():
    """A ControlNet of 32 channels in the ldm layout."""
    resnet = {"in_layers.0": (32,), "in_layers.2": (32, 32, 3, 3), "emb_layers.1": (32, 128), "out_layers.0": (32,)}
    resnet |= {"out_layers.3": (32, 32, 3, 3)}
    blocks = {f"attn{i}.to_{part}": (32, 16 if i == 2 and part in "kv" else 32) for i in (1, 2) for part in "qkv"}
    blocks |= {f"attn{i}.to_out.0": (32, 32) for i in (1, 2)} | {f"norm{i}": (32,) for i in (1, 2, 3)}
    blocks |= {"ff.net.0.proj": (256, 32), "ff.net.2": (32, 128)}
    transformer = {"norm": (32,), "proj_in": (32, 32, 1, 1), "proj_out": (32, 32, 1, 1)}
    transformer |= {f"transformer_blocks.0.{name}": shape for name, shape in blocks.items()}
    modules = {"input_blocks.0.0": (32, 7, 3, 3), "input_blocks.2.0.op": (32, 32, 3, 3), "time_embed.0": (128, 32)}
    modules |= {"time_embed.2": (128, 128), "middle_block_out.0": (32, 32, 1, 1)}
    modules |= {f"zero_convs.{i}.0": (32, 32, 1, 1) for i in range(4)}
    for places, parts in (
        (["input_blocks.1.0", "input_blocks.3.0", "middle_block.0", "middle_block.2"], resnet),
        (["input_blocks.1.1", "middle_block.1"], transformer),
    ):
        modules |= {f"{place}.{name}": shape for place in places for name, shape in parts.items()}
    tensors = {f"{name}.weight": torch.rand(shape) for name, shape in modules.items()}
    tensors |= {f"{name}.bias": torch.rand(shape[0]) for name, shape in modules.items() if name[-5:-1] != ".to_"}
    return tensors, ContentSpec().to_metadata()


def identity_file():
    tensors = {
        "embeddings": F.normalize(torch.randn(2, 512), dim=1),
        "weights": torch.ones(2),
        "thumbnails": torch.zeros(2, 3, 112, 112, dtype=torch.uint8),
        "clip": torch.randn(2, 5, 8),
        "clip_uncond": torch.randn(5, 8),
        "quality": torch.rand(2, 4),
    }
    said = {"format": "ridfr-identity", "version": "1", "recogniser": "nano", "recogniser_sha256": "a" * 64}
    return tensors, said


def recogniser_file():
    return IResNet((1, 1, 1, 1), (8, 8, 8, 8), embedding=16).state_dict(), {}


def lora_file():
    names = [f"lora_unet_down_blocks_{i}.{part}" for i in range(3) for part in ("lora_down.weight", "lora_up.weight")]
    return {name: torch.rand(4, 4) for name in names}, {}


def read_adapter(path):
    state, _ = checkpoints.read(path)
    checkpoints.expect(state, "identity-adapter", path.name)
    IdentityAdapter.from_state_dict(state, name=path.name)
    find_lora(path, state)


def read_content(path):
    state, _ = understand(*checkpoints.read(path), path.name, {"value_range": "-1..1"})
    check_layout(state, path.name)


def read_names(path):
    checkpoints.kind_of(checkpoints.read(path, "meta")[0])


READERS = {  # name: (a file as it should be, what reads it)
    "adapter": (adapter_file, read_adapter),
    "content ControlNet": (content_file, read_content),
    "identity": (identity_file, load_identity),
    "recogniser": (recogniser_file, load_iresnet),
    "LoRA": (lora_file, read_lora),
    "names of any file": (adapter_file, read_names),
}


# What happens to them


def number_changed(name: str, chance: random.Random) -> str:
    odd = ["99999999", "1" + "0" * 5000, "-1", "x", "", "007", "\u0663"]
    return re.sub(r"\d+", lambda match: chance.choice(odd), name, count=1)


def renamed(tensors: dict, chance: random.Random) -> dict:
    change = chance.choice(
        [
            lambda name: f"model.{name}",
            lambda name: f"module.{name}",
            lambda name: f"{name}.weight",
            lambda name: name.partition(".")[2],
            lambda name: number_changed(name, chance),
            lambda name: name * 1000,
            lambda name: f"{name}\n\x1b[31m",
        ]
    )
    some = set(tensors) if chance.random() < 0.3 else {chance.choice([*tensors])}
    return {change(name) if name in some else name: tensor for name, tensor in tensors.items()}


def reshaped(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    shapes = [
        lambda t: t.flatten()[:1].reshape(()) if t.numel() else t,
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[..., None],
        lambda t: t[:0] if t.ndim else t,
        lambda t: t[..., :1] if t.ndim else t,
        lambda t: t.movedim(0, -1) if t.ndim else t,
        lambda t: torch.zeros(100_000, 1),
        lambda t: torch.zeros(1, 100_000),
        lambda t: torch.zeros([1] * 30),
    ]
    return chance.choice(shapes)(tensor)


DTYPES = "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 int8 uint8 int64 bool complex64".split()  # noqa: SIM905


def one_changed(tensors: dict, chance: random.Random) -> dict:
    telling = [name for name in tensors if name.startswith(("image_proj.", "ip_adapter.1.")) or "0" in name]
    name = chance.choice(telling or [*tensors]) if chance.random() < 0.7 else chance.choice([*tensors])
    tensor, kind = tensors[name], chance.choice(["shape", "shape", "dtype", "all dtypes", "NaN", "gone", "halved"])
    if kind == "shape":
        return tensors | {name: reshaped(tensor, chance).contiguous()}
    if kind in ("dtype", "all dtypes"):
        dtype = getattr(torch, chance.choice(DTYPES))
        return tensors | {key: tensors[key].to(dtype) for key in ([name] if kind == "dtype" else tensors)}
    if kind == "NaN":
        return tensors | {name: tensor * chance.choice([float("nan"), float("inf"), 1e30, -1])}
    if kind == "gone":
        return {key: tensor for key, tensor in tensors.items() if key != name}
    return {key: tensor for key, tensor in tensors.items() if chance.random() < 0.5}


def strange(tensors: dict, chance: random.Random) -> object:
    """What only a pickle can hold."""
    name = chance.choice([*tensors])
    looped = dict(tensors)
    looped["self"] = looped
    deep = tensors
    for _ in range(40):
        deep = {"a": deep, "b": deep}
    return chance.choice(
        [
            tensors | {name: tensors[name].to_sparse()} if tensors[name].ndim else [],
            tensors | {name: torch.empty(tensors[name].shape, device="meta")},
            tensors | {name: torch.ones(1).expand(10**5, 10**5)},
            tensors | {name: None},
            tensors | {name: [1, "x", {}]},
            tensors | {name: torch.nn.Parameter(tensors[name].float())},
            {"state_dict": chance.choice([None, [1], torch.ones(1), "x", tensors])},
            {"model": tensors},
            {3: tensors, (1, 2): tensors[name], None: tensors[name]},
            [*tensors.values()],
            tensors[name],
            looped,
            deep,
        ]
    )


def bytes_changed(data: bytes, chance: random.Random) -> bytes:
    data, place = bytearray(data), chance.randrange(len(data))
    early = chance.randrange(min(2000, len(data)))
    kind = chance.choice(["flip", "flip early", "cut", "cut early", "longer", "header", "zeros", "swap", "none"])
    if kind in ("flip", "flip early"):
        for _ in range(chance.choice([1, 5, 50])):
            data[chance.randrange(len(data) if kind == "flip" else min(2000, len(data)))] = chance.randrange(256)
    elif kind in ("cut", "cut early"):
        del data[place if kind == "cut" else early :]
    elif kind == "longer":
        data += bytes(chance.randrange(1, 5000))
    elif kind == "header":
        data[:8] = struct.pack("<Q", chance.choice([0, 1, 2**20, 2**33, 2**63, len(data)]))
    elif kind == "zeros":
        data[place : place + 100] = bytes(len(data[place : place + 100]))
    elif kind == "swap":
        data = data[early:] + data[:early]
    return bytes(data) if kind != "none" else b""


def pickled(content: object, chance: random.Random) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=chance.random() < 0.5)
    return file.getvalue()


def made(good: tuple[dict, dict], chance: random.Random) -> bytes:
    """A file's content: some of its tensors or of its bytes differ from a good one's."""
    (tensors, said), kind = good, chance.choice(["names", "tensors", "tensors", "strange", "bytes", "bytes", "said"])
    if kind == "names":
        tensors = renamed(tensors, chance)
    elif kind == "tensors":
        tensors = one_changed(tensors, chance)
    elif kind == "said":
        key = chance.choice([*said, "format"])
        said = {**said, key: chance.choice(["", "x\n" * 1000, "2", "\u202e"])} if chance.random() < 0.7 else {}
    elif kind == "strange":
        return pickled(strange(tensors, chance), chance)
    data = pickled(tensors, chance) if chance.random() < 0.4 else save({k: v.clone() for k, v in tensors.items()}, said)
    return bytes_changed(data, chance) if kind == "bytes" else data


# The readers


class Hung(Exception):
    """A reader took too long."""


@pytest.fixture(autouse=True)
def limits():
    """A file that makes a reader ask for a fortune gets an error, in place of the machine's memory."""
    if sys.platform != "linux":  # no such limit elsewhere
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(read, path) -> str | None:
    """What is wrong with how a reader took a file; None where it read it or refused it with a sentence."""

    def stop(*_):
        raise Hung

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    start = time.process_time()
    try:
        read(path)
    except RidfrError as error:
        message = str(error)
        if "\n" in message or not message.endswith(".") or len(message) > 600:
            return f"no sentence: {message[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]!r}"
    finally:
        signal.alarm(0)
    taken = time.process_time() - start
    return f"took {taken:.1f} s" if taken > SECONDS else None


def complaints(read, files) -> list[str]:
    return [f"{number}: {said}" for number, path in enumerate(files) if (said := complaint(read, path))]


@pytest.mark.parametrize("name", READERS)
def test_weight_files(tmp_path, name):
    make, read = READERS[name]
    torch.manual_seed(0)
    good = make()

    def files():
        for number in range(FILES):
            path = tmp_path / random.Random(number).choice(["x.safetensors", "x.bin"])
            path.write_bytes(made(good, random.Random(number)))
            yield path

    assert not complaints(read, files())


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory) -> dict[str, bytes]:
    """A small detector and a small recogniser."""
    folder = tmp_path_factory.mktemp("onnx")
    detector.export_onnx(detector.DetectorNet(), folder / "det.onnx")
    recogniser.export_onnx(recogniser.iresnet((1, 1, 1, 1), (8, 8, 8, 8)), folder / "rec.onnx")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def onnx_changed(data: bytes, chance: random.Random) -> bytes:
    """Bytes of the file, or parts of its graph."""
    import onnx

    if chance.random() < 0.4:
        return bytes_changed(data, chance)
    model = onnx.load_from_string(data)
    graph, kinds = model.graph, ["tensor", "tensor", "node", "node", "input", "output", "type", "opset", "outside"]
    kind = chance.choice(kinds)
    tensor, node = chance.choice(graph.initializer), chance.choice(graph.node)
    if kind == "tensor":
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        values = reshaped(values, chance) if chance.random() < 0.6 else values * chance.choice([float("nan"), 1e30])
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.contiguous().numpy(), tensor.name))
    elif kind == "node":
        chance.choice([lambda: graph.node.remove(node), node.ClearField("input"), lambda: node.ClearField("attribute")])
        node.op_type = chance.choice(["Conv", "Add", "Relu", "Nothing", node.op_type])
        if chance.random() < 0.5:
            del node.input[chance.randrange(len(node.input) + 1) :]
        if chance.random() < 0.3:
            del node.output[:]
    elif kind == "input":
        del graph.input[:]
    elif kind == "output":
        del graph.output[:]
    elif kind == "type":
        tensor.data_type = chance.choice([0, 5, 8, 10, 99])
    elif kind == "opset":
        model.opset_import[0].version = chance.choice([0, 1, 5, 9999])
    elif kind == "outside":
        place = chance.choice(["../../etc/passwd", "none.bin", "/dev/zero"])
        onnx.external_data_helper.set_external_data(tensor, place)
        tensor.ClearField("raw_data")
    return model.SerializeToString()


def test_recognisers_in_onnx(tmp_path, onnx_files):
    def files():
        for number in range(FILES):
            (tmp_path / "x.onnx").write_bytes(onnx_changed(onnx_files["rec.onnx"], random.Random(number)))
            yield tmp_path / "x.onnx"

    assert not complaints(load_iresnet, files())


def test_face_models(tmp_path, onnx_files):
    """Folders of two files, one of them changed."""

    def files():
        for number in range(FILES):
            chance = random.Random(number)
            changed = chance.choice([*onnx_files])
            for name, data in onnx_files.items():
                (tmp_path / name).write_bytes(onnx_changed(data, chance) if name == changed else data)
            yield tmp_path

    assert not complaints(load_face_model, files())
