"""Real ComfyUI: servers with the pack in custom_nodes, and ComfyUI's own modules in this process."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tools.cache import CHECKOUT
from tools.server import PACK, Client, Server, link_pack

NEWEST, OLDEST = "RIDFR_COMFYUI", "RIDFR_COMFYUI_OLDEST"


def tree(variable: str) -> Path:
    """The ComfyUI folder that `make test` found or fetched."""
    if not (path := os.environ.get(variable)):
        pytest.fail(f"{variable} is not set: run the tests through `make test`, which sets ComfyUI up.", pytrace=False)
    return Path(path)


def serve(variable: str, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("base")
    link_pack(base)
    (base / "custom_nodes" / "probe").symlink_to(Path(__file__).parent / "probe", target_is_directory=True)
    with Server(Path(sys.executable), tree(variable), base, ["--cpu"]) as server:
        yield server


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """One server of the newest ComfyUI for the whole run."""
    yield from serve(NEWEST, tmp_path_factory)


@pytest.fixture(scope="module")
def oldest_server(tmp_path_factory) -> Iterator[Server]:
    """A server of the oldest ComfyUI that the pack supports."""
    yield from serve(OLDEST, tmp_path_factory)


@pytest.fixture
def client(server) -> Iterator[Client]:
    """A user of `server`; after the test the server must still be alive."""
    with Client(server.url) as client:
        yield client
    assert server.alive(), f"ComfyUI ended during the test; its log is {server.log}"


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    """Every node's schema, as the editor sees it."""
    with Client(server.url) as client:
        return client.object_info()


@pytest.fixture(scope="session")
def complaints():
    """complaints(server) -> the lines of its log, up to the first prompt, that name the pack; its import time aside."""
    harmless = re.compile(r"^\s*[\d.]+ seconds: |\[INFO\]")

    def lines(server: Server) -> list[str]:
        named = re.compile(rf"{PACK}|RIDFR|{re.escape(str(CHECKOUT))}/")
        start = server.log_text().partition("got prompt")[0]  # prompts of other tests provoke errors
        return [line for line in start.splitlines() if named.search(line) and not harmless.search(line)]

    return lines


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """ComfyUI's package `comfy` in this process, on the CPU. Its folder comes first on sys.path: it owns `nodes`."""
    sys.path.insert(0, str(tree(NEWEST)))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  parses sys.argv
    import comfy.model_management

    sys.argv = arguments
    return comfy


@pytest.fixture(scope="session")
def pack(comfy, checkout) -> ModuleType:
    """The pack in this process, loaded as ComfyUI loads it: by its path, under a name that is no folder's.

    Its `ridfr_core` is then `pack.ridfr_core`, another copy than the one that `import ridfr_core` gives.
    """
    spec = importlib.util.spec_from_file_location("ridfr_pack", checkout / "__init__.py",
                                                  submodule_search_locations=[str(checkout)])
    module = sys.modules["ridfr_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nano_workflow(checkout) -> dict:
    """workflows/ridfr_nano.json, in the editor's format."""
    return json.loads((checkout / "workflows" / "ridfr_nano.json").read_text(encoding="utf-8"))
