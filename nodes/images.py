"""Nodes from IMAGE to IMAGE: degrade, fix colours, draw nano people."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ridfr_core.color import CHROMA, METHODS, fix_colors
from ..ridfr_core.degradation import DegradationRange, degrade
from ..ridfr_core.errors import RidfrError
from ..ridfr_core.nano.portraits import SPLITS, render
from . import types
from .border import fit_to, same_batch, to_comfy, to_core
from .checks import checked

EACH = " Each picture gets a random value between the two; make them equal for a fixed one."
# input, name, default range, limits, tooltip; in the order of DegradationRange
DEGRADATIONS = (
    ("blur", "blur", (1.0, 6.0), (0.0, 20.0), "How wide the blur is, in pixels (sigma)."),
    ("scale", "downscale", (4.0, 12.0), (1.0, 64.0), "How many times smaller the picture gets, before it is enlarged."),
    ("noise", "noise", (0.0, 15.0), (0.0, 100.0), "How strong the grain is, in grey levels out of 255."),
    ("quality", "JPEG quality", (40.0, 90.0), (1.0, 100.0), "100 is nearly lossless, 30 is bad."),
)


class DegradeFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        ranges = [
            io.Float.Input(
                f"{input}_{end}",
                display_name=f"{label}, {'least' if end == 'min' else 'most'}",
                default=default,
                min=limits[0],
                max=limits[1],
                step=0.1,
                tooltip=tooltip + EACH,
            )
            for input, label, defaults, limits, tooltip in DEGRADATIONS
            for end, default in zip(("min", "max"), defaults, strict=True)
        ]
        return io.Schema(
            node_id="RIDFR_DegradeFace",
            display_name="Degrade Face",
            category=types.CATEGORY,
            description="Makes good photos look like old and small ones: adds blur, low resolution, noise and JPEG, "
            "in this order. For tests: restore the result and compare with the photo.",
            search_aliases=["degradation", "low quality", "blur noise jpeg", "downscale", "make lq"],
            inputs=[
                io.Image.Input("image", tooltip="Good photos. The result has the same size."),
                *ranges,
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=types.LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="The same seed degrades the same photos in the same way.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The degraded photos, in the size of the good ones.")
            ],
        )

    @classmethod
    @checked
    def execute(cls, image: Tensor, seed: int, **bounds: float) -> io.NodeOutput:
        for name, label, *_ in DEGRADATIONS:
            least, most = bounds[f"{name}_min"], bounds[f"{name}_max"]
            if least > most:
                raise RidfrError(f"Degrade Face: {label}, least is {least:g}, more than {label}, most with {most:g}: "
                                 "swap the two.")
        photos = to_core(image)
        generator = torch.Generator().manual_seed(seed)
        ranges = DegradationRange(*((bounds[f"{name}_min"], bounds[f"{name}_max"]) for name, *_ in DEGRADATIONS))
        degraded = degrade(photos, **ranges.draw(len(photos), generator), generator=generator)
        return io.NodeOutput(to_comfy(degraded))


class ColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_ColorFix",
            display_name="Color Fix",
            category=types.CATEGORY,
            description="Gives a restored picture the colours of the degraded one, since restoring shifts them. A "
            "black-and-white photo stays black and white, and a sepia or otherwise toned one keeps its tone.",
            search_aliases=[
                "color correction", "colour fix", "color match", "wavelet color fix", "adain", "black and white",
                "sepia",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The restored pictures: their details are kept."),
                io.Image.Input(
                    "color_from",
                    display_name="colours from",
                    tooltip="The degraded pictures: their colours are taken. One for each, or one for all.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="wavelet",
                    tooltip="'wavelet' takes colour and light place by place, 'adain' only the overall tone.",
                ),
                io.Int.Input(
                    "levels",
                    default=5,
                    min=1,
                    max=8,
                    tooltip="For 'wavelet': 1 takes even small spots of colour from the degraded picture, 8 only the "
                    "overall colour of large areas. More levels leave more of the restored picture as it is.",
                ),
                io.Combo.Input(
                    "chroma",
                    options=list(CHROMA),
                    default="auto",
                    tooltip="Where the fine colours come from, such as that of lips. 'restored': from the restored "
                    "picture. 'tone': one colour for each brightness, as in a black-and-white or sepia photo. 'auto': "
                    "'tone' where the degraded picture is such a photo, otherwise 'restored'. 'original': all from the "
                    "degraded picture, with its stains.",
                    optional=True,  # graphs in the API's format from before it was there lack it
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The restored pictures in the other's colours.")],
        )

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, color_from: Tensor, method: str, levels: int, chroma: str = "auto"
    ) -> io.NodeOutput:
        content = to_core(image)
        style = fit_to(to_core(color_from), content.shape[-2:], "The image with the colours", "the restored one")
        content, style = same_batch(content, style, "The restored image", "the image with the colours")
        return io.NodeOutput(to_comfy(fix_colors(content, style, method, chroma, levels)))


class NanoPortraits(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        people = len(SPLITS["test"])
        return io.Schema(
            node_id="RIDFR_NanoPortraits",
            display_name="Nano Portraits",
            category=types.CATEGORY,
            description="Draws invented people whom the nano models have never seen in training.",
            search_aliases=["test faces", "procedural portraits", "synthetic faces", "demo faces"],
            inputs=[
                io.Int.Input(
                    "first_person",
                    display_name="first person",
                    default=0,
                    min=0,
                    max=people - 1,
                    tooltip="The number of the first person to draw.",
                ),
                io.Int.Input("people", default=6, min=1, max=64, tooltip="How many people to draw, one picture each."),
                io.Int.Input(
                    "view",
                    default=1,
                    min=0,
                    max=0x7FFFFFFF,
                    tooltip="The same people with another pose, expression, light, hair and background for each "
                    "number.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="One picture of 128x128 pixels per person.")],
        )

    @classmethod
    @checked
    def execute(cls, first_person: int, people: int, view: int) -> io.NodeOutput:
        identities = SPLITS["test"][first_person : first_person + people]
        if len(identities) < people:
            raise RidfrError(
                f"There are {len(SPLITS['test'])} people to draw, numbered from 0, so {people} from number "
                f"{first_person} are too many: start with a smaller number."
            )
        portraits = render(torch.tensor(identities), torch.full((people,), view))
        return io.NodeOutput(to_comfy(portraits.image))
