"""The demo: two graphs through a real server, and a contact sheet of what came out.

workflows/ridfr_nano.json restores blindly and with RIDFR; ridfr_nano_guided.json adds ID-Preserving Sampling. Here the
last person's degraded photo is black and white, as old ones are.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .cache import CHECKOUT
from .server import Client, PromptError, Server, device_flags, link_pack
from .steps import StepError, say

WORKFLOWS = [CHECKOUT / "workflows" / name for name in ("ridfr_nano.json", "ridfr_nano_guided.json")]
SHEET = CHECKOUT / "output" / "ridfr_nano.png"
COLUMNS = {"lq": "LQ", "blind": "blind", "ridfr": "RIDFR", "guided": "RIDFR, guided",
           "truth": "ground truth", "reference": "reference"}
SIMILARITIES = {"Similarity: LQ": "LQ", "Similarity: blind": "blind", "Similarity: RIDFR": "RIDFR",
                "Similarity: RIDFR and guidance": "RIDFR, guided", "Similarity: reference": "reference"}


@dataclass(frozen=True)
class Results:
    images: dict[str, list[dict]]  # column -> the server's entry of each person's picture
    similarity: dict[str, list[float | None]]  # column -> each person's to the ground truth; None: no face was found

    def __or__(self, other: Results) -> Results:
        return Results(self.images | other.images, self.similarity | other.similarity)


def main() -> None:
    parser = argparse.ArgumentParser(prog="ridfr demo", description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--base", type=Path, required=True, help="the server's base directory")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="the picture to write (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        demo(options.tree, options.base, options.sheet)
    except StepError as error:
        sys.exit(f"ridfr: {error}")
    except PromptError as error:
        sys.exit(f"ridfr: Running the graph failed: {error} ComfyUI's log is {options.base / 'server.log'}.")
    except OSError as error:
        sys.exit(f"ridfr: The demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("ridfr: interrupted; the server is stopped")


def demo(tree: Path, base: Path, sheet: Path) -> None:
    from PIL import Image

    began = time.monotonic()
    results = Results({}, {})
    link_pack(base)
    say("starting ComfyUI")
    with Server(sys.executable, tree, base, device_flags(sys.executable)) as server, Client(server.url) as client:
        nodes = client.object_info()
        for path in WORKFLOWS:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            graph = fade_last(to_api(workflow, nodes))
            say(f"running {path.name} on {server.url}")
            results |= collect(workflow, graph, client.run(graph, Progress(graph))["outputs"])
        pictures = {column: [Image.open(io.BytesIO(client.image(entry))).convert("RGB")
                             for entry in results.images[column]] for column in COLUMNS.values()}
    similarity = {column: results.similarity[column] for column in SIMILARITIES.values()}
    draw(pictures, similarity, sheet)
    print(table(similarity))
    say(f"contact sheet: {sheet} ({time.monotonic() - began:.0f} s)")


def to_api(workflow: dict, object_info: dict) -> dict:
    """The editor's format to the one that /prompt takes, as the editor would do it."""
    from comfy_cli.workflow_to_api import convert_ui_to_api

    if missing := sorted({node["type"] for node in workflow["nodes"]} - object_info.keys() - {"Note", "MarkdownNote"}):
        raise StepError("Reading the workflow", f"this ComfyUI has no node {', '.join(missing)}",
                        "Look in the server's log for why the pack did not load.")
    return convert_ui_to_api(workflow, object_info)


def fade_last(graph: dict) -> dict:
    """The graph with the last of the degraded photos in black and white, by stock nodes, wherever it goes."""
    lq = next(name for name, node in graph.items() if node["class_type"] == "RIDFR_DegradeFace")
    others = graph[graph[lq]["inputs"]["image"][0]]["inputs"]["people"] - 1
    faded = {
        "others": ("ImageFromBatch", {"image": [lq, 0], "batch_index": 0, "length": others}),
        "last": ("ImageFromBatch", {"image": [lq, 0], "batch_index": others, "length": 1}),
        "light": ("ImageToMask", {"image": ["last", 0], "channel": "green"}),
        "grey": ("MaskToImage", {"mask": ["light", 0]}),
        "photos": ("ImageBatch", {"image1": ["others", 0], "image2": ["grey", 0]}),
    }
    rewired = {name: node | {"inputs": {slot: ["photos", 0] if value == [lq, 0] else value
                                        for slot, value in node["inputs"].items()}} for name, node in graph.items()}
    return rewired | {name: {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
                      for name, (kind, inputs) in faded.items()}


def collect(workflow: dict, graph: dict, outputs: dict) -> Results:
    """Sort a prompt's outputs into the sheet's columns: pictures by SaveImage's prefix, similarities by title."""
    prefixes = {node: Path(api["inputs"]["filename_prefix"]).name
                for node, api in graph.items() if api["class_type"] == "SaveImage"}
    titles = {node.get("title"): str(node["id"]) for node in workflow["nodes"]}
    return Results({COLUMNS[name]: outputs[node]["images"] for node, name in prefixes.items() if name in COLUMNS},
                   {column: outputs[titles[title]]["similarity"]
                    for title, column in SIMILARITIES.items() if title in titles})


TITLE = """ID similarity to the ground truth. 1: the same picture, 0: a stranger; the reference, another photo of the
person, is about the best to expect. LQ faces are too blurred for their numbers to mean much. The mean is over the
people with a face in every column; so few say little, ridfr_core/nano/MODEL_CARD.md has 96."""


def table(similarity: dict[str, list[float | None]]) -> str:
    """Each person's similarity to the ground truth, a column each, and the mean over the people with a face in all."""
    def row(name: str, values: list[float | None]) -> str:
        return f"{name:<10}" + "".join(f"{'no face' if v is None else format(v, '.3f'):>15}" for v in values)

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    people = list(zip(*similarity.values(), strict=True))
    found = [values for values in people if None not in values]
    means = [mean(list(column)) for column in zip(*found)] or [None] * len(similarity)
    return "\n".join([TITLE, " " * 10 + "".join(f"{name:>15}" for name in similarity),
                      *(row(f"person {n}", values) for n, values in enumerate(people, 1)), row("mean", means)])


def draw(pictures: dict, similarity: dict[str, list[float | None]], sheet: Path) -> None:
    sys.path.insert(0, str(CHECKOUT))
    from ridfr_core.contact_sheet import contact_sheet

    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, similarity, "RIDFR nano: people never seen in training",
                  "ID: similarity to the ground truth, to a recogniser that restoration never used. "
                  "The last photo is black and white, and so is what comes of it.").save(sheet)


class Progress:
    """A bar that follows a prompt's websocket messages; a line per node where the output is no terminal."""

    def __init__(self, graph: dict, width: int = 30):
        self._names = {node: api["_meta"]["title"] for node, api in graph.items()}
        self._work = {node: api["inputs"].get("steps", 1) for node, api in graph.items()}  # a step counts as a node
        self._done: set[str] = set()
        self._width, self._shown = width, ""

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "execution_cached":
            self._done.update(data["nodes"])
        elif kind == "progress_state":
            for node, state in data["nodes"].items():
                if state["state"] == "finished":
                    self._done.add(node)
                elif state["state"] == "running":
                    self._show(node, state["value"] / max(state["max"], 1))
        elif kind == "execution_success":
            self._done.update(self._names)
            self._show("", 0)
            print(flush=True)

    def _show(self, node: str, part: float) -> None:
        work = sum(self._work[done] for done in self._done) + part * self._work.get(node, 0)
        share = work / sum(self._work.values())
        name = self._names.get(node, "done")
        if sys.stdout.isatty():
            filled = round(share * self._width)
            print(f"\r[{'#' * filled}{'.' * (self._width - filled)}] {share:4.0%} {name:<40.40}", end="", flush=True)
        elif name != self._shown:
            print(f"[{share:4.0%}] {name}", flush=True)
        self._shown = name


if __name__ == "__main__":
    main()
