"""What saved graphs rely on: the nodes' ids, inputs and outputs stay where they are."""

import json

WIDGETS = ("INT", "FLOAT", "COMBO", "STRING", "BOOLEAN")


def slots(schema) -> dict:
    """The part of a schema that a saved graph refers to."""
    inputs = [[i.id, i.get_io_type()] for i in schema.inputs]
    return {"inputs": inputs, "outputs": [o.get_io_type() for o in schema.outputs]}


def test_nothing_that_a_saved_graph_has_moved(schemas, checkout):
    """Against tests/schemas.json: inputs and outputs are only appended, and then written down there, too."""
    known = json.loads((checkout / "tests" / "schemas.json").read_text(encoding="utf-8"))
    now = {name: slots(schema) for name, schema in schemas.items()}
    assert known.keys() <= now.keys(), "a node is gone: saved graphs that use it break"
    for name, parts in known.items():
        for part, before in parts.items():
            assert now[name][part][: len(before)] == before, (
                f"{name}: saved graphs hold these {part} by place: {before}"
            )
    assert now == known, f"append to tests/schemas.json:\n{json.dumps(now, indent=1)}"


def test_numbers_have_sensible_ranges(schemas):
    for name, schema in schemas.items():
        for slot in schema.inputs:
            if slot.get_io_type() in ("INT", "FLOAT"):
                assert slot.min <= slot.default <= slot.max, f"{name}: {slot.id}"
            if slot.get_io_type() == "COMBO":
                assert slot.default is None or slot.default in slot.options, f"{name}: {slot.id}"


def test_the_workflow_fits_the_schemas(schemas, nano_workflow):
    """Each node of ours in the graph has the first of its schema's inputs, and a value for each widget among them."""
    for node in nano_workflow["nodes"]:
        if node["type"].startswith("RIDFR_"):
            known = schemas[node["type"]].inputs[: len(node["inputs"])]
            assert [i["name"] for i in node["inputs"]] == [i.id for i in known]
            widgets = [i for i in known if i.get_io_type() in WIDGETS]
            seeds = [i for i in widgets if getattr(i, "control_after_generate", None)]  # followed by "fixed"
            assert len(node["widgets_values"]) == len(widgets) + len(seeds)


def test_graphs_call_inputs_as_new_nodes_do(schemas, checkout):
    """The editor shows an input of a saved graph under its id, unless the graph says its label."""
    for graph in (checkout / "workflows").glob("*.json"):
        for node in json.loads(graph.read_text(encoding="utf-8"))["nodes"]:
            known = {i.id: i.display_name for i in schemas[node["type"]].inputs} if node["type"] in schemas else {}
            for slot in node["inputs"]:
                if "widget" not in slot and known.get(slot["name"]):
                    assert slot.get("label") == known[slot["name"]], f"{graph.name}: {node['type']}"
