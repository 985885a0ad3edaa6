"""Look what is missing for the shipped graphs: model files, packages, folders."""

import argparse
import os
import sys
from pathlib import Path

PACK = Path(__file__).parents[2]
SIGNS = ("comfyui_version.py", "main.py")  # of a ComfyUI folder; old ones lack the first


def describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflows", nargs="*", help="only what these graphs need, as ridfr_sd15_tile (default: all)")
    parser.add_argument("--comfyui", type=Path, default=where(), help="ComfyUI's folder (default: COMFYUI_PATH, or the "
                        "one that the pack lies in)")
    parser.add_argument("--base-directory", type=Path, help="where its models and output are, if it was started with "
                        "this option (default: ComfyUI's folder)")
    parser.add_argument("--hash", action="store_true", help="compare SHA-256 too: reads the files whole")


def where() -> Path | None:
    """ComfyUI's folder, if COMFYUI_PATH names it or the pack lies in its custom_nodes."""
    if named := os.environ.get("COMFYUI_PATH"):
        return Path(named).expanduser()
    return PACK.parents[1] if PACK.parent.name == "custom_nodes" else None


def run(options: argparse.Namespace) -> None:
    """Print the findings as they come. Exit code: 0 the graphs can run, 1 they cannot, 2 there is no ComfyUI."""
    try:
        from .. import doctor, host
    except ModuleNotFoundError as missing:
        fail(f"{missing.name} is not installed for this Python ({sys.executable}): run this with ComfyUI's Python")
    from ..known_models import WORKFLOWS

    workflows = options.workflows or list(WORKFLOWS)
    if unknown := set(workflows) - WORKFLOWS.keys():
        fail(f"there is no graph {', '.join(sorted(unknown))}; there are {', '.join(WORKFLOWS)}")
    if options.comfyui is None or not any((options.comfyui / name).is_file() for name in SIGNS):
        where = f"there is no ComfyUI in {options.comfyui}" if options.comfyui else "ComfyUI is not found"
        fail(f"{where}: name ComfyUI's folder with --comfyui or COMFYUI_PATH (for the one of `make demo` and `make "
             "serve`: `make doctor`)")
    try:
        folders = host.model_folders(options.comfyui, options.base_directory)
    except ValueError as error:
        fail(str(error))
    findings = []
    for finding in doctor.examine(folders, host.version_of(options.comfyui), workflows, options.hash):
        findings.append(finding)
        print(finding, flush=True)
    print(doctor.verdict(findings, workflows))
    raise SystemExit(not all(finding.healthy for finding in findings))


def fail(message: str) -> None:
    print(f"ridfr doctor: {message}", flush=True)
    raise SystemExit(2)
