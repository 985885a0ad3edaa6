"""The `ridfr` command."""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command; exits with a message on bad arguments."""
    parser = argparse.ArgumentParser(prog="ridfr", description="Identity-preserving face restoration.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train networks").add_subparsers(dest="what", required=True)
    nano = train.add_parser("nano", help="the embedded models, from nothing, on drawn portraits")
    nano.add_argument("stages", nargs="*", help="only these stages (default: all, in order)")
    nano.add_argument("--from-shipped", action="store_true",
                      help="take the shipped weights where the work folder has no checkpoint")
    evaluate = commands.add_parser("evaluate", help="measure networks").add_subparsers(dest="what", required=True)
    figures = evaluate.add_parser("nano", help="the embedded models, on people they never saw")
    for command in (nano, figures):
        command.add_argument("--work", type=Path, required=True, help="folder for portraits and checkpoints")
        command.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    arguments = parser.parse_args(argv)

    from .training import nano as training  # torch and diffusers load only now

    stages = ["figures"] if arguments.command == "evaluate" else arguments.stages
    unknown = set(stages) - {*training.STAGES}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; the stages are {', '.join(training.STAGES)}")
    training.train(stages, arguments.work, arguments.threads, getattr(arguments, "from_shipped", False))


if __name__ == "__main__":
    main()
