"""How fast training is at SD1.5's full size, on random weights: a content stage, then Alignment Learning on its result.

`make bench ARGS="training --work FOLDER"` writes `benchmarks/training.json`. FOLDER gets about
15 GB: base, adapter, runs. Each stage is first stopped halfway and goes on from its checkpoint, as a user's run would;
the content stage runs undisturbed, too, and both results are compared. ComfyUI opens what the second stage wrote.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ridfr_core.training.base import load_base
from ridfr_core.training.networks import build_adapter
from ridfr_core.training.portrait_data import export_portraits
from ridfr_core.training.run import run
from ridfr_core.training.settings import read_settings

from .bench import FOLDER, machine
from .bench_guidance import peak
from .bench_report import write_table
from .bench_sides import SD15, start_comfyui
from .steps import say

NANO_CLIP = 128  # width of the nano CLIP's features, which stands for ViT-H here: features are computed ahead


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_training", description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights, portraits and runs")
    parser.add_argument("--steps", type=int, default=20, help="of each stage (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=512, help="of the photos (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="photos per step (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs=4, default=(320, 640, 1280, 1280),
                        help="of the UNet; smaller ones to try it out")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the result goes (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the reader must know of the machine, as that it was busy")
    options = parser.parse_args()
    work, base = options.work, options.work / "base"
    if not (work / "adapter.safetensors").exists():
        say("writing random weights and drawing portraits")
        write_base(base, tuple(options.widths))
        adapter = build_adapter(load_base(str(base)).unet, dim=SD15["cross_attention_dim"], clip_dim=NANO_CLIP)
        save_file(adapter.state_dict(), work / "adapter.safetensors")
        export_portraits(work / "photos", 6, 2, size=options.resolution)
    content, content_result = measure("content", options, [])
    given = [f"content={content}", f"adapter={work / 'adapter.safetensors'}", "face_model=nano", "clip_vision=nano",
             f"reference_sizes=[{options.resolution}, {options.resolution // 8}]", "validation_people=1"]
    aligned, align_result = measure("align", options, given)
    undisturbed = train("content", options, work / "undisturbed", options.steps, [])
    open_in_comfyui(options.tree, aligned)
    result = machine(options.note) | {
        "resolution": options.resolution, "batch": options.batch, "widths": list(options.widths),
        "content": content_result, "align": align_result,
        "difference_from_undisturbed": difference(content, undisturbed),
    }
    options.folder.mkdir(exist_ok=True)
    (options.folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(options.folder)
    say(f"wrote {options.folder / 'training.json'} and {options.folder / 'README.md'}")


def write_base(folder: Path, widths: tuple[int, ...]) -> None:
    """A diffusers folder of SD1.5 with random weights; its text encoder has one layer, for it is only asked once."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=widths, attention_head_dim=8, **SD15)
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae.save_pretrained(folder / "vae")
    text = CLIPTextConfig(hidden_size=SD15["cross_attention_dim"], num_hidden_layers=1, num_attention_heads=12)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule.save_pretrained(folder / "scheduler")


def measure(stage: str, options: argparse.Namespace, more: list[str]) -> tuple[Path, dict]:
    """Train half of the steps, and from the checkpoint the other half, which is timed."""
    out = options.work / stage
    with peak(torch.cuda.is_available()) as used:
        for steps in (options.steps // 2, options.steps):
            path = train(stage, options, out, steps, more)
    first, last = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[-2:])
    seconds = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return path, {"steps": options.steps, "seconds_per_step": round(seconds, 3), "loss": last["loss"],
                  "peak_memory_gib": used.bytes and round(used.bytes / 2**30, 2)}


def train(stage: str, options: argparse.Namespace, out: Path, steps: int, more: list[str]) -> Path:
    gc.collect()  # the run before holds itself in cycles, with all its weights
    return run(stage, read_settings(stage, None, [
        f"data={options.work / 'photos'}", f"base={options.work / 'base'}", f"out={out}", f"steps={steps}",
        f"resolution={options.resolution}", f"batch={options.batch}", f"save_every={options.steps // 2}",
        "validate_every=0", "warmup=5", "keep=1", *more]))


def difference(one: Path, other: Path) -> float:
    """The largest between the tensors of two files; 0 where they are equal to the bit."""
    tensors = load_file(other)
    return max((tensor.float() - tensors[name].float()).abs().max().item() for name, tensor in load_file(one).items())


def open_in_comfyui(tree: Path, file: Path) -> None:
    """As the node Load Content ControlNet does; it raises an error if anything is missing or of another shape."""
    pack = start_comfyui(tree, [] if torch.cuda.is_available() else ["--cpu"])
    core = pack.ridfr_core
    state, spec = core.content.understand(*core.checkpoints.read(file), file.name)
    pack.nodes.content_control.content_control(state, spec, file.name)


if __name__ == "__main__":
    main()
