"""Train networks."""

import argparse
from pathlib import Path

from . import at_least, need

AT_SCALE = {
    "content": "the content ControlNet, on degraded photos (RIDFR Eq. 2)",
    "align": "Alignment Learning: finetune the content ControlNet on pairs of references (Eq. 4-6)",
    "naive": "the same data without Alignment Learning's loss, for comparison",
    "adapter": "the identity adapter, as IP-Adapter is trained",
}


def describe(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Begin with `ridfr train content --show`; data and settings: docs/training.md."
    recipes = parser.add_subparsers(dest="part", required=True, metavar="recipe")
    for name, summary in AT_SCALE.items():
        stage = recipes.add_parser(name, help=summary, description=summary)
        stage.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, such as data=PHOTOS base=SD15")
        stage.add_argument("--config", type=Path, help="YAML file with settings")
        stage.add_argument("--show", action="store_true", help="print the settings with what they mean, and stop")
    portraits = recipes.add_parser("portraits", help="drawn portraits as photos, to try the others on")
    portraits.add_argument("folder", type=Path, help="gets a folder per person")
    portraits.add_argument("--people", type=at_least(1, most=1_000_000), default=20)
    portraits.add_argument("--views", type=at_least(1), default=4, help="photos of each person (default: 4)")
    nano = recipes.add_parser("nano", help="the embedded models, on drawn portraits")
    nano.add_argument("stages", nargs="*", help="only these stages (default: all, in order)")
    nano.add_argument("--work", type=Path, required=True, help="folder for portraits and checkpoints")
    nano.add_argument("--threads", type=at_least(1), default=2, help="processor threads (default: 2)")
    nano.add_argument("--from-shipped", action="store_true",
                      help="take the shipped VAE, CLIP vision, base and adapter where the work folder has no "
                           "checkpoint; the face models are then trained only if they are named")


def run(options: argparse.Namespace) -> None:
    if options.part in AT_SCALE:
        _at_scale(options)
    elif options.part == "portraits":
        from ..training.portrait_data import export_portraits

        export_portraits(options.folder, options.people, options.views)
    else:
        _nano(options)


def _at_scale(options: argparse.Namespace) -> None:
    from ..training import settings

    if options.show:
        print((settings.RECIPES / f"{options.part}.yaml").read_text(encoding="utf-8"), end="")
        return
    chosen = settings.read_settings(options.part, options.config, options.settings)
    need("accelerate", "transformers", "diffusers", "tqdm")
    from ..training.run import run as train

    train(options.part, chosen)


def _nano(options: argparse.Namespace) -> None:
    need("transformers", "diffusers")
    from ..training import nano

    if unknown := set(options.stages) - {*nano.STAGES}:
        raise SystemExit(f"ridfr train nano: there is no stage {', '.join(sorted(unknown))}; the stages are "
                         f"{', '.join(nano.STAGES)}")
    nano.train(options.stages, options.work, options.threads, options.from_shipped)
