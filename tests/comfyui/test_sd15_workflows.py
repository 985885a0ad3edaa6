"""The graphs for real models fit both ComfyUIs' nodes and lack nothing but files, which the doctor knows, too."""

import json

import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api

from ridfr_core import known_models
from tools.server import Client, PromptError

NAMES = ("ridfr_sd15", "ridfr_sd15_tile")
BYPASSED = 4


@pytest.fixture(params=NAMES)
def workflow(request, checkout) -> dict:
    return json.loads((checkout / "workflows" / f"{request.param}.json").read_text(encoding="utf-8")) | {
        "name": request.param
    }


@pytest.fixture(params=["server", "oldest_server"])
def any_client(request):
    with Client(request.getfixturevalue(request.param).url) as client:
        yield client


def test_links_join_slots_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, out, target, into, kind in workflow["links"]:
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind
        assert link in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][into]["link"] == link


def test_the_files_are_those_that_the_doctor_looks_for(workflow):
    linked = {
        (model["directory"], model["name"], model["url"])
        for node in workflow["nodes"]
        for model in node["properties"].get("models", [])
    }
    name = workflow["name"]
    wanted = [*known_models.WORKFLOWS[name], *known_models.OPTIONAL[name]]
    assert linked == {
        ("/".join([model.folder, *model.path.split("/")[:-1]]), model.name, model.url) for model in wanted if model.url
    }
    text = json.dumps(workflow)
    assert all(model.name in text for model in wanted)


def test_nothing_but_files_is_missing(any_client, workflow):
    """Every node and input is known, and each value but that of a file's name or a picture's is accepted."""
    graph = convert_ui_to_api(workflow, any_client.object_info())
    assert len(graph) == sum(node["type"] != "MarkdownNote" and node["mode"] != BYPASSED for node in workflow["nodes"])
    graph = {key: node for key, node in graph.items() if node["class_type"] != "RIDFR_Doctor"}  # which could run
    with pytest.raises(PromptError) as refusal:
        any_client.run(graph)
    errors = [
        (node["class_type"], error["extra_info"].get("input_name"))
        for node in refusal.value.details["node_errors"].values()
        for error in node["errors"]
    ]
    content = "RIDFR_LoadContentControlNet" if workflow["name"] == "ridfr_sd15" else "ControlNetLoader"
    files = {
        ("CheckpointLoaderSimple", "ckpt_name"),
        (content, {"ControlNetLoader": "control_net_name"}.get(content, "file")),
        ("RIDFR_LoadIdentityAdapter", "file"),
        ("RIDFR_LoadFaceModel", "pack"),
        ("CLIPVisionLoader", "clip_name"),
        ("LoadImage", "image"),
    }
    assert set(errors) == files


def test_swinir_is_there_and_bypassed(any_client, workflow):
    modes = {node["type"]: node["mode"] for node in workflow["nodes"]}
    assert modes["UpscaleModelLoader"] == modes["ImageUpscaleWithModel"] == BYPASSED
    assert set(modes.values()) == {0, BYPASSED}
    awake = workflow | {"nodes": [node | {"mode": 0} for node in workflow["nodes"]]}
    graph = convert_ui_to_api(awake, any_client.object_info())
    upscale = next(key for key, node in graph.items() if node["class_type"] == "ImageUpscaleWithModel")
    assert [upscale, 0] in [node["inputs"].get("image") for node in graph.values()]
