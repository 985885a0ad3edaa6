"""Look what is missing for the shipped graphs: model files, packages, folders."""

import argparse
import os.path
import sys
from pathlib import Path

from ..errors import in_one_line

PACK = Path(__file__).parents[2]
SIGNS = ("comfyui_version.py", "main.py")  # of a ComfyUI folder; old ones lack the first


def describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflows", nargs="*", help="only what these graphs need, as ridfr_sd15_tile (default: all)")
    parser.add_argument("--comfyui", type=Path, default=where(), help="ComfyUI's folder (default: the one that the "
                        "pack lies in)")
    parser.add_argument("--base-directory", type=Path, help="where its models and output are, if it was started with "
                        "this option (default: ComfyUI's folder)")
    parser.add_argument("--extra-model-paths-config", type=Path, action="append", default=[], metavar="FILE",
                        help="a file with further model folders, if it was started with this option")
    parser.add_argument("--hash", action="store_true", help="compare SHA-256 too: reads the files whole")


def where() -> Path | None:
    """ComfyUI's folder, if the pack lies in its custom_nodes."""
    return PACK.parents[1] if PACK.parent.name == "custom_nodes" else None


def run(options: argparse.Namespace) -> None:
    """Print the findings as they come. Exit code: 0 the graphs can run, 1 they cannot, 2 there is no ComfyUI."""
    try:
        from .. import doctor, host
    except Exception as error:  # torch is missing, or broken in any way
        fail(f"{in_one_line(error)} ({sys.executable}): run this with ComfyUI's Python, or install that package again")
    from ..known_models import WORKFLOWS

    workflows = list(dict.fromkeys(options.workflows)) or list(WORKFLOWS)
    if unknown := set(workflows) - WORKFLOWS.keys():
        fail(f"there is no graph {', '.join(sorted(unknown))}; there are {', '.join(WORKFLOWS)}")
    tree, base = options.comfyui, options.base_directory
    if tree is None or not any(os.path.isfile(tree / name) for name in SIGNS):
        where = f"there is no ComfyUI in {tree}" if tree else "ComfyUI is not found"
        fail(f"{where}: name ComfyUI's folder with --comfyui (for the one of `make demo` and `make serve`: "
             "`make doctor`)")
    findings = []
    try:
        folders = host.model_folders(tree, base, doctor.SEARCHED, options.extra_model_paths_config)
    except host.HostError as error:
        findings.append(doctor.Finding("wrong", str(error)))
        print(findings[0], flush=True)
        folders = host.own_folders(tree, base, doctor.SEARCHED)
    for finding in doctor.examine(folders, host.version_of(tree), workflows, options.hash):
        findings.append(finding)
        print(finding, flush=True)
    print(doctor.verdict(findings, workflows))
    raise SystemExit(not all(finding.healthy for finding in findings))


def fail(message: str) -> None:
    print(f"ridfr doctor: {message}", flush=True)
    raise SystemExit(2)
