"""The `ridfr` command."""

import argparse
import codecs
import sys

from .commands import convert, doctor, evaluate, train
from .errors import RidfrError

COMMANDS = {"doctor": doctor, "train": train, "evaluate": evaluate, "convert": convert}
# What a terminal's code page may lack, in ASCII
PLAIN = {"↑": "^", "↓": "v", "–": "-", "−": "-", "…": "...", "×": "x", "·": ";", "λ": "lambda", "≥": ">=", "≤": "<="}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command; exits with a message on bad arguments and what cannot be used."""
    codecs.register_error("ridfr.plain", plain)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ridfr.plain")
    parser = argparse.ArgumentParser(prog="ridfr", description="Identity-preserving face restoration.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        summary = command.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.describe(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(argv)
    name = " ".join(filter(None, ("ridfr", options.command, getattr(options, "part", None))))
    try:
        options.run(options)
    except RidfrError as error:
        raise SystemExit(f"{name}: {error}") from error
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except ImportError as error:
        raise SystemExit(f"{name}: {not_there(error, options.command)}") from error
    except OSError as error:
        where = f"'{error.filename}'" if error.filename else "A file"
        raise SystemExit(f"{name}: {where} cannot be read or written ({error.strerror or error}): check the path, your "
                         "rights and the free space.") from error


def not_there(error: ImportError, command: str) -> str:
    """The sentence for a package that is missing or broken; what is wrong within the pack itself stays an error."""
    package = (error.name or "").partition(".")[0]
    if package == __package__.partition(".")[0]:
        raise error
    what = f"{package} is not installed" if isinstance(error, ModuleNotFoundError) and package else f"{error}, it is so"
    extra = f"'.[{command}]'" if command in ("train", "evaluate") else "."
    return f"{what} for this Python ({sys.executable}): run `pip install -e {extra}` in the pack's folder with it."


def plain(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start:error.end]), error.end


if __name__ == "__main__":
    main()
