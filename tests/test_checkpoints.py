import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core.checkpoints import KINDS, CheckpointError, expect, kind_of, read

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
