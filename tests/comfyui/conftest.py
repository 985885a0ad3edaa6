"""Real ComfyUI: servers with the pack in custom_nodes, and ComfyUI's own modules in this process."""

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

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


@pytest.fixture(scope="session")
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
def schemas(pack) -> dict:
    """Node id -> schema."""
    pack.nodes.paths.register_folders()
    extension = asyncio.run(pack.comfy_entrypoint())
    found = (node.define_schema() for node in asyncio.run(extension.get_node_list()))
    return {schema.node_id: schema for schema in found}


@pytest.fixture(scope="session")
def nano_workflow(checkout) -> dict:
    """workflows/ridfr_nano.json, in the editor's format."""
    return json.loads((checkout / "workflows" / "ridfr_nano.json").read_text(encoding="utf-8"))


# The nodes in this process, on random nano weights: trained ones could hide an error


@pytest.fixture(scope="session")
def weights(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, "-m", "tests.nano_random", folder], cwd=checkout, check=True)
    return folder


@pytest.fixture(scope="module")
def nodes(pack, weights, shown) -> Iterator[dict]:
    """Every node class by its id."""
    before, pack.nodes.paths.WEIGHTS = pack.nodes.paths.WEIGHTS, weights
    pack.nodes.paths.register_folders()
    extension = asyncio.run(pack.comfy_entrypoint())
    classes = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    for name, node in classes.items():
        node.hidden = SimpleNamespace(unique_id=name)
    yield classes
    pack.nodes.paths.WEIGHTS = before


@pytest.fixture(scope="session")
def shown(comfy) -> dict[str, str]:
    """The text that appears on a node, by its class's id."""
    from server import PromptServer

    texts = {}
    PromptServer.instance = SimpleNamespace(send_progress_text=lambda text, node: texts.update({node: text}))
    return texts


@pytest.fixture
def inference_mode() -> Iterator[None]:
    """As ComfyUI runs nodes; without it gradient bugs hide."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def nano(nodes) -> SimpleNamespace:
    """MODEL, CLIP, VAE, CLIP_VISION and the empty prompt."""
    with torch.inference_mode():
        model, clip, vae, vision = nodes["RIDFR_LoadNanoModels"].execute().args
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    return SimpleNamespace(model=model, clip=clip, vae=vae, vision=vision, prompt=prompt)


@pytest.fixture(scope="module")
def adapter(nodes):
    return nodes["RIDFR_LoadIdentityAdapter"].execute("nano", "auto")[0]


@pytest.fixture(scope="module")
def face_model(nodes):
    return nodes["RIDFR_LoadFaceModel"].execute("nano")[0]


@pytest.fixture(scope="module")
def identity(pack, face_model):
    """Two people, one photo each, with random features, as of the nano face model."""
    g = torch.Generator().manual_seed(7)
    core = pack.ridfr_core.identity
    people = tuple(
        core.Person(
            F.normalize(torch.randn(1, 512, generator=g), dim=1), torch.randn(1, 65, 128, generator=g), torch.ones(1)
        )
        for _ in range(2)
    )
    uncond, crops = torch.randn(65, 128, generator=g), torch.zeros(2, 3, 112, 112)
    return core.Identity(people, uncond, face_model.model.digest, crops)


@pytest.fixture(scope="session")
def sample(comfy):
    """sample(model, positive, ...) -> KSampler's latents [batch,4,16,16]."""
    from nodes import common_ksampler

    def sample(model, positive, negative=None, batch=2, steps=2, cfg=1.0, seed=1, sampler="uni_pc_bh2"):
        latent = {"samples": torch.zeros(batch, 4, 16, 16)}
        negative = positive if negative is None else negative
        return common_ksampler(model, seed, steps, cfg, sampler, "normal", positive, negative, latent)[0]["samples"]

    return sample


@pytest.fixture
def apply(nodes, nano, adapter):
    """apply(identity, strength, start, end, model) -> the nano model, or the given one, with the identity."""

    def apply(identity, strength=1.0, start=0.0, end=1.0, model=None, **options):
        node = nodes["RIDFR_ApplyIdentity"]
        return node.execute(model or nano.model, adapter, identity, strength, start, end, **options)[0]

    return apply
