import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ridfr_core.checkpoints import KINDS, CheckpointError, brief, check_tensors, expect, kind_of, read, write

WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.float16)}


def assert_refused(path, words):
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message and path.name in message
    assert message.endswith(".") and "\n" not in message


def assert_weights(state):
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(state[key], WEIGHTS[key]) and state[key].dtype == WEIGHTS[key].dtype for key in WEIGHTS)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])  # the name says nothing
def test_reads_safetensors(tmp_path, name):
    save_file(WEIGHTS, tmp_path / name, metadata={"ridfr.kernel": "area"})
    state, metadata = read(tmp_path / name)
    assert_weights(state)
    assert metadata == {"ridfr.kernel": "area"}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "global_step": 7, "note": "x"}])
def test_reads_pickles(tmp_path, new, wrap):
    torch.save(wrap(WEIGHTS), tmp_path / "x.safetensors", _use_new_zipfile_serialization=new)
    state, metadata = read(tmp_path / "x.safetensors")
    assert_weights(state)
    assert metadata == {}


def test_flattens_nested_pickles(tmp_path):
    torch.save({"image_proj": {"norm.bias": WEIGHTS["b"]}, "ip_adapter": {"1.x": WEIGHTS["b"]}}, tmp_path / "x.bin")
    assert read(tmp_path / "x.bin")[0].keys() == {"image_proj.norm.bias", "ip_adapter.1.x"}


def test_missing_file(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "does not exist")


@pytest.mark.parametrize("keep", [0, 5, 30, -1, -20])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(path, "download it again")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.9])
def test_truncated_pickle(tmp_path, new, fraction):
    path = tmp_path / "x.bin"
    torch.save({f"w{i}": torch.rand(100) for i in range(10)}, path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    assert_refused(path, "download it again")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, save):
    path, target = tmp_path / "x.ckpt", tmp_path / "ran"
    content = {"a": torch.ones(1), "b": Malicious(target)}
    if save == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    assert_refused(path, "holds more than weights")
    assert not target.exists()
    torch.load(path, weights_only=False) if save != "plain pickle" else pickle.loads(path.read_bytes())
    assert target.exists()  # the file did hold code


@pytest.mark.parametrize("text", [b"version https://git-lfs.github.com/spec/v1\noid 00", b"<!doctype html><html>"])
def test_text_in_place_of_weights(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(text)
    assert_refused(path, "neither safetensors nor a PyTorch file")


def test_a_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "holds more than weights")


def test_a_whole_file_that_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("The paging file is too small for this operation to complete. (os error 1455)")

    save_file(WEIGHTS, tmp_path / "x.safetensors")
    monkeypatch.setattr("ridfr_core.checkpoints.safe_open", fails)
    assert_refused(tmp_path / "x.safetensors", "cannot be read (The paging file is too small")


# What is no ordinary file


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices are Unix's")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is a folder"),
        (lambda path: os.mkfifo(path), "is not a file"),  # opening it would wait for a writer
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),  # reading it would never end
        (lambda path: path.symlink_to(path.with_name("none")), "does not exist"),
    ],
    ids=["folder", "pipe", "device", "broken link"],
)
def test_only_ordinary_files_are_opened(tmp_path, make, words):
    make(tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", f"{words}: check the path")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    save_file(WEIGHTS, tmp_path / "x.safetensors")
    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(tmp_path / "x.safetensors", "cannot be read (Permission denied): check its permissions")


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read .*too long"):
        read(tmp_path / ("x" * 300))


# Damaged and strange files


def safetensors(tensors, data=b"", metadata=None):
    """A file from {key: (dtype, shape, start, end)}."""
    header = {k: {"dtype": t, "shape": s, "data_offsets": [a, b]} for k, (t, s, a, b) in tensors.items()}
    header = json.dumps(header | ({} if metadata is None else {"__metadata__": metadata})).encode()
    return struct.pack("<Q", len(header)) + header + data


TWICE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": ("F32", [100], 0, 400)}, bytes(8)),
        safetensors({"a": ("F32", [-1], 0, 4)}, bytes(4)),
        safetensors({"a": ("F32", [0, 2**63], 0, 0)}),
        safetensors({"a": ("F32", [2**40, 2**40], 0, 4)}, bytes(4)),
        safetensors({"a": ("F6_E2M3", [8], 0, 6)}, bytes(6)),
        safetensors({"a": ("F32", [1], 0, 4)}, bytes(4), {"a": 3}),
        safetensors({"a": ("F32", [1], 0, 4)}, bytes(4), ["a"]),
        struct.pack("<Q", 2**40) + b"{" + b" " * 100,
        struct.pack("<Q", 97) + b"{%s,%s}" % (TWICE % (0, 4), TWICE % (4, 8)) + bytes(8),
    ],
    ids=["beyond", "negative", "huge", "overflow", "unknown", "number", "list", "header", "twice"],
)
def test_headers_are_not_believed(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert_refused(tmp_path / "x.safetensors", "is damaged or cut short: download it again")


@pytest.mark.parametrize("content", [{"state_dict": None}, {"state_dict": [1]}, {"state_dict": torch.ones(1)}])
def test_a_wrapper_without_a_dict_in_it(tmp_path, content):
    torch.save(content | {"a": WEIGHTS["b"]}, tmp_path / "x.bin")
    state, _ = read(tmp_path / "x.bin")
    assert "a" in state and kind_of(state) == "unknown"


@pytest.mark.parametrize("content", [None, 3, [torch.ones(1)], torch.ones(1)])
def test_pickles_without_a_dict_are_empty(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    assert read(tmp_path / "x.bin") == ({}, {})


def held_by_itself():
    inner = {"a": torch.ones(1)}
    inner["self"] = inner
    return inner


def nested(levels, twice):
    content = {"a": torch.ones(1)}
    for _ in range(levels):
        content = {"b": content, "a": torch.ones(1)} | ({"c": content} if twice else {})
    return content


@pytest.mark.parametrize("content", [held_by_itself(), nested(100, False), nested(50, True)])
def test_dicts_that_never_end(tmp_path, content):
    """A dict in itself, a hundred levels, and 2^50 ways to one tensor."""
    torch.save(content, tmp_path / "x.bin")
    assert 1 <= len(read(tmp_path / "x.bin")[0]) <= 8


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "x.bin")
    assert_refused(tmp_path / "x.bin", "'x.bin' says that a is larger than what is stored of it")


def test_parts_of_a_tensor_are_read(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"row": whole[1], "column": whole[:, 1], "turned": whole.T}, tmp_path / "x.bin")
    state, _ = read(tmp_path / "x.bin")
    assert torch.equal(state["row"], whole[1]) and torch.equal(state["turned"], whole.T)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    """100 MB of zeros in 98 kB."""
    plain, path = io.BytesIO(), tmp_path / "x.pth"
    torch.save({"a": torch.zeros(25_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert_refused(path, "is compressed, which PyTorch's own files never are")


def test_the_oldest_format_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    assert_refused(tmp_path / "x.pth", "neither safetensors nor a PyTorch file")


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), "quantised"),
        (torch.empty(2, 2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
    ],
)
def test_tensors_of_another_kind(tmp_path, tensor, words):
    torch.save({"w": tensor}, tmp_path / "x.bin")
    assert_refused(tmp_path / "x.bin", f"'x.bin' holds w as a {words}" if words != "meta" else "missing (meta) tensor")


def test_parameters_lose_their_gradients(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.bin")
    assert not read(tmp_path / "x.bin")[0]["w"].requires_grad


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_that_are_none(tmp_path, save, number, dtype):
    weight = torch.zeros(1000, dtype=torch.float64)
    weight[777] = number
    weight = weight.to(dtype)
    if weight.float().isfinite().all():
        pytest.skip("float8_e4m3fn has no infinity")
    save({"good": torch.ones(3), "bad.weight": weight}, tmp_path / "x.bin")
    assert_refused(tmp_path / "x.bin", "'x.bin' holds NaN or infinite numbers in bad.weight")
    assert read(tmp_path / "x.bin", "meta")[0].keys() == {"good", "bad.weight"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_and_whole_numbers_are_no_false_alarm(tmp_path, dtype):
    """Whose sum is infinite."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    weights = {
        "a": torch.full((100,), largest, dtype=dtype),
        "none": torch.zeros(0, dtype=dtype),
        "one": torch.tensor(1, dtype=dtype),
        "whole": torch.arange(3),
        "yes": torch.tensor([True]),
    }
    save_file(weights, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors")[0].keys() == weights.keys()


def test_what_a_file_says_is_cut_to_a_line(tmp_path):
    assert brief("a\nb\x1b[31m\ud800c  d") == "a b [31m c d"
    assert brief("x" * 10**6) == "x" * 80 + "..."
    torch.save({"w\n" * 100: torch.tensor(float("nan"))}, tmp_path / "x.bin")
    assert_refused(tmp_path / "x.bin", "in w w w")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_have_fractions(dtype):
    with pytest.raises(CheckpointError, match="'x' stores w as .*, but the weights of a LoRA .*float32 or float16"):
        check_tensors({"w": torch.ones(2).to(dtype)}, {"w": torch.ones(2)}, "lora", "x")


# Writing


def test_two_who_write_at_once(tmp_path):
    """The file is always one or the other, and nothing else stays."""
    path = tmp_path / "x.safetensors"

    def repeat(number):
        for _ in range(30):
            write({"w": torch.full((50_000,), number)}, path)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(repeat, number) for number in (1.0, 2.0)]
        while not all(writer.done() for writer in writers):
            if path.exists():
                assert read(path)[0]["w"].unique().tolist() in ([1.0], [2.0])
    assert [writer.exception() for writer in writers] == [None, None]
    assert list(tmp_path.iterdir()) == [path] and len(load_file(path)) == 1


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.safetensors", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written .*: check the folder and the free space"):
            write(WEIGHTS, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def tensors(*keys, shape=(4, 4)):
    return {key: torch.zeros(shape) for key in keys}


def controlnet(channels, prefix="", hint=False):
    state = tensors(prefix + "zero_convs.0.0.weight") | tensors(
        prefix + "input_blocks.0.0.weight", shape=(8, channels, 3, 3)
    )
    return state | (tensors(prefix + "input_hint_block.0.weight") if hint else {})


EXAMPLES = [
    (
        "identity-adapter",
        tensors("image_proj.perceiver_resampler.proj_in.weight", "ip_adapter.0.to_q_lora.up.weight"),
    ),
    ("identity-adapter", tensors("image_proj.latents", "ip_adapter.1.to_k_ip.weight")),
    ("identity-adapter", tensors("image_proj.proj.2.weight", "image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight")),
    ("ip-adapter", tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    ("ip-adapter", tensors("image_proj.proj.2.weight", "image_proj.proj.3.weight", "ip_adapter.1.to_k_ip.weight")),
    ("recogniser", tensors("stem.weight", "features.scale", "blocks.0.conv1.weight")),
    ("content-controlnet", controlnet(7)),
    ("content-controlnet", controlnet(7, "control_model.")),
    (
        "content-controlnet",
        tensors("controlnet_down_blocks.0.weight") | tensors("conv_in.weight", shape=(8, 7, 3, 3)),
    ),
    ("controlnet", controlnet(4, hint=True)),
    ("content-controlnet", controlnet(8)),
    ("controlnet", controlnet(4)),
    ("sd-checkpoint", tensors("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.conv.weight")),
    ("lora", tensors("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight")),
    ("lora", tensors("unet.x.attn1.processor.to_q_lora.down.weight")),
    ("lora", tensors("unet.x.lora_A.weight")),
    ("unknown", tensors("conv1.weight")),
    ("controlnet", controlnet(7) | tensors("input_blocks.0.0.weight", shape=(4,))),
    ("controlnet", controlnet(7) | tensors("input_blocks.0.0.weight", shape=())),
    ("unknown", {}),
]


@pytest.mark.parametrize(("kind", "state"), EXAMPLES)
def test_kind_is_told_by_content(kind, state):
    assert kind_of(state) == kind


@pytest.mark.parametrize("wanted", ["identity-adapter", "content-controlnet"])
@pytest.mark.parametrize(("kind", "state"), EXAMPLES)
def test_expect_says_what_it_is_and_what_it_should_be(wanted, kind, state):
    if kind == wanted:
        return expect(state, wanted, "x.bin")
    with pytest.raises(CheckpointError) as caught:
        expect(state, wanted, "x.bin")
    message = str(caught.value)
    assert "x.bin" in message and KINDS[kind] in message and KINDS[wanted] in message


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_names_and_shapes_without_data(tmp_path, save):
    save(WEIGHTS, tmp_path / "x.safetensors")
    state, _ = read(tmp_path / "x.safetensors", "meta")
    assert {key: (tensor.shape, tensor.is_meta) for key, tensor in state.items()} == {
        key: (tensor.shape, True) for key, tensor in WEIGHTS.items()
    }
