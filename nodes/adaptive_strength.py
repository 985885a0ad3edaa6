"""The node that makes the identity's strength follow how degraded each picture is."""

from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.sharpness import estimate_degradation
from . import types
from .border import to_photos
from .checks import checked


class AdaptiveStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_AdaptiveStrength",
            display_name="Adaptive Strength",
            category=types.CATEGORY,
            description="Estimates how degraded each face is, from 0 (sharp) to 1 (nothing left), and gives the "
            "identity a strength to match: a mild blur still shows who it is, a ruined picture does not. Blur, low "
            "resolution and fine grain count as degradation; strong grain that was enlarged with the picture may be "
            "taken for detail.",
            search_aliases=["estimate degradation", "blur detection", "adaptive scale", "sharpness", "restorerid"],
            inputs=[
                io.Image.Input("degraded", display_name="degraded face", tooltip="Pictures filled by one face each."),
                io.Float.Input(
                    "least",
                    default=0.2,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="The strength for a face that is not degraded at all.",
                ),
                io.Float.Input(
                    "most",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="The strength for a face of which nothing is left.",
                ),
            ],
            outputs=[
                types.Strengths.Output(display_name="strengths", tooltip="One for each picture; to Apply Identity."),
                io.Float.Output(display_name="degradation", tooltip="The mean over all pictures, from 0 to 1."),
                io.String.Output(display_name="report", tooltip="A line for each picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, degraded: Tensor, least: float, most: float) -> io.NodeOutput:
        estimates = estimate_degradation(to_photos(degraded, "degraded image")).cpu()
        strengths = least + (most - least) * estimates
        lines = [
            f"image {number}: degradation {estimate:.2f}, strength {strength:.2f}"
            for number, (estimate, strength) in enumerate(zip(estimates.tolist(), strengths.tolist()), start=1)
        ]
        report = "\n".join(lines)
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(strengths, estimates.mean().item(), report)
