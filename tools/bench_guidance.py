"""What ID-preserving sampling costs: guided step over plain step, and the memory above plain sampling."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from .bench import arguments, gpu_time, process_time, save, started
from .bench_sides import SD15, SDXL, Case, Inputs, Ours, build, randomised
from .steps import say

CASES = {"sd15": Case("sd15", SD15, 512, 1), "sdxl": Case("sdxl", SDXL, 1024, 1)}
CFG = 2.0
# decode mode, iterations, whether the face is found again
VARIANTS = (("face", 1, False), ("face", 2, False), ("face", 4, False), ("face, checkpointed", 1, False),
            ("face, checkpointed, bf16", 1, False), ("whole picture", 1, False), ("face", 1, True))


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = arguments("guidance", __doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--base", nargs="+", choices=CASES, default=list(CASES) if cuda else ["sd15"],
                        help="on a processor sd15 alone by default: SDXL takes 12 GiB and minutes for each step")
    parser.add_argument("--quick", action="store_true",
                        help="the default decode mode and iteration alone; replaces the table of the base")
    options = parser.parse_args()
    pack = started(options)
    from server import PromptServer

    PromptServer.instance = SimpleNamespace(send_progress_text=lambda text, node: None)
    variants = [variant for variant in VARIANTS if variant[:2] == VARIANTS[0][:2]] if options.quick else VARIANTS
    for base in options.base:
        case = replace(CASES[base], dtype=torch.float16 if cuda else torch.float32)
        with torch.inference_mode():
            result = measured(pack, case, variants, options.repeats, cuda)
        save(options, f"guidance_{base}_{'gpu' if cuda else 'cpu'}.json", result)


def measured(pack: ModuleType, case: Case, variants: Sequence[tuple], repeats: int, cuda: bool) -> dict:
    """The variants of one base model, which take turns, at steps of Euler with CFG 1 and, on SD1.5, the content
    ControlNet; and the plain step with CFG."""
    ours, _ = build(pack, case, "cuda" if cuda else "cpu")
    run, clock = sampler(ours, Inputs(case, 1)), gpu_time if cuda else process_time
    guidance, with_cfg, memory = Guidance(pack, case), [], {}
    with peak(cuda) as plain:
        run(ours.model, 1.0)
    times = {variant: {"plain": [], "guided": []} for variant in variants}
    for _ in range(repeats):
        with_cfg.append(timed(lambda: run(ours.model, CFG), clock))
        for mode, iterations, search in variants:
            passed = {"plain": [], "guided": []}
            model = guidance.install(ours.model, mode, iterations, search, clock, passed)
            with peak(cuda) as guided:
                run(model, 1.0)
            for name, values in passed.items():
                times[mode, iterations, search][name] += values
            memory[mode, iterations, search] = guided.bytes and guided.bytes - plain.bytes
            say(f"{case.base}: {mode}, {iterations} iteration(s){', face found again' if search else ''}")
    plain_step = statistics.median(value for one in times.values() for value in one["plain"])
    results = []
    for variant, one in times.items():
        extra = statistics.median(guided - plain for guided, plain in zip(one["guided"], one["plain"]))
        ratio = {"cfg 1": 1 + extra / plain_step, f"cfg {CFG:g}": 1 + extra / statistics.median(with_cfg)}
        results.append(dict(zip(("mode", "iterations", "search"), variant)) | {
            "seconds": one, "ratio": ratio, "bytes_above_plain": memory[variant]})
    return {"base": case.base, "size": case.size, "dtype": str(case.dtype), "repeats": repeats,
            "seconds_with_cfg": with_cfg, "variants": results}


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
    """The node's guidance with a full-width VAE decoder and ArcFace R50 of random weights; the detector, which stands
    for insightface's, takes no time."""

    def __init__(self, pack: ModuleType, case: Case):
        import comfy.sd
        from diffusers import AutoencoderKL

        core, self.module = pack.ridfr_core, pack.nodes.guided_run
        levels = (128, 256, 512, 512)
        vae = AutoencoderKL(block_out_channels=levels, layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        self.vae = comfy.sd.VAE(sd=core.layouts.vae_to_ldm(randomised(vae).state_dict()))
        recogniser = randomised(core.recognition.IResNet())

        def detect(picture: torch.Tensor) -> list:
            height, width = picture.shape[-2:]
            box = torch.tensor([0.0, 0.0, width, height])
            return [core.faces.Face(box, core.faces.usual_place(width, height), 1.0)]

        face_model = core.face_model.FaceModel("random", SimpleNamespace(detect=detect), recogniser, "")
        self.face_model = pack.nodes.managed.ManagedFaceModel(face_model, pack.nodes.managed.managed(recogniser))
        landmarks = core.faces.usual_place(case.size, case.size)
        sight = core.guided_face.Sight(torch.rand(3, case.size, case.size), landmarks)
        references = torch.nn.functional.normalize(torch.randn(1, 512), dim=1)
        self.subject = self.module.Subject(sight, references)

    def install(self, model, mode: str, iterations: int, search: bool, clock: Callable[[], float],
                times: dict[str, list[float]]):
        """The guided model, which notes the time of each prediction without and with guidance."""
        from comfy.patcher_extension import WrappersMP

        def noting(name: str) -> Callable:
            def predict(executor, *args, **kw):
                began = clock()
                result = executor(*args, **kw)
                times[name].append(clock() - began)
                return result
            return predict

        everywhere = self.module.NoiseRange(0.0, 1.0)
        settings = self.module.Settings(0.1, True, iterations, everywhere, 1.0, mode, int(search), "")
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench outside", noting("guided"))
        plan = self.module.GuidedSampling(self.vae, self.face_model, [self.subject], settings, self.module.Record())
        model = plan.install(model)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench inside", noting("plain"))
        return model


class peak:
    """Within it, the most memory in use is watched: the GPU's, or on Linux this process's; None for neither."""

    def __init__(self, cuda: bool):
        self.cuda, self.bytes = cuda, None

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


if __name__ == "__main__":
    main()
