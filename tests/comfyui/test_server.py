"""The whole job in a real server: workflows/ridfr_nano.json and what a user does around it, on the shipped weights."""

import copy
import json
import time
from statistics import mean

import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from safetensors.torch import load_file

from tools.server import Client, PromptError

COLUMNS = ("lq", "blind", "ridfr", "reference", "truth")


@pytest.fixture(scope="module")
def shipped(nano_workflow, object_info) -> dict:
    """The shipped graph in API format."""
    return convert_ui_to_api(nano_workflow, object_info)


@pytest.fixture(scope="module")
def small(shipped) -> dict:
    """The shipped graph for two people and three steps, whose latents are saved and whose patches are counted."""
    graph = copy.deepcopy(shipped)
    for node in graph.values():
        node["inputs"].update({"people": 2} if node["class_type"] == "RIDFR_NanoPortraits" else {})
        node["inputs"].update({"batch_size": 2} if node["class_type"] == "EmptyLatentImage" else {})
        node["inputs"].update({"steps": 3} if node["class_type"] == "KSampler" else {})
    kept = {"SaveImage", "RIDFR_CompareIdentity"}
    graph = {name: node for name, node in graph.items() if node["class_type"] not in kept}
    for name in ("blind", "ridfr"):
        graph[f"save {name}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [sampler(graph, name), 0], "filename_prefix": f"latents/{name}"},
        }
    model = graph[sampler(graph, "ridfr")]["inputs"]
    graph["count"] = {"class_type": "ProbeCountPatches", "inputs": {"model": model["model"]}}
    model["model"] = ["count", 0]
    graph["report"] = {
        "class_type": "ProbeReport",
        "inputs": {"counts": ["count", 1], "latent": [sampler(graph, "ridfr"), 0]},
    }
    return graph


def of_class(graph, name) -> list[str]:
    return [key for key, node in graph.items() if node["class_type"] == name]


def sampler(graph, which) -> str:
    """Key of the KSampler of the blind restoration, or of RIDFR's."""
    titles = {"blind": "Restore, blind", "ridfr": "Restore, RIDFR"}
    return next(key for key in of_class(graph, "KSampler") if graph[key]["_meta"]["title"] == titles[which])


def changed(graph, class_name, **inputs) -> dict:
    """A copy with these inputs of every node of a class."""
    graph = copy.deepcopy(graph)
    for key in of_class(graph, class_name):
        graph[key]["inputs"].update(inputs)
    return graph


def latents(server, entry) -> dict[str, torch.Tensor]:
    """What SaveLatent wrote of the blind and of the RIDFR restoration."""
    files = {name: entry["outputs"][f"save {name}"]["latents"][0] for name in ("blind", "ridfr")}
    return {
        name: load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
        for name, file in files.items()
    }


def forget(client):
    """Empty the server's caches, so that the same graph is computed again."""
    client.post("/free", json.dumps({"unload_models": True, "free_memory": True}).encode())
    time.sleep(1)  # done between prompts, without an answer


def restored(client, shipped, nano_workflow) -> dict[str, list[float | None]]:
    """Similarity of each person's pictures to the truth, by column, after the shipped graph has run."""
    outputs = client.run(shipped)["outputs"]
    saved = {
        node["inputs"]["filename_prefix"]: key for key, node in shipped.items() if node["class_type"] == "SaveImage"
    }
    assert set(saved) == {f"ridfr_nano/{name}" for name in COLUMNS}
    assert all(len(outputs[key]["images"]) == 6 for key in saved.values())
    titles = {node.get("title"): str(node["id"]) for node in nano_workflow["nodes"]}
    return {name: outputs[titles[f"Similarity: {name}"]]["similarity"] for name in ("blind", "RIDFR", "reference")}


def test_the_shipped_graph_runs_and_its_faces_are_found(client, shipped, nano_workflow):
    similarity = restored(client, shipped, nano_workflow)
    assert None not in similarity["reference"] + similarity["RIDFR"]
    assert similarity["RIDFR"] != similarity["blind"]


def test_the_shipped_graph_restores_the_right_people(client, shipped, nano_workflow):
    """Six people say whether, not how much: the 1.5 times of the model card is over 96."""
    similarity = restored(client, shipped, nano_workflow)
    gains = [right - blind for right, blind in zip(similarity["RIDFR"], similarity["blind"], strict=True)]
    assert mean(similarity["RIDFR"]) > 1.2 * mean(similarity["blind"]) and sum(gain > 0 for gain in gains) >= 4


def test_every_layer_fires(small, any_version):
    entry = any_version.run(changed(small, "RIDFR_ApplyIdentity", strength=0.9))
    counts = {tuple(place): n for place, n in entry["outputs"]["report"]["counts"]}
    inputs, outputs = (1, 2, 4, 5, 7, 8), range(3, 12)
    layers = [("input", i) for i in inputs] + [("middle", 0)] + [("output", i) for i in outputs]
    assert counts == dict.fromkeys(layers, 3)


@pytest.fixture(params=["server", "oldest_server"])
def any_version(request):
    with Client(request.getfixturevalue(request.param).url) as client:
        yield client


def test_strength_0_is_blind_to_the_bit(server, client, small):
    with_identity = latents(server, client.run(small))
    assert not torch.equal(with_identity["ridfr"], with_identity["blind"])
    graph = changed(small, "RIDFR_ApplyIdentity", strength=0.0)
    apply = of_class(graph, "RIDFR_ApplyIdentity")[0]
    graph[sampler(graph, "ridfr")]["inputs"]["model"] = [apply, 0]  # there is nothing to count
    graph = {key: node for key, node in graph.items() if key not in ("count", "report")}
    without = latents(server, client.run(graph))
    assert torch.equal(without["ridfr"], without["blind"])
    assert torch.equal(without["blind"], with_identity["blind"])


def test_content_strength_0_is_no_controlnet_to_the_bit(server, client, small):
    off = latents(server, client.run(changed(small, "ControlNetApplyAdvanced", strength=0.0)))
    graph = copy.deepcopy(small)
    apply = of_class(graph, "ControlNetApplyAdvanced")[0]
    for key in of_class(graph, "KSampler"):
        graph[key]["inputs"].update(
            positive=graph[apply]["inputs"]["positive"], negative=graph[apply]["inputs"]["negative"]
        )
    without = latents(server, client.run(graph))
    with_content = latents(server, client.run(small))
    for name in ("blind", "ridfr"):
        assert torch.equal(off[name], without[name])
        assert not torch.equal(off[name], with_content[name])


def test_same_seed_same_picture(server, client, small):
    first = latents(server, client.run(small))
    forget(client)
    computed = []
    again = latents(server, client.run(small, lambda kind, data: computed.append(data.get("node"))))
    assert sampler(small, "ridfr") in computed, "the server answered from its cache"
    other = latents(server, client.run(changed(small, "KSampler", seed=2)))
    for name in ("blind", "ridfr"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_two_prompts_queued_at_once(server, client, small):
    graphs = [changed(small, "KSampler", seed=seed) for seed in (11, 12)]
    prompts = [client.submit(graph) for graph in graphs]
    queued = [latents(server, client.wait(prompt)) for prompt in prompts]
    forget(client)
    for graph, together in zip(graphs, queued, strict=True):
        alone = latents(server, client.run(graph))
        assert torch.equal(together["ridfr"], alone["ridfr"]) and torch.equal(together["blind"], alone["blind"])


def test_interrupt_and_run_again(server, client, small):
    before = latents(server, client.run(small))
    graph = changed(small, "KSampler", steps=1000)

    def stop(kind, data):
        if kind == "progress_state" and data["nodes"].get(sampler(graph, "ridfr"), {}).get("value", 0) >= 2:
            client.interrupt()

    graph["save blind"]["inputs"]["samples"] = [sampler(graph, "ridfr"), 0]  # RIDFR's sampler is the only one
    with pytest.raises(PromptError, match="interrupted"):
        client.run(graph, stop)
    forget(client)
    assert torch.equal(latents(server, client.run(small))["ridfr"], before["ridfr"])
