"""Whole training runs on the nano networks: interrupted, in two processes, broken, and what they write."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import PropertyMock

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ridfr_core.checkpoints import expect, read
from ridfr_core.content import ContentSpec
from ridfr_core.nano import WEIGHTS
from ridfr_core.training import trainer
from ridfr_core.training.base import load_base
from ridfr_core.training.networks import build_adapter
from ridfr_core.training.portrait_data import export_portraits
from ridfr_core.training.run import load_adapter, load_content, run
from ridfr_core.training.settings import TrainingError, read_settings
from ridfr_core.training.stages import ContentStage
from ridfr_core.training.trainer import Trainer, accelerator_for

SMALL = ["base=nano", "resolution=64", "steps=4", "batch=2", "warmup=1", "workers=0", "save_every=2",
         "validate_every=0", "validation_images=2", "precision=fp32",
         "gradient_checkpointing=false"]
WITH_REFERENCES = ["adapter=nano", "content=nano", "face_model=nano", "clip_vision=nano", "reference_sizes=[64, 32]",
                   "validation_people=1"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each run is a process of its own for users; here accelerate must forget the one before."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state() if state is not AcceleratorState else state._reset_state(True)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Pictures, which is all that the content stage needs."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    folder.mkdir()
    for seed in range(6):
        pixels = numpy.random.default_rng(seed).integers(0, 255, (64, 64, 3), numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "people"
    export_portraits(folder, people=3, views=2)
    return folder


def arguments(data, out, *more):
    return [f"data={data}", f"out={out}", *SMALL, *more]


def train(stage, data, out, *more):
    return run(stage, read_settings(stage, None, arguments(data, out, *more)))


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def python(*command):
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_run_that_is_killed_ends_where_an_undisturbed_one_does(noise, tmp_path):
    more = ("steps=8", "accumulate=2", "schedule=cosine", "precision=bf16", f"cache={tmp_path / 'cache'}")
    victim = python("ridfr_core.cli", "train", "content", *arguments(noise, tmp_path / "killed", *more))
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed" / "checkpoints" / "0000002").exists() and victim.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim.kill()
    assert victim.wait() != 0, victim.stdout.read()  # 0: it had come to its end before
    whole = train("content", noise, tmp_path / "whole", *more)
    resumed = train("content", noise, tmp_path / "killed", *more)
    last, again = rows(tmp_path / "whole")[-1], rows(tmp_path / "killed")[-1]
    assert (last["step"], last["loss"], last["lr"]) == (again["step"], again["loss"], again["lr"])
    one, other = load_file(whole), load_file(resumed)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == ["0000006", "0000008"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Also where a step has more digits than the others' names."""
    for step in (9_999_000, 10_000_000, 500):
        (tmp_path / "checkpoints" / f"{step:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    found = Trainer._checkpoints(SimpleNamespace(folder=tmp_path))
    assert [path.name for path in found] == ["0000500", "9999000", "10000000"]


def test_a_run_goes_on_in_other_parts_of_the_batch(noise, tmp_path):
    train("content", noise, tmp_path / "changed", "lr=1e-2", "steps=1")
    for name in ("changed", "whole"):
        train("content", noise, tmp_path / name, "lr=1e-2", "steps=3", "accumulate=2")
    changed, whole = rows(tmp_path / "changed")[-1], rows(tmp_path / "whole")[-1]
    for name in ("loss", "gradient"):
        assert changed[name] == pytest.approx(whole[name], rel=1e-3)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(people, tmp_path):
    more = (*WITH_REFERENCES, "lr=1e-2", "steps=3", "batch=4", "save_every=3", f"cache={tmp_path / 'cache'}")
    single = train("align", people, tmp_path / "one", *more)
    both = python("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ridfr_core.cli", "train",
                  "align", *arguments(people, tmp_path / "two", *more))
    output, _ = both.communicate(timeout=1800)
    assert both.returncode == 0, output
    one, two = rows(tmp_path / "one")[-1], rows(tmp_path / "two")[-1]
    for name in ("loss", "diffusion", "alignment", "gradient"):
        assert two[name] == pytest.approx(one[name], rel=1e-2)
    start, one, two = (load_file(path) for path in (WEIGHTS / "content_controlnet.safetensors", single,
                                                    tmp_path / "two" / single.name))
    moved, apart = (sum((other[name].float() - tensor.float()).square().sum() for name, tensor in one.items())
                    for other in (start, two))
    assert apart < 0.01 * moved and moved > 1


def test_what_alignment_writes_is_a_content_controlnet_with_its_history(people, tmp_path):
    path = train("align", people, tmp_path / "align", *WITH_REFERENCES, "steps=2", "validate_every=2", "lr=1e-2",
                 "validation_steps=2", "gradient_checkpointing=true")
    state, metadata = read(path)
    expect(state, "content-controlnet", path.name)
    shipped, spec = load_content("nano", load_base("nano"))
    trained, _ = load_content(path, load_base("nano"))
    assert ContentSpec.from_metadata(metadata) == spec
    assert {key: metadata[f"ridfr.{key}"] for key in ("stage", "steps", "batch", "lambda", "photos")} == {
        "stage": "align", "steps": "2", "batch": "2", "lambda": "1.0", "photos": "4"}
    assert len(metadata["ridfr.data"]) == len(metadata["ridfr.recogniser"]) == 64
    change = (trained.conv_in.weight - shipped.conv_in.weight).abs()
    assert 1e-4 < change.max() < 1
    last = rows(tmp_path / "align")[-1]
    assert last["step"] == 2
    assert {"validation/loss", "validation/alignment", "validation/psnr", "validation/similarity"} <= set(last)
    assert Image.open(tmp_path / "align" / "validation" / "0000002.png").width > 3 * 192
    assert list((tmp_path / "align" / "tensorboard").glob("events*"))


def test_an_adapter_is_trained_from_nothing(people, tmp_path):
    more = (*WITH_REFERENCES[2:5], "steps=2", "lr=1e-2", "validate_every=2")
    path = train("adapter", people, tmp_path / "adapter", *more)
    assert "validation/loss" in rows(tmp_path / "adapter")[-1]
    adapter, lora = load_adapter(path)
    assert len(adapter.channels) == 16 and adapter.needs_clip and lora == {}
    start = build_adapter(load_base("nano").unet, dim=adapter.dim, clip_dim=adapter.clip_dim)
    for layer, first in zip(adapter.ip_adapter.values(), start.ip_adapter.values()):
        assert (layer["to_v_ip"].weight - first["to_v_ip"].weight).abs().max() > 2e-3


def test_latent_concatenation_has_eight_channels(noise, tmp_path):
    path = train("content", noise, tmp_path / "latent", "kind=latent", "steps=1", "save_every=1", "validate_every=1",
                 "validation_steps=2")
    content, spec = load_content(path, load_base("nano"))
    assert content.conv_in.in_channels == 8 and spec.kind == "latent"


def test_a_loss_that_is_no_number_stops_the_run(noise, tmp_path):
    with pytest.raises(TrainingError) as stopped:
        train("content", noise, tmp_path / "nan", "lr=1e30", "steps=9", "save_every=1")
    step, last = re.search(r"The loss is (?:nan|inf) .* at step (\d), with the learning rate 1e\+30; "
                           r"the last good checkpoint is (.*): try a lower lr", str(stopped.value)).groups()
    assert last == str(tmp_path / "nan" / "checkpoints" / f"{int(step):07d}") and os.path.isdir(last)


class Code:
    """What a pickle may hold: something to run when it is loaded."""

    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


def test_code_in_a_checkpoint_never_runs(noise, tmp_path):
    """In place of each file, and under the names that accelerate would unpickle."""
    whole, sign, more = tmp_path / "whole", tmp_path / "code-ran", ("save_every=1",)
    train("content", noise, whole, *more, "steps=2")
    newest = whole / "checkpoints" / "0000002"
    names = {path.name for path in newest.iterdir()}
    assert names == {"tensors.safetensors", "numbers.json"}
    pickled = io.BytesIO()
    torch.save({"step": Code(sign)}, pickled)
    for name in (*names, "custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / "checkpoints" / "0000002" / name).write_bytes(pickled.getvalue())
        train("content", noise, tmp_path / name, *more, "steps=3")
        assert not sign.exists() and rows(tmp_path / name)[-1]["step"] == 3


def spoil(folder, how):
    if how == "empty":
        (folder / "tensors.safetensors").write_bytes(b"")
    elif how == "gone":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "words":
        (folder / "numbers.json").write_text('{"step": "two"}')
    elif how == "nested":
        (folder / "numbers.json").write_text("[" * 100_000)
    else:
        tensors = load_file(folder / "tensors.safetensors")
        name = next(name for name in tensors if name.startswith(how[0]) and tensors[name].ndim)
        tensors[name] = how[1](tensors[name])
        save_file(tensors, folder / "tensors.safetensors")


@pytest.mark.parametrize("how", [
    "empty", "gone", "words", "nested", ("weights", lambda w: w * torch.nan), ("exp_avg.", lambda w: w[None]),
    ("average", lambda w: w.half()),
])
def test_a_broken_checkpoint_is_named_and_the_one_before_goes_on(noise, tmp_path, capsys, how):
    more = ("save_every=1",)
    train("content", noise, tmp_path / "run", *more, "steps=2")
    spoil(tmp_path / "run" / "checkpoints" / "0000002", how)
    capsys.readouterr()
    train("content", noise, tmp_path / "run", *more, "steps=3")
    said = capsys.readouterr().out
    assert re.search(r"The checkpoint \S*0000002 cannot be used: .+\.\nGoing on from \S*0000001\.", said)
    assert rows(tmp_path / "run")[-1]["step"] == 3


def test_a_run_without_a_whole_checkpoint_says_what_to_do(noise, tmp_path):
    train("content", noise, tmp_path / "run", "steps=2")
    spoil(tmp_path / "run" / "checkpoints" / "0000002", "empty")
    with pytest.raises(TrainingError, match=r"No checkpoint in '.*checkpoints' can be used: remove that folder"):
        train("content", noise, tmp_path / "run")
    (tmp_path / "run" / "settings.yaml").write_text("a: [")
    with pytest.raises(TrainingError, match=r"What the run in '.*run' began with is not known, since .*settings.yaml' "
                                            "is not valid YAML"):
        train("content", noise, tmp_path / "run")


def test_an_unwritable_out_is_named(noise, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train("content", noise, tmp_path / "file", f"cache={tmp_path / 'cache'}")


def test_clip_0_is_off_and_learns(noise, tmp_path):
    paths = [train("content", noise, tmp_path / str(clip), "steps=2", "lr=1e-2", f"clip={clip}")
             for clip in (0, 1e9, 1e-30)]
    off, never, always = (load_file(path)["zero_convs.0.0.weight"] for path in paths)
    assert torch.equal(off, never) and not torch.equal(off, always)


@pytest.mark.parametrize("resolution", [64, 72])
def test_any_multiple_of_8_is_validated(noise, tmp_path, resolution):
    for seed in range(4):
        pixels = numpy.random.default_rng(seed).integers(0, 255, (72, 72, 3), numpy.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{seed}.png")
    train("content", tmp_path / "photos", tmp_path / "run", f"resolution={resolution}", "steps=1", "validate_every=1",
          "validation_steps=1")
    assert "validation/psnr" in rows(tmp_path / "run")[-1]


def test_fp16_needs_a_gpu(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="'precision' is fp16, which needs a GPU: use bf16 or fp32"):
        train("content", noise, tmp_path / "run", "precision=fp16")


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_ways_that_cut_networks_into_pieces_are_refused(noise, tmp_path, monkeypatch, way):
    kind = PropertyMock(return_value=SimpleNamespace(value=way))
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind)
    with pytest.raises(TrainingError, match=f"accelerate is configured for {way}, with which these networks cannot be"):
        train("content", noise, tmp_path / "run")


def test_deepspeed_that_is_not_installed_is_a_sentence(noise, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(TrainingError, match="accelerate (cannot start as it is|is) configured"):
        train("content", noise, tmp_path / "run")


def test_accelerates_environment_does_not_overrule_accumulate(noise, tmp_path, monkeypatch):
    expected = train("content", noise, tmp_path / "one", "steps=2", "accumulate=2", "lr=1e-2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    found = train("content", noise, tmp_path / "two", "steps=2", "accumulate=2", "lr=1e-2")
    assert all(torch.equal(tensor, load_file(found)[name]) for name, tensor in load_file(expected).items())


class Slope(nn.Module):
    """Learns 0 by a loss with a gradient that is infinite in some steps. batch: {"infinite": ...}."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": (self.weight.square().sum() * batch["factor"].max())}


@pytest.fixture
def slope(tmp_path):
    """A trainer of Slope, where the draws of the steps 1 and 2 of 6 have an infinite gradient."""
    def trainer(*more, factors=(1, torch.inf, torch.inf, 1, 1, 1), out="slope", scaled=False):
        settings = read_settings("content", None, [*arguments("x", tmp_path / out), "batch=1", "lr=0.1", "warmup=2",
                                                   "ema=0.5", f"steps={len(factors)}", *more])
        (tmp_path / out).mkdir(exist_ok=True)
        draws = [{"factor": torch.tensor(float(factor))} for factor in factors]
        accelerator = accelerator_for(replace(settings, precision="fp32"))
        if scaled:
            accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        return Trainer(accelerator, Slope(), draws, settings, None)
    return trainer


def test_a_step_that_fp16_leaves_out_advances_neither_schedule_nor_average(slope, monkeypatch, tmp_path):
    """With a gradient scaler, as on a GPU; the run goes on from a checkpoint between the two steps left out."""
    monkeypatch.setattr(Trainer, "_stop_if_not_finite", lambda self, found: None)
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    first = slope("precision=fp16", "save_every=1", "keep=9", scaled=True)
    first.train()
    shutil.rmtree(tmp_path / "slope" / "checkpoints" / "0000006")
    for number in (3, 4, 5):
        shutil.rmtree(tmp_path / "slope" / "checkpoints" / f"000000{number}")
    (tmp_path / "slope" / "log.jsonl").unlink()
    one = slope("precision=fp16", scaled=True)
    one.train()
    assert (one.step, one.taken) == (first.step, first.taken) == (6, 4)
    assert one.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    assert one.accelerator.scaler.get_scale() == 2**16 / 4  # halved twice
    lines = (tmp_path / "slope" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert log[0]["gradient"] is None and log[0]["loss"] is None and log[1]["gradient"] > 0
    whole = slope("precision=fp16", factors=(1, 1, 1, 1), out="whole", scaled=True)
    whole.train()
    for again in (first, one):
        assert torch.equal(again.parameters["weight"], whole.parameters["weight"])
        assert torch.equal(again.average.weights["weight"], whole.average.weights["weight"])


class Gone(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, n):
        raise TrainingError("The photos are gone: is the folder still there?")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_drawing_is_a_sentence(workers):
    with pytest.raises(TrainingError) as stopped:
        trainer.drawn(iter(torch.utils.data.DataLoader(Gone(), num_workers=workers)))
    assert str(stopped.value) == "The photos are gone: is the folder still there?"


class Batch:
    """Stands for a tensor that is moved to the device."""

    def __init__(self):
        self.moves = []

    def to(self, device, **how):
        self.moves.append(how)
        return torch.ones(1)


def test_a_batch_moves_without_blocking(slope):
    one, batch = slope(), Batch()
    one._step(iter([{"factor": batch}]))
    assert batch.moves == [{"non_blocking": True}]


@pytest.mark.parametrize("device, fused", [("cuda", True), ("cpu", False)])
def test_the_optimiser_is_fused_on_cuda(tmp_path, monkeypatch, device, fused):
    settings = read_settings("content", None, arguments("x", tmp_path))
    asked = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **how: asked.update(how))
    Trainer(SimpleNamespace(device=torch.device(device), prepare=lambda one: one), Slope(), [], settings, None)
    assert asked["fused"] is fused


def test_the_rate_is_diffusers(tmp_path):
    for schedule, name in (("constant", "constant_with_warmup"), ("cosine", "cosine")):
        settings = read_settings("content", None, ["data=x", "base=nano", "out=y", f"schedule={schedule}", "steps=50",
                                                   "warmup=10", "lr=0.5"])
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
        for step in range(50):
            assert trainer.rate(settings, step) == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()


def test_validation_takes_as_many_photos_at_a_time_as_training(noise, tmp_path, monkeypatch):
    sizes, whole = [], ContentStage.forward

    def forward(self, batch):
        sizes.append(len(batch["hq"]))
        return whole(self, batch)

    monkeypatch.setattr(ContentStage, "forward", forward)
    results = []
    for accumulate in (1, 2):
        out = tmp_path / str(accumulate)
        train("content", noise, out, "steps=1", "validate_every=1", "validation_steps=1", f"accumulate={accumulate}")
        results.append({k: v for k, v in rows(out)[-1].items() if k.startswith("validation/")})
        assert max(sizes) == 2 // accumulate
        sizes.clear()
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_weights_that_half_precision_cannot_hold_are_not_written(noise, tmp_path):
    with pytest.raises(TrainingError, match="content.safetensors' is not written, since .* that half precision cannot"):
        train("content", noise, tmp_path / "run", "steps=2", "lr=1e6")
    assert not (tmp_path / "run" / "content.safetensors").exists()


@pytest.mark.parametrize("key", ["adapter", "content", "face_model", "clip_vision"])
def test_weights_that_are_not_there_are_named_before_any_are_loaded(people, tmp_path, monkeypatch, key):
    monkeypatch.setattr("ridfr_core.training.run.load_base", lambda where: pytest.fail("the base was loaded"))
    with pytest.raises(TrainingError, match=f"'{key}' is 'nowhere', which does not exist: check the path"):
        train("align", people, tmp_path / "run", *WITH_REFERENCES, f"{key}=nowhere")


def test_a_full_disk_leaves_the_checkpoint_before(noise, tmp_path):
    resource, out = pytest.importorskip("resource"), tmp_path / "full"
    train("content", noise, out, "steps=2")
    fresh = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, fresh[1]))  # writing beyond fails as on a full disk
    try:
        with pytest.raises(TrainingError, match="0000004' cannot be written .* What was saved before is still there"):
            train("content", noise, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, fresh)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000002"]
    train("content", noise, out)
    assert rows(out)[-1]["step"] == 4


def test_a_run_does_not_go_on_with_other_settings_or_photos(noise, people, tmp_path):
    train("content", noise, tmp_path / "run", "steps=1", "save_every=1")
    with pytest.raises(TrainingError, match=r"holds a run with other settings \(lr: 0.0001 -> 0.001\)"):
        train("content", noise, tmp_path / "run", "lr=1e-3")
    with pytest.raises(TrainingError, match=r"holds a run with other settings \(photos: .* -> .*\)"):
        train("content", people, tmp_path / "run")
    moved = shutil.copytree(noise, tmp_path / "moved")
    assert train("content", moved, f"{tmp_path / 'run'}/", "steps=1").exists()


def test_other_weights_in_the_same_place_and_another_length_of_a_cosine_are_refused(noise, tmp_path):
    base = shutil.copy(WEIGHTS / "checkpoint.safetensors", tmp_path / "base.safetensors")
    more = (f"base={base}", "schedule=cosine", "save_every=1")
    train("content", noise, tmp_path / "run", *more, "steps=1")
    with pytest.raises(TrainingError, match=r"\(steps: 1 -> 2\)"):
        train("content", noise, tmp_path / "run", *more, "steps=2")
    tensors, metadata = read(base)
    save_file({name: tensor + 0 for name, tensor in tensors.items()}, base, metadata | {"other": "bytes"})
    with pytest.raises(TrainingError, match=r"\(base_sha256: \w{64} -> \w{64}\)"):
        train("content", noise, tmp_path / "run", *more, "steps=1")


def test_a_batch_that_cannot_be_shared_is_refused(noise, tmp_path):
    with pytest.raises(TrainingError, match="batch 2 cannot be shared by 1 processes in 3 parts each"):
        train("content", noise, tmp_path / "run", "accumulate=3")


@pytest.mark.parametrize("setting, message", [
    ("reference_sizes=[128, 64]", "reference_sizes has 128, but the resolution is 64"),
    ("validation_people=3", "Of 3 people 3 cannot be kept apart"),
])
def test_what_cannot_be_is_refused_before_any_network_is_loaded(people, tmp_path, setting, message):
    with pytest.raises(TrainingError, match=message):
        train("align", people, tmp_path / "run", *WITH_REFERENCES, "base=nowhere", setting)
