"""Measure networks."""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

from . import at_least, need

TABLES = ("1", "4", "lambda", "2", "3")  # in the order of their worth


def describe(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="part", required=True)
    describe_folder(subjects.add_parser(
        "folder", help="a method, on a data set of faces in folders",
        description="Restores DATA/PERSON/lq/NAME.png with the photos in DATA/PERSON/ref, compares with "
                    "DATA/PERSON/gt/NAME.png, and writes OUT/images.csv, summary.md, sheet.png and restored/. Several "
                    "processes: accelerate launch -m ridfr_core.cli evaluate folder ..."))
    portraits = subjects.add_parser("portraits", help="drawn portraits as such a data set, to try it on")
    portraits.add_argument("data", type=Path, help="gets a folder per person")
    portraits.add_argument("--people", type=at_least(1, most=10_000), default=8, help="default: 8")
    portraits.add_argument("--references", type=at_least(1), default=3, help="photos of each person (default: 3)")
    describe_nano(subjects.add_parser(
        "nano", help="the embedded models, on people they never saw",
        description="Without --report, the figures of the model card. With it, the tables of RIDFR's paper as "
                    "ridfr_core/nano/REPORT.md: arms that are not trained yet are trained, what was measured is kept."))
    describe_guidance(subjects.add_parser("guidance", help="ID-preserving sampling on the embedded models"))


def describe_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="a folder for each person, with lq, gt and ref in it")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--base", default="nano", help="SD1.5: a diffusers folder or a checkpoint (default: nano)")
    parser.add_argument("--content", default="nano", help="content ControlNet (default: nano)")
    parser.add_argument("--adapter", default="nano", help="identity adapter (default: nano)")
    parser.add_argument("--plus-v1", action="store_true", help="the adapter is FaceID Plus, not PlusV2")
    parser.add_argument("--clip-vision", default="nano", help="CLIP vision model: a folder or file (default: nano)")
    parser.add_argument("--face-model", default="nano", help="insightface folder that conditions (default: nano)")
    parser.add_argument("--judge", default="nano_judge", help="another one, that judges (default: nano_judge)")
    parser.add_argument("--references", type=at_least(0), default=1,
                        help="restore each face once with each of the person's first photos, as many as this; "
                             "several give the identity variance, 0 restores blindly (default: 1)")
    parser.add_argument("--seeds", type=at_least(1), default=1,
                        help="restore each face with each reference as often, from other noise (default: 1)")
    parser.add_argument("--guidance", type=at_least(-math.inf, float), default=1.0, help="on the identity (default: 1)")
    parser.add_argument("--steps", type=at_least(1, most=1000), default=20, help="sampling steps (default: 20)")
    parser.add_argument("--id-preserving", type=at_least(0, float), default=0.0, metavar="STEP",
                        help="ID-preserving sampling with this step size, relative to the noise, such as 0.1 "
                             "(default: 0, without)")
    parser.add_argument("--color-fix", choices=("wavelet", "adain"), help="give results the LQ faces' colours")
    parser.add_argument("--batch", type=at_least(1), default=8, help="faces restored at once (default: 8)")
    parser.add_argument("--measure-only", action="store_true",
                        help="OUT/restored/PERSON/NAME--REFERENCE.png (NAME.png if blind) are there already, by "
                             "whatever workflow")


def describe_nano(nano: argparse.ArgumentParser) -> None:
    nano.add_argument("--work", type=Path, required=True, help="folder for portraits and checkpoints")
    nano.add_argument("--threads", type=at_least(1), default=2, help="processor threads (default: 2)")
    nano.add_argument("--report", action="store_true", help="the paper's tables instead of the figures")
    report = nano.add_argument_group("with --report")
    report.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE",
                        help=f"only these of {', '.join(TABLES)}")
    report.add_argument("--people", type=at_least(1, most=10_000), default=100, help="default: 100")
    report.add_argument("--references", type=at_least(1), default=8, help="photos of each person (default: 8)")
    report.add_argument("--steps", type=at_least(1, most=1000), default=20,
                        help="sampling steps (default: 20, as in the paper)")
    report.add_argument("--seeds", type=at_least(1), default=3, help="of each trained arm (default: 3)")
    report.add_argument("--guidance", type=at_least(-math.inf, float), nargs="+", default=(1.0, 2.5),
                        help="on the identity (default: 1 2.5)")
    report.add_argument("--content-steps", type=at_least(1),
                        help="of each arm's content stage (default: as the bundle)")
    report.add_argument("--out", type=Path, help="file of the report (default: ridfr_core/nano/REPORT.md)")
    report.add_argument("--concat-steps", type=at_least(1), nargs="+",
                        help="of the content stages in Table 3, one after another (default: as --content-steps)")
    report.add_argument("--align-steps", type=at_least(1), help="of each arm's finetuning (default: as the bundle)")


def describe_guidance(parser: argparse.ArgumentParser) -> None:
    def part(text: str) -> tuple[float, float]:
        start, _, end = text.partition("-")
        if not 0 <= float(start) < float(end) <= 1:
            raise argparse.ArgumentTypeError(f"{text} is not a part of the run, such as 0-1 or 0.3-0.7")
        return float(start), float(end)

    parser.add_argument("--work", type=Path, required=True, help="folder for portraits and what was measured")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the table (default: docs)")
    parser.add_argument("--split", choices=("test", "val"), default="test",
                        help="val: people to choose settings by (default: test)")
    parser.add_argument("--people", type=at_least(1, most=10_000), default=48, help="default: 48")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="start noises of each person (default: 3)")
    parser.add_argument("--steps", type=at_least(0, float), nargs="+", default=(0.03, 0.1, 0.2), help="step sizes")
    parser.add_argument("--iterations", type=at_least(1), nargs="+", default=(1, 2, 4))
    parser.add_argument("--ranges", type=part, nargs="+", default=((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)),
                        metavar="START-END", help="parts of the run, as in 0-1 0.3-1; step sizes and iterations are "
                                                  "varied in the first, the others take the node's step")
    parser.add_argument("--decode", nargs="+", default=("face", "whole picture"),
                        help="decode modes, likewise (default: face 'whole picture')")
    parser.add_argument("--find-every", type=at_least(0), nargs="*", default=(0, 5),
                        help="also with the face's place not given but found, and found again every so many steps; 0: "
                             "never (default: 0 5)")
    parser.add_argument("--threads", type=at_least(1), default=2, help="processor threads (default: 2)")


def run(options: argparse.Namespace) -> None:
    if options.part == "folder":
        return run_folder(options)
    if options.part == "portraits":
        from ..evaluation.folder import export_portraits

        export_portraits(options.data, options.people, options.references)
        print(f"{options.people} people are in {options.data}; next: ridfr evaluate folder {options.data} --out OUT")
        return
    plots = options.part == "guidance" or options.report
    need("torch", "transformers", "diffusers", *(["matplotlib"] if plots else []))
    import torch

    torch.set_num_threads(options.threads)
    if options.part == "guidance":
        return run_guidance(options)
    if options.report:
        return run_report(options)
    from ..evaluation import nano_figures

    nano_figures.write(options.work)


def run_folder(options: argparse.Namespace) -> None:
    need("accelerate", *(() if options.measure_only else ("transformers", "diffusers")))
    from ..evaluation.folder import EvaluationError
    from ..evaluation.run import evaluate_folder

    names = ("base", "content", "adapter", "clip_vision", "plus_v1", "guidance", "steps", "id_preserving",
             "color_fix")
    if options.id_preserving and not options.references:
        raise EvaluationError("--id-preserving needs references: give --references 1 or more.")
    pipeline = None if options.measure_only else {name: getattr(options, name) for name in names}
    print(evaluate_folder(options.data, options.out, options.references, options.face_model, options.judge,
                          options.batch, pipeline, options.seeds), end="")


def run_report(options: argparse.Namespace) -> None:
    from ..evaluation.held_out import HeldOut, Method
    from ..evaluation.nano_report import REPORT, NanoReport
    from ..evaluation.shipped import nano_adapter, nano_restorer, nano_tower
    from ..training.nano import NanoTraining
    from ..training.nano_arms import Arms
    from ..training.nano_diffusion import ALIGN, CONTENT
    from ..training.nano_shipped import adopt

    content_steps, align_steps = options.content_steps or CONTENT.steps, options.align_steps or ALIGN.steps
    concat_steps = options.concat_steps or [content_steps]
    command = (f"ridfr evaluate nano --report --work FOLDER --tables {' '.join(options.tables)} --people "
               f"{options.people} --references {options.references} --steps {options.steps} --seeds {options.seeds} "
               f"--guidance {words(options.guidance)} --content-steps {content_steps} --align-steps {align_steps} "
               f"--concat-steps {words(concat_steps)}")
    options.work.mkdir(parents=True, exist_ok=True)
    adopt(options.work)
    held_out = HeldOut(options.work, options.people, options.references, options.steps)
    shipped = Method(nano_restorer(), nano_adapter(), nano_tower())
    arms = Arms(NanoTraining(options.work), content_steps, align_steps)
    report = NanoReport(held_out, shipped, arms, options.seeds, options.guidance, concat_steps, options.out or REPORT)
    report.write(options.tables, command)


def words(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def run_guidance(options: argparse.Namespace) -> None:
    from ..errors import RidfrError
    from ..evaluation.guidance_sweep import Sweep, cells, write
    from ..guidance import DECODE_MODES

    if unknown := set(options.decode) - DECODE_MODES.keys():
        raise RidfrError(f"There is no decode mode {', '.join(sorted(unknown))}; there are {', '.join(DECODE_MODES)}.")
    points = cells(options.steps, options.iterations, options.ranges, options.decode, options.find_every)
    command = (f"ridfr evaluate guidance --work FOLDER --split {options.split} --people {options.people} --seeds "
               f"{options.seeds} --steps {words(options.steps)} --iterations {words(options.iterations)} --ranges "
               f"{' '.join(f'{a:g}-{b:g}' for a, b in options.ranges)} --decode "
               f"{' '.join(map(repr, options.decode))} --find-every {words(options.find_every)}")
    write(Sweep(options.work, options.split, options.people, options.seeds), options.out, points, command)
