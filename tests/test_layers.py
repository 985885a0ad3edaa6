"""The two layers, one direction: nodes import ridfr_core, which knows nothing of ComfyUI; heavy packages come late."""

import ast
import json
import subprocess
import sys

import pytest

HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "nodes", "server"}
HEAVY = {"insightface", "onnxruntime", "onnx", "diffusers", "transformers", "accelerate", "cv2", "skimage"}


def imports(path):
    """(line, imported top-level name, whether at module level) of every absolute import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0], node in outer) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0], node in outer


def found(checkout, folder, wrong):
    return [f"{path.relative_to(checkout)}:{line} imports {name}"
            for path in sorted((checkout / folder).rglob("*.py"))
            for line, name, outer in imports(path) if wrong(name, outer)]


def test_core_imports_nothing_of_comfyui(checkout):
    assert not found(checkout, "ridfr_core", lambda name, outer: name in HOST)


@pytest.mark.parametrize("folder", ["ridfr_core", "nodes"])
def test_the_pack_imports_itself_relatively(checkout, folder):
    """ComfyUI loads the pack under another name, and owns the top-level name `nodes`."""
    assert not found(checkout, folder, lambda name, outer: name in {"ridfr_core", "nodes", "tools", "tests"})


@pytest.mark.parametrize("folder", ["ridfr_core", "nodes"])
def test_heavy_packages_are_imported_where_they_are_used(checkout, folder):
    assert not found(checkout, folder, lambda name, outer: outer and name in HEAVY)


def test_training_knows_nothing_of_evaluation(checkout):
    """Evaluation trains the arms that it compares, so never the other way round."""
    for path in (checkout / "ridfr_core" / "training").rglob("*.py"):
        relative = [node.module or "" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                    if isinstance(node, ast.ImportFrom) and node.level]
        assert not [name for name in relative if name.split(".")[0] == "evaluation"], path.name


def test_core_loads_without_comfyui_and_without_heavy_packages(checkout):
    """Every module of ridfr_core but training, in a Python of its own that refuses ComfyUI and the heavy packages."""
    names = [".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
             for path in sorted((checkout / "ridfr_core").rglob("*.py")) if "training" not in path.parts]
    program = f"""
import importlib, json, sys
refused = {sorted(HOST | HEAVY)!r}
sys.modules.update(dict.fromkeys(refused))
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
"""
    command = [sys.executable, "-c", program, json.dumps(names)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
