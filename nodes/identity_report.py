"""The node that shows how alike results and reference photos are."""

import numpy
import torch
from comfy_api.latest import io, ui
from server import PromptServer
from torch import Tensor

from ..ridfr_core.identity import Identity, IdentityError
from ..ridfr_core.identity_report import Seen, report_sheet, report_text
from . import types
from .border import to_photos
from .checks import checked
from .identity import FoundFace, found_faces, named
from .managed import ManagedFaceModel


class IdentityReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_IdentityReport",
            display_name="Identity Report",
            category=types.CATEGORY,
            description="A table of faces: how alike the restored pictures and the reference photos are, and the "
            "reference photos among themselves. A photo that is unlike the others may show somebody else.",
            search_aliases=["similarity matrix", "face similarity table", "check references", "identity plot"],
            inputs=[
                types.FaceModel.Input(
                    "face_model",
                    tooltip="The recogniser that judges. Another one than that of Extract Identity gives the more "
                    "honest answer.",
                ),
                types.Identity.Input("identity", tooltip="The people and their reference photos."),
                io.Image.Input(
                    "images",
                    optional=True,
                    display_name="restored",
                    tooltip="The restored pictures: one for each person, or any number of one person. Without them the "
                    "report is about the reference photos alone.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="The table as a picture."),
                io.String.Output(display_name="report", tooltip="The same in words, line by line."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, face_model: ManagedFaceModel, identity: Identity, images: Tensor | None = None) -> io.NodeOutput:
        references = seen_references(face_model, identity)
        results, doubts = [], []
        if images is not None:
            photos = to_photos(images, "restored image")
            check_number(photos, identity)
            found = found_faces(face_model, photos)
            results = seen_results(found, photos, identity)
            doubts = face_model.model.doubts(named(found, "restored image"))
        sheet = report_sheet(results, references, f"1.2 is photo 2 of person 1; judged by {face_model.model.name}")
        text = "\n".join([report_text(results, references), *doubts])
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        table = torch.from_numpy(numpy.asarray(sheet, dtype=numpy.float32) / 255)[None]
        return io.NodeOutput(table, text, ui=ui.PreviewImage(table))


def seen_references(face_model: ManagedFaceModel, identity: Identity) -> list[Seen]:
    embeddings = iter(face_model.embed(identity.thumbnails))
    return [
        Seen(f"{person}.{photo}", crop, person, next(embeddings))
        for person, crops in enumerate(identity.crops(), start=1)
        for photo, crop in enumerate(crops, start=1)
    ]


def check_number(photos: Tensor, identity: Identity) -> None:
    """Raises IdentityError for another number of photos than of people, if those are several."""
    people = len(identity.people)
    if people not in (1, len(photos)):
        raise IdentityError(f"There are {len(photos)} restored images for {people} people: connect one for each.")


def seen_results(found: dict[int, FoundFace], photos: Tensor, identity: Identity) -> list[Seen]:
    """The faces that were found in [B,3,H,W], whole pictures where there is none."""
    people = len(identity.people)
    faces = [(found[i].crop, found[i].embedding) if i in found else (photo, None) for i, photo in enumerate(photos)]
    return [
        Seen(f"result {i}", crop, i if people > 1 else 1, embedding)
        for i, (crop, embedding) in enumerate(faces, start=1)
    ]
