"""The node that says what is missing."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from comfyui_version import __version__
from server import PromptServer

from ..ridfr_core import doctor, known_models
from . import types
from .checks import checked

ALL = "all"


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_Doctor",
            display_name="RIDFR Doctor",
            category=types.CATEGORY,
            description="Checks whether the models and packages that the RIDFR graphs need are there, and says what is "
            "missing, where to get it and where to put it. It downloads nothing.",
            search_aliases=["missing models", "model check", "diagnose", "health check", "troubleshoot", "help"],
            inputs=[
                io.Combo.Input(
                    "graph",
                    options=[ALL, *known_models.WORKFLOWS],
                    default=ALL,
                    tooltip="The graph that you want to run, or all of them.",
                ),
                io.Boolean.Input(
                    "hashes",
                    default=False,
                    display_name="compare hashes",
                    tooltip="Also compare every file with the published one to the last bit. It reads the files whole: "
                    "about a minute.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="A line for each thing that was looked at.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")  # never the same: files come and go

    @classmethod
    @checked
    def execute(cls, graph: str, hashes: bool) -> io.NodeOutput:
        graphs = list(known_models.WORKFLOWS) if graph == ALL else [graph]
        findings = list(doctor.examine(folders(), __version__, graphs, hashes))
        text = "\n".join([*map(str, findings), doctor.verdict(findings, graphs)])
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(text, ui={"text": [text]})


def folders() -> dict[str, list[Path]]:
    """The model folders of this ComfyUI, extra_model_paths included, and its output folder."""
    found = {name: [Path(folder) for folder in folder_paths.get_folder_paths(name)] for name in doctor.SEARCHED}
    return found | {"output": [Path(folder_paths.get_output_directory())]}
