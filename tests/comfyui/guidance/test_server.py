"""Guidance in real servers, on the shipped weights: workflows/ridfr_nano_guided.json, solvers, what goes wrong."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image
from safetensors.torch import load_file

from tools.server import Client, PromptError

GUIDE = "RIDFR_IDPreservingSampling"
SOLVERS = ("uni_pc_bh2", "euler", "heun", "dpmpp_2m")


@pytest.fixture(scope="module")
def workflow(checkout) -> dict:
    return json.loads((checkout / "workflows" / "ridfr_nano_guided.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(workflow, object_info) -> dict:
    """The shipped graph for two people and three steps, with a search in each, in API format."""
    graph = convert_ui_to_api(workflow, object_info)
    for node in graph.values():
        node["inputs"].update({"people": 2} if node["class_type"] == "RIDFR_NanoPortraits" else {})
        node["inputs"].update({"batch_size": 2} if node["class_type"] == "EmptyLatentImage" else {})
        node["inputs"].update({"steps": 3} if node["class_type"] == "KSampler" else {})
        node["inputs"].update({"find_every": 1} if node["class_type"] == GUIDE else {})
    return graph


@pytest.fixture(params=["server", "oldest_server"])
def any_server(request):
    return request.getfixturevalue(request.param)


def key(graph, class_name, title=None) -> str:
    return next(
        k for k, n in graph.items() if n["class_type"] == class_name and title in (None, n["_meta"]["title"])
    )


def sampler(graph) -> str:
    return key(graph, "KSampler", "Restore, RIDFR and guidance")


def latents(server, graph, client, **samplers) -> dict[str, torch.Tensor]:
    """What these samplers of the graph give; nothing else is saved."""
    saved = {
        f"save {name}": {"class_type": "SaveLatent", "inputs": {"samples": [k, 0], "filename_prefix": f"guided/{name}"}}
        for name, k in samplers.items()
    }
    kept = {"SaveImage", "RIDFR_CompareIdentity"}
    graph = {k: n for k, n in graph.items() if n["class_type"] not in kept}
    outputs = client.run(graph | saved)["outputs"]
    files = {name: outputs[f"save {name}"]["latents"][0] for name in samplers}
    return {
        name: load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
        for name, file in files.items()
    }


def test_the_shipped_graph_shows_the_plot(any_server, small, workflow):
    with Client(any_server.url) as client:
        outputs = client.run(small)["outputs"]
        titles = {node.get("title"): str(node["id"]) for node in workflow["nodes"]}
        for title in ("RIDFR", "RIDFR and guidance"):
            assert len(outputs[titles[title]]["images"]) == 2
            assert len(outputs[titles[f"Similarity: {title}"]]["similarity"]) == 2
        (entry,) = outputs[titles["Similarity at each step"]]["images"]
        plot = np.asarray(Image.open(io.BytesIO(client.image(entry))).convert("RGB"))
    colours = {tuple(colour) for colour in plot.reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours, "a line for each of the two people"


def test_solvers_with_cfg(any_server, small):
    graph, samplers = copy.deepcopy(small), {}
    for solver in SOLVERS:
        for which, model in (("guided", key(graph, GUIDE)), ("plain", graph[key(graph, GUIDE)]["inputs"]["model"][0])):
            samplers[f"{which}_{solver}"] = name = f"{which} {solver}"
            graph[name] = copy.deepcopy(graph[sampler(graph)])
            graph[name]["inputs"].update(sampler_name=solver, cfg=2.0, steps=2, model=[model, 0])
    with Client(any_server.url) as client:
        found = latents(any_server, graph, client, **samplers)
    for solver in SOLVERS:
        guided, plain = found[f"guided_{solver}"], found[f"plain_{solver}"]
        assert guided.isfinite().all() and (guided - plain).abs().max() > 0.01, solver


def test_step_size_0_is_no_node_to_the_bit(server, client, small):
    graph = copy.deepcopy(small)
    graph[key(graph, GUIDE)]["inputs"]["step_size"] = 0.0
    found = latents(server, graph, client, plain=key(graph, "KSampler", "Restore, RIDFR"), guided=sampler(graph))
    assert torch.equal(found["plain"], found["guided"])


def test_interrupt_and_run_again(server, client, small):
    before = latents(server, small, client, guided=sampler(small))["guided"]
    long = copy.deepcopy(small)
    long[sampler(long)]["inputs"]["steps"] = 1000

    def stop(kind, data):
        if kind == "progress_state" and data["nodes"].get(sampler(long), {}).get("value", 0) >= 2:
            client.interrupt()

    with pytest.raises(PromptError, match="interrupted"):
        client.run(long, stop)
    again = copy.deepcopy(small)
    again[key(again, GUIDE)]["inputs"]["target"] = 0.999999  # not from the cache
    assert torch.equal(latents(server, again, client, guided=sampler(again))["guided"], before)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"RIDFR_NanoPortraits": {"people": 3}}, "has 3 faces but the latent batch has 2 images: give as many people"),
        ({"EmptyLatentImage": {"width": 256}}, "The LQ image is 128x128 but the latent is for 256x128: connect"),
        ({GUIDE: {"decode": "face, TAESD"}}, "There is no TAESD decoder for this model: choose another"),
        ({GUIDE: {"face_model": "judge"}}, "use the same face model for both"),
    ],
    ids=["people", "proportions", "no taesd", "another recogniser"],
)
def test_bad_input(client, small, change, sentence):
    graph = {k: copy.deepcopy(n) for k, n in small.items() if n["class_type"] != "RIDFR_CompareIdentity"}
    judge = key(small, "RIDFR_LoadFaceModel", "Load Face Model (judge)")
    for class_name, inputs in change.items():
        for node in graph.values():
            if node["class_type"] == class_name:
                node["inputs"].update({k: [judge, 0] if v == "judge" else v for k, v in inputs.items()})
    plain = key(graph, "KSampler", "Restore, RIDFR")
    graph = {k: n for k, n in graph.items() if k != plain and [plain, 0] not in n["inputs"].values()}
    graph = {k: n for k, n in graph.items() if all(v[0] in graph for v in n["inputs"].values() if isinstance(v, list))}
    with pytest.raises(PromptError, match=sentence) as failure:
        client.run(graph)
    message = failure.value.details["exception_message"].strip()
    assert "\n" not in message and message.endswith("."), message
    client.run({"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1,
                                                             "color": hash(sentence) % 2**24}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
