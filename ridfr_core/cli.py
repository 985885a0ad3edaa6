"""The `ridfr` command."""

import argparse

from .commands import convert, doctor, evaluate, train

COMMANDS = {"doctor": doctor, "train": train, "evaluate": evaluate, "convert": convert}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command; exits with a message on bad arguments."""
    parser = argparse.ArgumentParser(prog="ridfr", description="Identity-preserving face restoration.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = command.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.describe(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
