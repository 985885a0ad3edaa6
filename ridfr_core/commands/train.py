"""Train networks."""

import argparse
from pathlib import Path


def describe(parser: argparse.ArgumentParser) -> None:
    recipes = parser.add_subparsers(dest="recipe", required=True)
    nano = recipes.add_parser("nano", help="the embedded models, on drawn portraits")
    nano.add_argument("stages", nargs="*", help="only these stages (default: all, in order)")
    nano.add_argument("--work", type=Path, required=True, help="folder for portraits and checkpoints")
    nano.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    nano.add_argument("--from-shipped", action="store_true",
                      help="take the shipped weights where the work folder has no checkpoint")


def run(options: argparse.Namespace) -> None:
    from ..training import nano

    if unknown := set(options.stages) - {*nano.STAGES}:
        raise SystemExit(f"ridfr train nano: there is no stage {', '.join(sorted(unknown))}; the stages are "
                         f"{', '.join(nano.STAGES)}")
    nano.train(options.stages, options.work, options.threads, options.from_shipped)
