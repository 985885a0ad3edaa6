"""Nodes for several references: join identities, and say how the photos of a person count together."""

from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.identity import (
    Identity,
    IdentityError,
    best_match,
    check_recogniser,
    describe,
    join_people,
    join_photos,
    weighted_mean,
)
from . import types
from .border import to_photos
from .checks import checked
from .identity import FoundFace, found_faces, named
from .managed import ManagedFaceModel

MORE_PHOTOS = "more photos of the same person"
MORE_PEOPLE = "further people"
FURTHER = ("identity_2", "identity_3", "identity_4")
SIDE_BY_SIDE = "all photos, side by side"
MEAN = "weighted mean"
BEST = "best match"


class JoinIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        further = [types.Identity.Input(name, optional=True, tooltip="Another identity to join.") for name in FURTHER]
        return io.Schema(
            node_id="RIDFR_JoinIdentities",
            display_name="Join Identities",
            category=types.CATEGORY,
            description="Makes one identity of several: more photos of the same person (of different size, or saved "
            "earlier), or further people for the next pictures of the batch.",
            search_aliases=["combine identities", "merge identities", "multiple references", "several people"],
            inputs=[
                types.Identity.Input("identity_1", tooltip="From Extract Identity or Load Identity."),
                io.Combo.Input(
                    "others",
                    options=[MORE_PHOTOS, MORE_PEOPLE],
                    default=MORE_PHOTOS,
                    display_name="the others are",
                    tooltip="Whether the other identities show the same person (or people, in the same order), "
                    "or people of their own.",
                ),
                *further,
            ],
            outputs=[types.Identity.Output(display_name="identity", tooltip="Goes where each alone could go.")],
        )

    @classmethod
    @checked
    def execute(cls, identity_1: Identity, others: str, **further: Identity | None) -> io.NodeOutput:
        join = join_photos if others == MORE_PHOTOS else join_people
        given = {1: identity_1} | {number: further.get(name) for number, name in enumerate(FURTHER, 2)}
        given = {number: identity for number, identity in given.items() if identity is not None}
        return io.NodeOutput(join([*given.values()], [*given]))


class CombineReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_CombineReferences",
            display_name="Combine References",
            category=types.CATEGORY,
            description="Says how several photos of a person count together. Without this node they stand side by "
            "side, and every part of the picture looks at the photo that suits it.",
            search_aliases=["reference method", "average embeddings", "best reference", "combine embeds"],
            inputs=[
                types.Identity.Input("identity", tooltip="One or more people with several photos each."),
                io.Combo.Input(
                    "method",
                    options=[SIDE_BY_SIDE, MEAN, BEST],
                    default=SIDE_BY_SIDE,
                    tooltip="'all photos, side by side': all are kept; weight 2 counts like a photo given twice. "
                    "'weighted mean': one average face of them. 'best match': the one photo that is most like the "
                    "degraded face, or, without one, most like the average; one of less weight must be more alike.",
                ),
                types.FaceModel.Input(
                    "face_model",
                    optional=True,
                    tooltip="For 'best match' with a degraded face: the face model of Extract Identity.",
                ),
                io.Image.Input(
                    "degraded",
                    optional=True,
                    display_name="degraded face",
                    tooltip="For 'best match': the pictures to be restored, one for each person. Where no face can be "
                    "found in one, the average of the photos is used.",
                ),
            ],
            outputs=[
                types.Identity.Output(display_name="identity", tooltip="Goes to Apply Identity."),
                io.String.Output(display_name="report", tooltip="What was kept of which photo."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        identity: Identity,
        method: str,
        face_model: ManagedFaceModel | None = None,
        degraded: Tensor | None = None,
    ) -> io.NodeOutput:
        chosen, doubts = [], []
        if method == MEAN:
            identity = weighted_mean(identity)
        elif method == BEST:
            found = degraded_faces(identity, face_model, degraded)
            probes = [found[i].embedding if i in found else None for i in range(len(identity.people))]
            doubts = face_model.model.doubts(named(found, "degraded image")) if found else []
            identity, photos = best_match(identity, probes)
            chosen = [
                f"person {number}: photo {photo + 1}, most like the {'average' if probe is None else 'degraded face'}"
                for number, (photo, probe) in enumerate(zip(photos, probes), start=1)
            ]
        report = "\n".join([*chosen, describe(identity), *doubts])
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(identity, report)


def degraded_faces(
    identity: Identity, face_model: ManagedFaceModel | None, degraded: Tensor | None
) -> dict[int, FoundFace]:
    """The degraded faces by the index of the person, where one is given and found."""
    people = len(identity.people)
    if degraded is None:
        return {}
    if face_model is None:
        raise IdentityError("The degraded face is compared with the photos by a face model: connect that, too.")
    check_recogniser(identity, face_model.model.name, face_model.model.digest)
    photos = to_photos(degraded, "degraded image")
    if len(photos) != people:
        raise IdentityError(f"There are {len(photos)} degraded images for {people} people: connect one for each.")
    return found_faces(face_model, photos)
