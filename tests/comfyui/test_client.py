"""The client that the demo and the tests drive ComfyUI with, on a graph of stock nodes."""

import io

import pytest
from PIL import Image

from tools.server import PromptError


def graph(colour, image=None):
    """A picture of one colour, or an uploaded one, saved."""
    source = ({"class_type": "LoadImage", "inputs": {"image": image}} if image else
              {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": colour}})
    return {"1": source, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t/c"}}}


def picture(client, entry):
    return Image.open(io.BytesIO(client.image(entry["outputs"]["2"]["images"][0])))


def test_run_and_fetch_a_picture(client):
    kinds = []
    entry = client.run(graph(0x804020), lambda kind, data: kinds.append(kind))
    assert picture(client, entry).getpixel((0, 0)) == (0x80, 0x40, 0x20)
    assert kinds[-1] == "execution_success" and "progress_state" in kinds


def test_two_prompts_at_once_are_told_apart(client):
    first, second = client.submit(graph(0x0000FF)), client.submit(graph(0x00FF00))
    assert picture(client, client.wait(second)).getpixel((0, 0)) == (0, 255, 0)
    assert picture(client, client.wait(first)).getpixel((0, 0)) == (0, 0, 255)


def test_uploaded_picture_is_loaded(client):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "PNG")
    name = client.upload_image("uploaded.png", file.getvalue())
    assert picture(client, client.run(graph(0, name))).getpixel((0, 0)) == (1, 2, 3)


def test_refused_graph_says_why(client):
    wrong = graph(0)
    del wrong["2"]["inputs"]["images"]
    with pytest.raises(PromptError, match="Required input is missing: images"):
        client.submit(wrong)
