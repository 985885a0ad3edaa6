"""The editor's help pages: web/docs/NODE_ID.md, shown by a node's "Info"."""

import json
import re

import pytest

from tools.server import PACK


@pytest.fixture(scope="module")
def pages(checkout) -> dict[str, str]:
    """Node id -> its page."""
    return {page.stem: page.read_text(encoding="utf-8") for page in (checkout / "web" / "docs").glob("*.md")}


def names(page: str, heading: str) -> list[str]:
    """What is bold in the first column of the table under a heading; nothing where there is no such heading."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", page, re.M | re.S)
    rows = re.findall(r"^\|(.*?)\|", section[1], re.M) if section else []
    return [name for row in rows for name in re.findall(r"\*\*(.+?)\*\*", row)]


def test_every_node_has_a_page_and_every_page_a_node(pages, checkout):
    assert pages.keys() == json.loads((checkout / "tests" / "schemas.json").read_text(encoding="utf-8")).keys()


def test_pages_name_inputs_and_outputs_as_the_editor_does(pages, schemas):
    for node, schema in schemas.items():
        assert pages[node].startswith(f"# {schema.display_name}\n"), node
        assert names(pages[node], "Inputs") == [slot.display_name or slot.id for slot in schema.inputs], node
        assert names(pages[node], "Outputs") == [slot.display_name for slot in schema.outputs], node


def test_the_editor_gets_the_pages(client, pages):
    """From where it asks for them: docs/NODE_ID.md below the pack's web folder."""
    for node, page in pages.items():
        assert client.get(f"/extensions/{PACK}/docs/{node}.md").decode() == page
