"""The commands of `ridfr`, a module each: `describe(parser)` adds the arguments, `run(options)` does the work.

Importing one is cheap; torch and the rest load in `run`. A command with parts of its own has them in `options.part`.
"""

import argparse
import importlib
import math
from collections.abc import Callable


def at_least(low: float, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """An argument's type: a finite number that is not below `low` nor above `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is too little: at least {low:g}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is too much: at most {most:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def need(*packages: str) -> None:
    """Import what a command will need, so that a missing package is known before there is any work to lose.

    Raises ImportError, of which the command line makes a sentence.
    """
    for package in packages:
        importlib.import_module(package)
