"""What installs the pack reads the same things everywhere, and ships what it should."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from ridfr_core.packages import REQUIRED
from tools.environment import python_in

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project(checkout) -> dict:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_projects_dependencies(checkout, project):
    assert (checkout / "requirements.txt").read_text().split("\n")[:-1] == project["project"]["dependencies"]


def test_what_the_nodes_import_is_required(checkout, project):
    """All that is imported on a way from nodes/, ComfyUI's own modules and what may be absent aside."""
    comfyui = {"comfy", "comfy_api", "comfyui_version", "folder_paths", "server"}
    optional = {"onnxruntime", "pyiqa", "huggingface_hub"}
    ways = sorted((checkout / "nodes").glob("*.py"))
    found = set()
    for path in ways:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                files = [folder.with_suffix(".py"), folder / "__init__.py"]
                files += [folder / f"{alias.name}.py" for alias in node.names]
                ways.extend(file for file in files if file.is_file() and file not in ways)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
                found.update(name.value.split(".")[0] for name in node.args if isinstance(name, ast.Constant))
    assert found - sys.stdlib_module_names - comfyui - optional <= REQUIRED.keys()
    assert {Requirement(line).name for line in project["project"]["dependencies"]} == set(REQUIRED.values())


@pytest.mark.parametrize("module, sentence", [
    ("no_such", "no_such is not installed: run `.* -m pip install -r requirements.txt` in the pack's folder"),
    ("comfy_api_of_later", "ComfyUI is too old for this pack .*: update ComfyUI"),
])
def test_a_missing_requirement_is_a_sentence_when_comfyui_loads_the_pack(checkout, tmp_path, module, sentence):
    pack = tmp_path / "pack"
    (pack / "nodes").mkdir(parents=True)
    (pack / "__init__.py").write_text((checkout / "__init__.py").read_text(encoding="utf-8"))
    (pack / "nodes" / "__init__.py").write_text(f"import {module}")
    done = subprocess.run([sys.executable, "-c", "import pack"], cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(f"ImportError: {sentence}.", done.stderr.splitlines()[-1])
    assert "During handling" not in done.stderr


TROUBLED = {"opencv-contrib-python": "4.11.0.86", "onnxruntime-gpu": "1.22.0", "protobuf": "4.25.8"}


@pytest.mark.parametrize("edition, numpy", [("RIDFR_COMFYUI", "1.26.4"), ("RIDFR_COMFYUI_OLDEST", "1.25.0")])
def test_an_install_moves_nothing(checkout, tmp_path, edition, numpy):
    """Into an environment with the oldest packages that ComfyUI takes, and others that an install could break.

    To pip, a package is its metadata: these have no more. There is no index, so pip ends with an error where the
    requirements ask for anything that ComfyUI does not bring.
    """
    lines = (Path(os.environ[edition]) / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.partition("#")[0].strip()]
    versions = {one.name: next((bound.version for bound in one.specifier), "0.1") for one in wanted}
    venv.EnvBuilder(symlinks=os.name == "posix").create(tmp_path / "theirs")
    python = python_in(tmp_path / "theirs")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    for name, version in (versions | TROUBLED | {"numpy": numpy}).items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    before = {path: path.stat().st_mtime_ns for path in packages.rglob("*")}
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--isolated", "--no-index",
                           "-r", checkout / "requirements.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in packages.rglob("*")} == before
    assert all(line.startswith("Requirement already satisfied") for line in done.stdout.splitlines())


def test_agreed_packages_are_named(checkout):
    """What must not come with the pack is an extra, which training and the tests include."""
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    agreed = ("torch", "diffusers", "insightface", "onnxruntime-gpu", "safetensors", "comfy-cli", "kornia")
    assert not [name for name in agreed if name not in text]
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {Requirement(line).name for line in extras["insightface"]} == {"insightface", "onnx", "onnxruntime"}
    assert "ridfr[insightface]" in extras["train"] and "ridfr[insightface]" in extras["dev"]


def test_registry_fields(project):
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"} <= comfy.keys()
    assert project["project"]["urls"]["Repository"].startswith("https://github.com/")
    assert {"Documentation", "Bug Tracker"} <= project["project"]["urls"].keys()
    assert project["project"]["license"] == "Apache-2.0", "SPDX"
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


@pytest.fixture(scope="module")
def shipped(checkout) -> list[str]:
    """Names of the files that the registry's zip holds: what git tracks, without .comfyignore."""
    tracked = subprocess.run(["git", "ls-files"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    ignored = tuple((checkout / ".comfyignore").read_text(encoding="utf-8").split())
    return [name for name in tracked.splitlines() if not name.startswith(ignored)]


def test_registry_accepts_and_packs_the_node(checkout, tmp_path, shipped):
    """comfy-cli's own validation, what it would publish, and the archive: the pack without its tests and tools."""
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
    program = """
import json
from comfy_cli.registry.config_parser import extract_node_configuration
project = extract_node_configuration().project
print(json.dumps([project.license.text, project.supported_os, project.supported_accelerators]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, check=True)
    licence, systems, accelerators = json.loads(done.stdout)
    assert licence == "Apache-2.0" and systems == ["OS Independent"] and "GPU :: NVIDIA CUDA" in accelerators
    assert len(accelerators) == 4, "one that the registry does not know drops all"


def test_links_of_shipped_pages_hold_in_the_zip(checkout, shipped):
    """And each link to a part of a page names a heading of it."""
    broken = []
    for name in (name for name in shipped if name.endswith(".md")):
        text = (checkout / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, part = link.partition("#")
            if "://" in link:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            headings = re.findall(r"^#+ (.*)$", (checkout / target).read_text(encoding="utf-8"), re.M) if part else ()
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            there = target in shipped or any(other.startswith(target + "/") for other in shipped)
            if not there or part and part not in anchors:
                broken.append(f"{name}: {link}")
    assert not broken


REJECTED = re.compile(
    r"os\.environ|os\.(getenv|putenv|system|popen|exec\w*|spawn\w*)\b|\bfrom os import\b|\bread_bytes\b|__import__"
    r"|\brequests\.|\burlopen\b|\bsockets?\b|\bsubprocess\b|\b(urllib|httpx|aiohttp|ctypes)\b|\btorch\.hub\b"
    r"|\bimport pip\b|(?<![\w.])(eval|exec|compile)\(")
RAW = re.compile(r"raw\.githubusercontent|/raw/(main|master)|\bgist\.|pastebin")


def code_of(text: str) -> str:
    """Python without its comments and strings, which the registry's scanner passes over."""
    parts, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or tokenize.tok_name[token.type].startswith("FSTRING"):
            continue
        words = (tokenize.NAME, tokenize.NUMBER)
        parts.append(f" {token.string}" if token.type in words and last in words else token.string)
        last = token.type
    return "".join(parts)


def test_the_scanner_would_see_what_it_rejects():
    """The list is that of the registry: these must be found, and those must not."""
    for text in ("import os\nos.environ.get('x')", "import subprocess", "open(x).read_bytes()", "__import__('os')",
                 "from os import environ", "requests.get(x)", "from urllib.request import urlopen", "import socket",
                 "os.getenv('x')", "eval(x)", "f'{os.environ}'" if sys.version_info >= (3, 12) else "os.environ"):
        assert REJECTED.search(code_of(text)), text
    for text in ("# os.environ", "'subprocess'", "network.eval()", "re.compile(x)", "requested.x", "torch.compile(y)"):
        assert not REJECTED.search(code_of(text)), text


def test_shipped_files_hold_nothing_that_the_registry_flags(checkout, shipped):
    """Commands, downloads, the environment, files read in one go, raw-content addresses: each flags a version."""
    found = []
    for name in shipped:
        if not name.endswith((".py", ".md", ".js", ".json", ".toml", ".txt", ".yaml", ".html", ".css")):
            continue
        text = (checkout / name).read_text(encoding="utf-8")
        lines = code_of(text) if name.endswith(".py") else text
        found += [f"{name}: {match[0]}" for match in REJECTED.finditer(lines)]
        if name != "pyproject.toml":  # Icon and Banner are such addresses, and the registry asks for them
            found += [f"{name}: {match[0]}" for match in RAW.finditer(text)]
    assert not found
    assert "://" not in (checkout / "requirements.txt").read_text()
