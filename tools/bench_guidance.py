"""What ID-preserving sampling costs: guided step over plain step, and the memory above plain sampling."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from .bench import gpu_time, machine, process_time
from .bench_report import write_table
from .bench_sides import SD15, SDXL, Case, Inputs, Ours, build, randomised, start_comfyui
from .cache import CHECKOUT
from .steps import say

VARIANTS = (("face", 1), ("face", 2), ("face", 4), ("face, checkpointed", 1), ("face, checkpointed, bf16", 1),
            ("whole picture", 1))
CFG = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_guidance", description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="of the SD1.5 picture, in pixels (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the reader must know of the machine, as that it was busy")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    pack = start_comfyui(options.tree, [] if cuda else ["--cpu"])
    cases = [Case("sd15", SD15, options.size, 1, torch.float16 if cuda else torch.float32)]
    if cuda:
        cases.append(Case("sdxl", SDXL, 1024, 1, torch.float16))
    with torch.inference_mode():
        results = [measured(pack, case, options.repeats, cuda) for case in cases]
    file = CHECKOUT / "benchmarks" / ("guidance_gpu.json" if cuda else "guidance_cpu.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(machine(options.note) | {"cases": results}, indent=1) + "\n")
    write_table(file.parent)
    say(f"wrote {file} and {file.parent / 'README.md'}")


def measured(pack: ModuleType, case: Case, repeats: int, cuda: bool) -> dict:
    """The variants of one base model, at one step of Euler with CFG and, on SD1.5, the content ControlNet."""
    ours, _ = build(pack, case, "cuda" if cuda else "cpu")
    run, clock = sampler(ours, Inputs(case, 1)), gpu_time if cuda else process_time
    guidance = Guidance(pack, case)
    with peak(cuda) as plain_peak:
        run(ours.model, CFG)
    say(f"{case.base}: plain step at CFG 1")
    plain = {1.0: median_of(lambda: timed(lambda: run(ours.model, 1.0), clock), repeats)}
    results = []
    for mode, iterations in VARIANTS:
        say(f"{case.base}: {mode}, {iterations} iteration(s)")
        times: dict[str, list[float]] = {"plain": [], "guided": []}
        with peak(cuda) as guided_peak:
            for _ in range(repeats):
                run(guidance.install(ours.model, mode, iterations, clock, times), CFG)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        plain[CFG] = seconds["plain"]
        extra = seconds["guided"] - seconds["plain"]
        results.append({
            "mode": mode, "iterations": iterations, "seconds": times,
            "ratio": {f"cfg {cfg:g}": 1 + extra / value for cfg, value in plain.items()},
            "bytes_above_plain": guided_peak.bytes - plain_peak.bytes,
        })
        say(f"{results[-1]['ratio']}, {results[-1]['bytes_above_plain'] / 2**30:.2f} GiB above plain")
    return {"base": case.base, "size": case.size, "dtype": str(case.dtype), "variants": results}


def sampler(ours: Ours, inputs: Inputs) -> Callable:
    """run(model, cfg): one step of Euler."""
    import comfy.sample

    from nodes import ControlNetApplyAdvanced

    size = {"width": ours.case.size, "height": ours.case.size}
    positive = negative = [[inputs.prompt, {"pooled_output": inputs.pooled, **size}]]
    if ours.control is not None:
        positive, negative = ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, ours.control, inputs.lq.movedim(1, -1), 1.0, 0.0, 1.0)

    def run(model, cfg: float):
        zeros = torch.zeros_like(inputs.noise)
        return comfy.sample.sample(model, inputs.noise, 1, cfg, "euler", "normal", positive, negative, zeros,
                                   disable_pbar=True)

    return run


class Guidance:
    """The node's guidance with a full-width VAE decoder and ArcFace R50 of random weights."""

    def __init__(self, pack: ModuleType, case: Case):
        import comfy.sd
        from diffusers import AutoencoderKL
        from server import PromptServer

        PromptServer.instance = SimpleNamespace(send_progress_text=lambda text, node: None)
        core, self.module = pack.ridfr_core, pack.nodes.guided_run
        levels = (128, 256, 512, 512)
        vae = AutoencoderKL(block_out_channels=levels, layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        self.vae = comfy.sd.VAE(sd=core.layouts.vae_to_ldm(randomised(vae).state_dict()))
        recogniser = randomised(core.recognition.IResNet())
        face_model = core.face_model.FaceModel("random", None, recogniser, "")
        self.face_model = pack.nodes.managed.ManagedFaceModel(face_model, pack.nodes.managed.managed(recogniser))
        landmarks = core.faces.usual_place(case.size, case.size)
        sight = core.guided_face.Sight(torch.rand(3, case.size, case.size), landmarks)
        references = torch.nn.functional.normalize(torch.randn(1, 512), dim=1)
        self.subject = self.module.Subject(sight, references)

    def install(self, model, mode: str, iterations: int, clock: Callable[[], float], times: dict[str, list[float]]):
        """The guided model, which notes the time of each prediction without and with guidance."""
        from comfy.patcher_extension import WrappersMP

        def noting(name: str) -> Callable:
            def predict(executor, *args, **kw):
                began = clock()
                result = executor(*args, **kw)
                times[name].append(clock() - began)
                return result
            return predict

        settings = self.module.Settings(0.1, True, iterations, 0.0, 1.0, 1.0, mode, 0, "")
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench outside", noting("guided"))
        plan = self.module.GuidedSampling(self.vae, self.face_model, [self.subject], settings, self.module.Record())
        model = plan.install(model)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench inside", noting("plain"))
        return model


class peak:
    """Within it, the most memory in use is watched: the GPU's, or on Linux this process's; 0 where neither can be."""

    def __init__(self, cuda: bool):
        self.cuda, self.bytes = cuda, 0

    def __enter__(self) -> peak:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")  # the high-water mark begins anew
        return self

    def __exit__(self, *_) -> None:
        status = Path("/proc/self/status")
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        elif status.exists():
            self.bytes = next(1024 * int(line.split()[1]) for line in status.read_text().splitlines()
                              if line.startswith("VmHWM"))


def timed(function: Callable, clock: Callable[[], float]) -> float:
    began = clock()
    function()
    return clock() - began


def median_of(measure: Callable[[], float], repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


if __name__ == "__main__":
    main()
