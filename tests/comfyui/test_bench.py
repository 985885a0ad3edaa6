"""The benchmark's two sides draw the same pictures, and no step of a run waits for the host. Nothing is timed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tools import bench, bench_guidance
from tools.bench_report import write_table
from tools.bench_sides import SDXL, Case, Inputs, build

aten = torch.ops.aten
NARROW = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 8}
CASES = {
    "sd15": Case("sd15", NARROW, 64, 2),
    "sdxl": Case("sdxl", SDXL | {"block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4),
                                 "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 64}, 64, 2),
}

pytestmark = pytest.mark.usefixtures("inference_mode")


class HostReads(TorchDispatchMode):
    """Notes what makes the host wait for a device: values read back, sizes that depend on values, copies to the CPU."""

    READS = (aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args[:1], out) if isinstance(x, torch.Tensor)]
        to_cpu = len(tensors) == 2 and tensors[0].device.type != "cpu" and tensors[1].device.type == "cpu"
        if func.overloadpacket in self.READS or to_cpu:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("name", CASES)
def test_both_sides_draw_the_same(pack, name):
    case = CASES[name]
    ours, theirs = build(pack, case, "cpu")
    inputs = Inputs(case, 1)
    latent = ours.sampler(inputs, identity=True)()
    scale = ours.model.model.latent_format.scale_factor
    assert bench.relative_rms(latent, theirs.sampler(inputs)() / scale) < 1e-4
    assert bench.relative_rms(latent, ours.sampler(inputs, identity=False)()) > 0.01, "the identity has no effect"


def test_the_results_become_a_table(pack, tmp_path):
    results = bench.on_cpu(pack, CASES["sd15"], repeats=2)
    assert results["difference"] < 1e-4 and set(results["batch"]) == {"1", "2", "4", "8"}
    (tmp_path / "cpu.json").write_text(json.dumps(bench.machine("a note") | results))
    write_table(tmp_path)
    table = (tmp_path / "README.md").read_text()
    assert "a note" in table and f"{results['overhead']:+.1%}" in table and "Not run yet" in table


@pytest.mark.slow
def test_the_cost_of_guidance_becomes_a_table(pack, shown, tmp_path, monkeypatch):
    done, run = [], pack.nodes.guided_run

    def noting(name, function):
        return lambda *args: (done.append(name), function(*args))[1]

    for name in ("guide", "look_again"):
        monkeypatch.setattr(run, name, noting(name, getattr(run, name)))
    variants = [("face", 1, False), ("face", 1, True)]
    result = bench_guidance.measured(pack, CASES["sd15"], variants, repeats=1, cuda=False)
    assert done == ["guide", "look_again", "guide"]
    (tmp_path / "guidance_sd15_cpu.json").write_text(json.dumps(bench.machine("a note") | result))
    write_table(tmp_path)
    assert "| face | 1 | yes |" in (tmp_path / "README.md").read_text()


def test_the_tables_are_the_results(tmp_path):
    """benchmarks/README.md is what is made of the files beside it."""
    for file in bench.FOLDER.glob("*.json"):
        shutil.copy(file, tmp_path)
    write_table(tmp_path)
    assert (tmp_path / "README.md").read_text() == (bench.FOLDER / "README.md").read_text()


@pytest.mark.parametrize("base, limit", [("SD1.5", 1e6), ("SDXL", 6e6)])
def test_little_stays_in_memory_per_person(pack, base, limit):
    """K' and V' at full width, fp32, four tokens, with nobody's."""
    widths = {"SD1.5": (320, 320, 640, 640, 1280, 1280) + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,),
              "SDXL": (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10}[base]
    adapter = pack.ridfr_core.adapter.IdentityAdapter(widths, 64, 64)
    pairs = adapter.keys_values(torch.zeros(2, 4, 64))
    assert sum(x.numel() * x.element_size() for pair in pairs for x in pair) < limit


def test_no_step_reads_from_the_device(pack):
    """The UNet with patches that act in a part of the run, and the content ControlNet's network, in the sampler."""
    case = replace(CASES["sd15"], steps=3)
    ours, _ = build(pack, case, "cpu")
    reads, calls = HostReads(), []

    def watched(name, run):
        def call(*args, **kwargs):
            calls.append(name)
            with reads:
                return run(*args, **kwargs)
        return call

    net = ours.control.control_model
    net.forward = watched("content", net.forward)
    apply = ours.model.model.diffusion_model.forward
    ours.model.model.diffusion_model.forward = watched("unet", apply)
    ours.sampler(Inputs(case, 2), identity=True)()
    assert calls == ["content", "unet"] * 3 and reads.found == []
    with reads:
        torch.ones(1).item()
    assert reads.found, "nothing is ever noted"


@pytest.mark.parametrize("sigmas", [None, (7.0, 0.5)])
def test_the_patch_never_leaves_a_gpu(pack, sigmas):
    """On tensors of a pretended GPU, which have no values: reading one raises."""
    reads = HostReads()
    with FakeTensorMode():
        q, k, v = (torch.empty(4, n, 32, device="cuda") for n in (16, 7, 7))
        keys = torch.empty(3, 4, 32, device="cuda")
        patch = pack.nodes.id_attention.IdentityAttention(keys, keys, 1.0, sigmas, previous=lambda q, *_: q)
        options = {"n_heads": 2, "attn_precision": None, "cond_or_uncond": [0, 1],
                   "sigmas": torch.empty(1, device="cuda")}
        with reads:
            out = patch(q, k, v, options)
        assert out.device.type == "cuda" and out.shape == q.shape and reads.found == []
        with pytest.raises(DataDependentOutputException):
            options["sigmas"].item()
