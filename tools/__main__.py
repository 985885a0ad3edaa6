"""`python3 -m tools COMMAND`: what `make COMMAND` runs. Needs nothing but Python 3.10 or newer."""

import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"ridfr: Python 3.10 to 3.14 is needed and this is {sys.version.split()[0]}: "
             "name another one, as in `make demo PYTHON=python3.12`.")

from .commands import COMMANDS, OWN_HELP  # noqa: E402
from .steps import StepError  # noqa: E402

SETTINGS = """
COMFYUI_PATH     a ComfyUI of your own to use, with its models, instead of the one this sets up
COMFYUI_PYTHON   its Python, where that is not found in its folder
RIDFR_CACHE      where what was set up is kept
"""


def usage() -> str:
    lines = [f"{name:<16} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["make COMMAND [ARGS=...], or python3 -m tools COMMAND [...]", "", *lines, SETTINGS.rstrip()])


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print(usage())
        return 0 if arguments[:1] in (["help"], ["-h"], ["--help"]) else 2
    command = COMMANDS[arguments[0]]
    if arguments[0] not in OWN_HELP and {"-h", "--help"} & {*arguments[1:]}:
        print(command.__doc__)  # before anything is set up
        return 0
    try:
        return command(arguments[1:])
    except StepError as error:
        print(f"ridfr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ridfr: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
