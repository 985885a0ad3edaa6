"""The benchmark: what the identity costs per step, against the same graph without it and against diffusers.

Every figure that matters is a ratio of medians of runs that took turns in one process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from .bench_report import write_table
from .bench_sides import SD15, SDXL, Case, Inputs, Ours, Theirs, build, start_comfyui
from .cache import CHECKOUT
from .steps import say

FOLDER = CHECKOUT / "benchmarks"
CPU = Case("sd15", SD15, 256, 2)
GPU = (Case("sd15", SD15, 512, 20), Case("sdxl", SDXL, 1024, 50))
PEOPLE = (1, 2, 4, 8)


def main() -> None:
    options = arguments("identity", __doc__).parse_args()
    cuda = torch.cuda.is_available()
    pack = started(options)
    with torch.inference_mode():
        if cuda:
            results = {"cases": [result for case in GPU for result in on_gpu(pack, case, options.repeats)]}
        else:
            results = on_cpu(pack, CPU, options.repeats)
    save(options, "gpu.json" if cuda else "cpu.json", results)


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """What the benchmarks of identity and guidance are told."""
    parser = argparse.ArgumentParser(prog=f"ridfr bench {name}", description=description)
    parser.add_argument("--tree", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each runs every variant (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the results go (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the reader must know of the machine, as that it was busy")
    parser.add_argument("--flag", action="append", default=[], help="for ComfyUI, --flag=--use-pytorch-cross-attention")
    return parser


def started(options: argparse.Namespace) -> ModuleType:
    """The pack in ComfyUI, in this process."""
    return start_comfyui(options.tree, [*([] if torch.cuda.is_available() else ["--cpu"]), *options.flag])


def save(options: argparse.Namespace, name: str, results: dict) -> None:
    results = machine(", ".join(filter(None, [*options.flag, options.note]))) | results
    options.folder.mkdir(exist_ok=True)
    (options.folder / name).write_text(json.dumps(results, indent=1) + "\n")
    write_table(options.folder)
    say(f"wrote {options.folder / name} and {options.folder / 'README.md'}")


def machine(note: str) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "gpu": gpu, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "note": note}


def on_cpu(pack, case: Case, repeats: int) -> dict:
    ours, theirs = build(pack, case, "cpu")
    inputs = Inputs(case, 1)
    variants = {"plain": ours.sampler(inputs, identity=False), "ours": ours.sampler(inputs, identity=True),
                "diffusers": theirs.sampler(inputs)}
    say("comparing with diffusers: the same latent must come out")
    difference = relative_rms(variants["ours"](), variants["diffusers"]() / ours.model.model.latent_format.scale_factor)
    seconds = taking_turns(variants, repeats, process_time)
    step = {name: statistics.median(times) / case.steps for name, times in seconds.items()}
    return {
        "case": described(case),
        "difference": difference,
        "seconds": seconds,
        "seconds_per_step": step,
        "overhead": step["ours"] / step["plain"] - 1,
        "ratio_to_diffusers": step["ours"] / step["diffusers"],
        "attention_share": attention_share(pack, variants["ours"]),
        "bytes_per_person": key_value_bytes(ours),
        "batch": batch_scaling(ours, max(1, repeats // 2)),
    }


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float().to(a.device)).norm() / b.float().norm()).item()


def taking_turns(variants: dict[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each run: in every round each variant runs once, the order turning round (ABC, CBA, ABC, ...)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name in list(variants) if number % 2 == 0 else reversed(variants):
            began = clock()
            variants[name]()
            seconds[name].append(clock() - began)
            say(f"round {number + 1} of {repeats}, {name}: {seconds[name][-1]:.2f} s")
    return seconds


def attention_share(pack, variant: Callable) -> float:
    """The part of a run's time that the identity's attention takes: the overhead itself, which no other load blurs."""
    patches, spent = pack.nodes.id_attention, []
    attend = patches.decoupled_attention

    def timed(*args):
        began = process_time()
        out = attend(*args)
        spent.append(process_time() - began)
        return out

    patches.decoupled_attention = timed
    began = process_time()
    variant()
    patches.decoupled_attention = attend
    return sum(spent) / (process_time() - began)


def process_time() -> float:
    """This process's own processor time: what else runs on the machine does not count."""
    return time.process_time()


def gpu_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def key_value_bytes(ours: Ours) -> float:
    """What stays in memory while sampling, per person; the share of "nobody" for the negative prompt is counted in."""
    pairs = ours.keys_values(Inputs(ours.case, 1))
    return sum(x.numel() * x.element_size() for pair in pairs for x in pair)


def batch_scaling(ours: Ours, repeats: int) -> dict[int, float]:
    """People in one batch -> seconds per person and step."""
    one_step = replace(ours.case, steps=1)
    ours.case = one_step
    variants = {str(people): ours.sampler(Inputs(one_step, people), identity=True) for people in PEOPLE}
    seconds = taking_turns(variants, repeats, process_time)
    return {people: min(times) / int(people) for people, times in seconds.items()}


def on_gpu(pack, case: Case, repeats: int):
    """Every precision, batch size and compilation of a case, each a result."""
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = build(pack, replace(case, dtype=dtype), "cuda")
        for compiled in (False, True):
            for people in (1, 8):
                yield gpu_result(ours, theirs, people, compiled, repeats)


def gpu_result(ours: Ours, theirs: Theirs, people: int, compiled: bool, repeats: int) -> dict:
    inputs = Inputs(ours.case, people)
    variants = {"plain": ours.sampler(inputs, False, compiled), "ours": ours.sampler(inputs, True, compiled),
                "diffusers": theirs.sampler(inputs, compiled)}
    peak = {}
    for name, variant in variants.items():  # the first run compiles and loads
        variant()
        torch.cuda.reset_peak_memory_stats()
        variant()
        peak[name] = torch.cuda.max_memory_allocated()
    seconds = {name: statistics.median(times) for name, times in taking_turns(variants, repeats, gpu_time).items()}
    return {
        "case": described(ours.case),
        "people": people,
        "compiled": compiled,
        "images_per_second": {name: people / value for name, value in seconds.items()},
        "peak_bytes": peak,
        "overhead": seconds["ours"] / seconds["plain"] - 1,
        "ratio_to_diffusers": seconds["ours"] / seconds["diffusers"],
    }


def described(case: Case) -> dict:
    return {"base": case.base, "size": case.size, "steps": case.steps, "dtype": str(case.dtype).removeprefix("torch."),
            "content": case.has_content}


if __name__ == "__main__":
    main()
