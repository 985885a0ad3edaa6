"""What installs the pack reads the same things everywhere, and ships what it should."""

import ast
import os
import re
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project(checkout) -> dict:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_projects_dependencies(checkout, project):
    assert (checkout / "requirements.txt").read_text().split("\n")[:-1] == project["project"]["dependencies"]


def test_dependencies_leave_the_users_torch_alone(project):
    """ComfyUI's torch is chosen for the user's GPU: any bound here could make pip replace it."""
    assert "torch" in project["project"]["dependencies"]
    assert not [d for d in project["project"]["dependencies"] if re.search(r"==|<|~=", d)]


def test_registry_fields(project):
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"} <= comfy.keys()
    assert project["project"]["urls"]["Repository"].startswith("https://github.com/")
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", project["project"]["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])


@pytest.mark.parametrize("field, proportions", [("Icon", 1), ("Banner", 21 / 9)])
def test_registry_pictures_are_in_the_repository(checkout, project, field, proportions):
    """Square and at most 400 pixels, and 21:9: what the registry asks for."""
    url, repository = project["tool"]["comfy"][field], project["project"]["urls"]["Repository"]
    branch = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert url.startswith(branch)
    with Image.open(checkout / url.removeprefix(branch)) as picture:
        assert picture.width / picture.height == pytest.approx(proportions, rel=0.01)
        assert field != "Icon" or picture.width <= 400


def test_every_graph_has_its_picture(checkout):
    """The editor's template browser shows NAME.jpg, of no other kind."""
    graphs, pictures = ({path.stem for path in (checkout / "workflows").glob(f"*.{kind}")} for kind in ("json", "jpg"))
    assert graphs == pictures


def test_minimum_comfyui_is_the_same_for_the_tools(project):
    from tools.comfyui import MINIMUM

    assert project["tool"]["comfy"]["requires-comfyui"] == ">=" + ".".join(map(str, MINIMUM))


def test_ci_runs_the_readmes_test_command(checkout):
    commands = [line for line in (checkout / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make test"]
    assert re.search(r"^make test\b", (checkout / "README.md").read_text(encoding="utf-8"), re.M)


def test_registry_accepts_and_packs_the_node(checkout, tmp_path):
    """comfy-cli's own validation, and the archive it would publish: the pack without its tests and tools."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", checkout, clone], check=True)
    comfy = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node"]
    for command in ("validate", "pack"):
        done = subprocess.run([*comfy, command], cwd=clone, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"DO_NOT_TRACK": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    names = zipfile.ZipFile(clone / "node.zip").namelist()
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= set(names)
    assert {"workflows/ridfr_nano.json", "workflows/ridfr_nano.jpg", "web/docs/RIDFR_ApplyIdentity.md"} <= set(names)
    left_out = {"tests", "tools", "benchmarks", "assets", ".ci", "Makefile"}
    assert not [name for name in names if name.split("/")[0] in left_out]


def calls_and_imports(path):
    """(line, dotted name) of what a file imports and calls, and of what it assigns by subscript."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield node.lineno, ast.unparse(node.value)


def test_shipped_code_runs_no_commands_and_opens_no_network(checkout):
    """What the registry's scanner rejects: commands, eval, downloads, changes of the environment."""
    rejected = re.compile(r"(subprocess|urllib|requests|httpx|socket|ctypes|pip)(\.|$)"
                          r"|(eval|exec|os\.system|os\.popen)$|os\.exec|os\.spawn|os\.environ(\.(update|setdefault|pop))?$|os\.putenv$|torch\.hub")
    found = [f"{path.relative_to(checkout)}:{line}: {name}"
             for folder in ("nodes", "ridfr_core") for path in sorted((checkout / folder).rglob("*.py"))
             for line, name in calls_and_imports(path) if rejected.match(name)]
    assert not found
