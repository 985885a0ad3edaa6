"""benchmarks/README.md, written from the JSON files beside it."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = """# Benchmark

`make bench` writes this file. The networks have full width and random weights.
"""
IDENTITY = """A FaceID-PlusV2 adapter and a content ControlNet; start noise, prompt and weights are the same on both
sides. Each figure is the median of runs that took turns in one process, so the ratios hold even where the machine was
busy; the seconds don't.
"""
GUIDANCE = """A guided step over a plain one; *face found again*: one that begins with the search for it, every fifth by
default. The detector's own time is not in it."""
FACES = """A detector on an input of 640x640; *search*: a photo of 1280x886 shrunk to that, and the outputs read, here
and by insightface; the recogniser on one crop. Medians of runs that took turns in one process, so the ratios hold
better than the times.
"""


def write_table(folder: Path) -> None:
    """Render the results in `folder`, as far as they are there."""
    sections = (("cpu.json", cpu, "Processor"), ("gpu.json", gpu, "NVIDIA GPU"),
                ("guidance_sd15_cpu.json", guidance, "ID-preserving sampling, SD1.5, processor"),
                ("guidance_sdxl_cpu.json", guidance, "ID-preserving sampling, SDXL, processor"),
                ("guidance_sd15_gpu.json", guidance, "ID-preserving sampling, SD1.5, NVIDIA GPU"),
                ("guidance_sdxl_gpu.json", guidance, "ID-preserving sampling, SDXL, NVIDIA GPU"),
                ("training.json", training, "Training"),
                ("faces_cpu.json", faces, "Face networks, processor"))
    parts = [HEAD]
    for name, render, title in sections:
        file = folder / name
        if file.exists():
            parts += [f"## {title}\n", render(json.loads(file.read_text()))]
        elif name == "gpu.json":
            parts += [f"## {title}\n", "Not run yet: no such GPU was to be had. `make bench` on a machine with CUDA "
                      "fills this in.\n"]
    (folder / "README.md").write_text("\n".join(parts))


def cpu(results: dict) -> str:
    case, step, batch = results["case"], results["seconds_per_step"], results["batch"]
    rows = [
        ("time per step against the same graph without the identity", f"{results['overhead']:+.1%}", "at most +3 %"),
        ("share of a step that the identity's attention takes", f"{results['attention_share']:.1%}", "at most 3 %"),
        ("time per step against diffusers' pipeline", f"{results['ratio_to_diffusers']:.2f}", "at most 0.90"),
        ("K' and V' kept per person (fp32, 4 tokens, and nobody's)", f"{results['bytes_per_person'] / 1e6:.2f} MB",
         "under 1 MB"),
        *((f"time per person, {people} in a batch, against one alone", f"{seconds / batch['1']:.2f}", "at most 1")
          for people, seconds in batch.items() if people != "1"),
        ("difference of the latents from diffusers' (relative RMS)", f"{results['difference']:.0e}", "the same parts"),
    ]
    return "\n".join([
        heading(results), IDENTITY,
        f"SD1.5, {case['size']} pixels, {case['dtype']}. Processor seconds per step: plain {step['plain']:.2f}, with "
        f"identity {step['ours']:.2f}, diffusers {step['diffusers']:.2f}.\n",
        "| what | measured | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), "",
    ])


def gpu(results: dict) -> str:
    rows = ["| case | people | compiled | images/s | peak | against plain | against diffusers |",
            "|---|---|---|---|---|---|---|"]
    for r in results["cases"]:
        case = r["case"]
        name = f"{case['base']} {case['size']} px, {case['steps']} steps, {case['dtype']}"
        name += "" if case["content"] else ", no content ControlNet"
        rate, peak = r["images_per_second"]["ours"], r["peak_bytes"]["ours"] / 1e9
        rows.append(f"| {name} | {r['people']} | {'yes' if r['compiled'] else 'no'} | {rate:.2f} | {peak:.1f} GB "
                    f"| {r['overhead']:+.1%} | {r['ratio_to_diffusers']:.2f} |")
    return "\n".join([heading(results), IDENTITY, *rows, ""])


def guidance(results: dict) -> str:
    rows = ["| decode | iterations | face found again | step, at CFG 1 | step, at CFG 2 | memory above plain |",
            "|---|---|---|---|---|---|"]
    for one in results["variants"]:
        ratio, search, memory = one["ratio"], "yes" if one["search"] else "no", one["bytes_above_plain"]
        rows.append(f"| {one['mode']} | {one['iterations']} | {search} | {ratio['cfg 1']:.2f} | {ratio['cfg 2']:.2f} "
                    f"| {gibibytes(memory and memory / 2**30)} |")
    runs = results["repeats"]
    how = f"Medians of {runs} runs that took turns in one process." if runs > 1 else "One run of each, in one process."
    return "\n".join([heading(results), f"{results['size']} pixels, {results['dtype']}. {GUIDANCE} {how}\n", *rows, ""])


def gibibytes(count: float | None) -> str:
    return "not measured" if count is None else f"{count:.2f} GiB"


def training(results: dict) -> str:
    rows = [f"| {name} | {one['steps']} | {one['seconds_per_step']:.2f} | {gibibytes(one['peak_memory_gib'])} |"
            for name, one in ((name, results[name]) for name in ("content", "align"))]
    return "\n".join([
        heading(results),
        f"SD1.5 of random weights and widths {results['widths']}, {results['resolution']} pixels, batch "
        f"{results['batch']}, stopped halfway and resumed (`make bench ARGS=\"training --work FOLDER\"`). The resumed "
        "content stage's weights differ from an undisturbed run's by "
        f"{results['difference_from_undisturbed']:g} at most.\n",
        "| stage | steps | seconds per step | peak memory |", "|---|---|---|---|", *rows, "",
    ])


def faces(results: dict) -> str:
    rows = [f"| {row['what']} | {1e3 * row['torch']:.1f} ms | {1e3 * row['onnxruntime']:.1f} ms | {row['ratio']:.2f} |"
            for row in results["rows"]]
    return "\n".join([
        heading(results),
        FACES,
        "| what | torch | onnxruntime | ratio |", "|---|---|---|---|", *rows, "",
    ])


def heading(results: dict) -> str:
    parts = [results["date"], results["gpu"] or results["machine"], f"torch {results['torch']}",
             f"{results['threads']} thread(s)", results["note"]]
    return ", ".join(part for part in parts if part) + ".\n"
