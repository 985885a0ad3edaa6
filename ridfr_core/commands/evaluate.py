"""Measure networks."""

import argparse
from pathlib import Path


def describe(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True)
    nano = subjects.add_parser("nano", help="the embedded models, on people they never saw")
    nano.add_argument("--work", type=Path, required=True, help="folder for portraits and checkpoints")
    nano.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")


def run(options: argparse.Namespace) -> None:
    from ..training import nano

    nano.train(["figures"], options.work, options.threads)
