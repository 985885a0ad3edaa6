"""The pack in a real server: it loads without a word in both ends of the ComfyUI versions it supports."""

import json
import re

import pytest

from tools.server import PACK, Client


@pytest.fixture(params=["server", "oldest_server"])
def any_server(request):
    return request.getfixturevalue(request.param)


def test_all_nodes_are_there_and_nothing_complains(any_server, complaints, checkout):
    nodes = json.loads((checkout / "tests" / "schemas.json").read_text(encoding="utf-8"))
    with Client(any_server.url) as client:
        info = client.object_info()
    assert {name for name in info if name.startswith("RIDFR_")} == set(nodes)
    assert complaints(any_server) == []


def test_pack_is_quick_to_load(any_server):
    seconds = re.search(rf"([\d.]+) seconds: .*{PACK}", any_server.log_text())
    assert float(seconds[1]) <= 0.3


def test_every_node_explains_itself(object_info):
    for name in filter(lambda name: name.startswith("RIDFR_"), object_info):
        node = object_info[name]
        assert node["display_name"] != name and node["description"] and node["category"]
        assert node["search_aliases"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert not [i for i, spec in inputs.items() if not spec[1].get("tooltip")], name
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"]), name


def test_workflows_are_among_the_editors_templates(client):
    assert "ridfr_nano" in json.loads(client.get("/workflow_templates"))[PACK]
    assert json.loads(client.get(f"/api/workflow_templates/{PACK}/ridfr_nano.json"))["nodes"]
