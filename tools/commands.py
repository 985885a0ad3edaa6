"""The commands of `python3 -m tools`; each gets the arguments after its name and returns the exit code."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from . import cache, comfyui
from .environment import Bed, place, prepare, write_lock
from .server import CALM_THREADS, PACK, Server, device_flags, link_pack
from .steps import say


def demo(arguments: list[str]) -> int:
    """Restore six people's faces in a real ComfyUI and write a contact sheet (--sheet FILE)."""
    bed = prepare()
    return become([bed.python, "-m", "tools.demo", "--tree", bed.tree, "--base", base_directory(), *arguments])


def serve(arguments: list[str]) -> int:
    """Start ComfyUI with the pack, for the editor (--port N); further arguments go to ComfyUI."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tools serve", usage="%(prog)s [--port PORT] [COMFYUI'S ARGUMENTS]", allow_abbrev=False,
        description="Start ComfyUI with the pack, for the editor. All other arguments go to ComfyUI as they are: "
        "`python main.py --help` in its folder lists them, as --lowvram or --listen.")
    parser.add_argument("--port", type=int, help="where it listens (default: a free port)")
    options, arguments = parser.parse_known_args(arguments)
    bed, base = prepare(), base_directory()
    link_pack(base)
    flags = [*device_flags(bed.python), *comfyui.users_models(base), *arguments]
    models = (comfyui.users_own() or base) / "models"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say("starting ComfyUI (half a minute or more)")
    with Server(bed.python, bed.tree, base, flags, options.port) as server:
        say(f"ComfyUI is at {server.url}; Ctrl-C stops it")
        say(f"the pack's graphs are under Templates, {PACK}; models go to {models}, `make doctor` says which")
        try:
            code = server.process.wait()
            say(f"ComfyUI ended by itself with code {code}; its log is {server.log}")
            return code
        except KeyboardInterrupt:
            say("stopping ComfyUI")
    return 0


def doctor(arguments: list[str]) -> int:
    """Say which model files the graphs lack in the ComfyUI of `serve`; further arguments go to `ridfr doctor`."""
    bed, base = prepare(), base_directory()
    where = ["--comfyui", bed.tree, "--base-directory", base, *comfyui.users_models(base)]
    return become([bed.python, "-m", "ridfr_core.cli", "doctor", *where, *arguments])


def test(arguments: list[str]) -> int:
    """Run the test suite; further arguments go to pytest."""
    bed = prepare(tests=True)
    os.environ.update(CALM_THREADS | os.environ, RIDFR_COMFYUI=str(bed.tree), RIDFR_COMFYUI_OLDEST=str(bed.oldest))
    return become([bed.python, "-m", "pytest", *arguments])


def bench(arguments: list[str]) -> int:
    """Measure identity, guidance, training or faces, by default the first two (--repeats N, --note TEXT)."""
    bed, named = prepare(tests=True), arguments[:1] if arguments[:1] and arguments[0] in BENCHMARKS else []
    for name in named or ("identity", "guidance"):
        module = [bed.python, "-m", BENCHMARKS[name], "--tree", bed.tree, *arguments[len(named):]]
        if code := subprocess.call([str(part) for part in module], cwd=cache.CHECKOUT):
            return code
    return 0


def lint(arguments: list[str]) -> int:
    """Check the style with ruff."""
    return become([prepare().python, "-m", "ruff", "check", *(arguments or ["."])])


def setup(_: list[str]) -> int:
    """Set up what the other commands need, and say where."""
    bed: Bed = prepare(tests=True)
    say(f"ready: {bed.python} runs ComfyUI in {bed.tree}")
    return 0


def lock(_: list[str]) -> int:
    """Resolve the test bed's requirements anew into tools/lock.txt."""
    write_lock()
    return 0


def clean_cache(arguments: list[str]) -> int:
    """Remove all that was set up on this machine (--old: only what this checkout no longer uses)."""
    parser = argparse.ArgumentParser(prog="python3 -m tools clean-cache", description=clean_cache.__doc__)
    parser.add_argument("--old", action="store_true", help="keep what this checkout uses, models and results included")
    if parser.parse_args(arguments).old:
        cache.clean_old([place(), *map(comfyui.place_of, (comfyui.NEWEST, comfyui.OLDEST))])
    else:
        cache.clean()
    say(f"what uv and pip downloaded stays in {cache.platform_cache()}, for other projects too")
    return 0


def base_directory() -> Path:
    """ComfyUI's base directory (models, input, output, custom_nodes) of this checkout."""
    return cache.cache() / f"base-{cache.key_of(str(cache.CHECKOUT))}"


def become(command: list) -> int:
    """Run `command` in the checkout in this process's place, so that signals reach it and its code is ours."""
    command = [str(part) for part in command]
    os.chdir(cache.CHECKOUT)
    os.environ.update(cache.home())
    if os.name == "posix":
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, lambda *_: None)  # Windows has no exec: the child answers Ctrl-C, this waits for it
    return subprocess.call(command)


BENCHMARKS = {"identity": "tools.bench", "guidance": "tools.bench_guidance", "training": "tools.bench_training",
              "faces": "tools.bench_faces"}
OWN_HELP = ("serve", "clean-cache")  # these answer --help themselves
COMMANDS = {"demo": demo, "serve": serve, "doctor": doctor, "test": test, "bench": bench, "lint": lint, "setup": setup,
            "lock": lock, "clean-cache": clean_cache}
