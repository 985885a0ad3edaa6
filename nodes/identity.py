"""Nodes that say who a face is: extract an identity, compare two faces."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import comfy.clip_vision
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.faces import Face, align
from ..ridfr_core.identity import (
    Identity,
    Person,
    Quality,
    check_weights,
    describe,
    one_photo_each,
    parse_weights,
    reference_faces,
)
from ..ridfr_core.sharpness import estimate_degradation
from . import types
from .border import same_batch, to_comfy, to_core, to_photos
from .checks import checked
from .managed import CHUNK, ManagedFaceModel, loaded, one_by_one

ONE_PERSON = "all photos show one person"
MANY_PEOPLE = "each photo is another person"
ZERO_IMAGE: WeakKeyDictionary = WeakKeyDictionary()  # CLIP vision model -> what it says of zeros, while it lives


class ExtractIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_ExtractIdentity",
            display_name="Extract Identity",
            category=types.CATEGORY,
            description="Finds the face in each reference photo and works out what makes it this person's.",
            search_aliases=["face id", "faceid embeds", "face embedding", "reference photo"],
            inputs=[
                types.FaceModel.Input("face_model", tooltip="From Load Face Model; buffalo_l for FaceID adapters."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder that the adapter was made for: ViT-H for FaceID Plus and PlusV2, or the "
                    "one of the nano models. Plain FaceID adapters need none.",
                ),
                io.Image.Input(
                    "images",
                    tooltip="Good photos of the person, one face in each. Several photos, in a "
                    "batch, tell more than one.",
                ),
                io.Combo.Input(
                    "batch",
                    options=[ONE_PERSON, MANY_PEOPLE],
                    default=ONE_PERSON,
                    display_name="photos",
                    tooltip="Whether the photos show one person, or each of them the person for the picture "
                    "at the same place of the batch that is restored.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    tooltip="How much each photo counts beside the person's others, as in '1, 0.5, 1'. Leave empty for "
                    "all the same. 0 leaves a photo out. Of no effect if each photo is another person.",
                ),
            ],
            outputs=[
                types.Identity.Output(display_name="identity", tooltip="Who it is; goes to Apply Identity."),
                io.String.Output(
                    display_name="report",
                    tooltip="How good each photo is: height of the face, certainty of the detection, sharpness from 0 "
                    "to 1, and the length of the recogniser's answer, which is larger for better photos.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls, face_model: ManagedFaceModel, images: Tensor, batch: str, clip_vision=None, weights: str = ""
    ) -> io.NodeOutput:
        photos = to_photos(images, "reference image")
        counts = parse_weights("" if batch == MANY_PEOPLE else weights, len(photos))
        faces = reference_faces(face_model.ready(), one_by_one(photos))
        landmarks = torch.stack([face.landmarks for face in faces])
        crops = align(photos, landmarks, 112)
        features = face_model.features(crops)
        sharpness, clip = looks(clip_vision, photos, landmarks)
        quality = tuple(
            Quality(face.height, face.score, norm, sharp)
            for face, norm, sharp in zip(faces, features.norm(dim=-1).tolist(), sharpness)
        )
        person = Person(F.normalize(features, dim=-1), clip, counts, quality)
        check_weights(counts, "this person")
        recogniser = face_model.model
        identity = Identity((person,), zero_image_states(clip_vision), recogniser.digest, crops, recogniser.name)
        if batch == MANY_PEOPLE:
            identity = one_photo_each(identity)
        names = {f"reference image {number}": face for number, face in enumerate(faces, start=1)}
        report = "\n".join([describe(identity), *face_model.model.doubts(names, clean=True)])
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(identity, report)


def looks(
    clip_vision: comfy.clip_vision.ClipVisionModel | None, photos: Tensor, landmarks: Tensor
) -> tuple[list[float], Tensor | None]:
    """What the aligned 224 px crops of photos [B,3,H,W] show: sharpness, and CLIP's states [B,T,D] if there is a CLIP.

    Some crops at a time, for those of a thousand photos would fill the memory.
    """
    sharpness, states = [], []
    for part, points in one_by_one([*zip(photos.split(CHUNK), landmarks.split(CHUNK))]):
        crops = align(part, points, 224)
        sharpness += (1 - estimate_degradation(crops)).tolist()
        if clip_vision is not None:
            states.append(clip_states(clip_vision, crops))
    return sharpness, torch.cat(states) if states else None


def clip_states(clip_vision: comfy.clip_vision.ClipVisionModel, crops: Tensor) -> Tensor:
    """CLIP's penultimate hidden states [B,T,D] of aligned crops [B,3,224,224]."""
    return clip_vision.encode_image(to_comfy(crops))["penultimate_hidden_states"].float().cpu()


def zero_image_states(clip_vision: comfy.clip_vision.ClipVisionModel | None) -> Tensor | None:
    """CLIP's penultimate hidden states [T,D] of zeros *after* normalisation: the unconditional image of IP-Adapter.

    They are the same for every photo, so each CLIP is asked once.
    """
    if clip_vision is None:
        return None
    if (known := ZERO_IMAGE.get(clip_vision)) is None:
        pixels = torch.zeros(1, 3, clip_vision.image_size, clip_vision.image_size, device=loaded(clip_vision.patcher))
        known = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1][0].float().cpu()
        ZERO_IMAGE[clip_vision] = known
    return known


class CompareIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_CompareIdentity",
            display_name="Compare Identity",
            category=types.CATEGORY,
            description="Says how alike two faces are to a face recogniser: 1 is the same picture, about 0 are two "
            "strangers. What counts as the same person depends on the face model.",
            search_aliases=["face similarity", "id similarity", "cosine similarity", "same person", "arcface score"],
            inputs=[
                types.FaceModel.Input(
                    "face_model",
                    tooltip="The recogniser that judges. Another one than that of "
                    "Extract Identity gives the more honest answer.",
                ),
                io.Image.Input("image_a", display_name="image", tooltip="The faces to judge."),
                io.Image.Input(
                    "image_b",
                    display_name="compared with",
                    tooltip="The faces to compare with: one for each, or one for all.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="similarity", tooltip="The mean over all pairs in which both faces were found."
                ),
                io.String.Output(display_name="report", tooltip="A line for each pair, for Preview Any or Save Text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, face_model: ManagedFaceModel, image_a: Tensor, image_b: Tensor) -> io.NodeOutput:
        number = len(same_batch(image_a, image_b, "The first input", "the second")[0])
        faces, others = (found_faces(face_model, to_core(image)) for image in (image_a, image_b))
        pairs = [(faces.get(i % len(image_a)), others.get(i % len(image_b))) for i in range(number)]
        scores = [float(a.embedding @ b.embedding) if a and b else None for a, b in pairs]
        found = [score for score in scores if score is not None]
        mean = sum(found) / len(found) if found else 0.0
        lines = [similarity_line(i, *pair, score) for i, (pair, score) in enumerate(zip(pairs, scores), start=1)]
        doubts = face_model.model.doubts(named(faces, "image") | named(others, "image to compare with"))
        summary = f"similarity {mean:.3f} over {len(found)} of {len(scores)}" if found else "no pair with two faces"
        text = "\n".join([summary, *lines, *doubts])
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(mean, text, ui={"text": [text], "similarity": scores})


class FoundFace(NamedTuple):
    """The largest face of a photo: where it is, its aligned crop [3,112,112] and its unit embedding [D]."""

    face: Face
    crop: Tensor
    embedding: Tensor


def found_faces(face_model: ManagedFaceModel, photos: Tensor) -> dict[int, FoundFace]:
    """As `ManagedFaceModel.largest_faces`, with crops and embeddings."""
    faces = face_model.largest_faces(photos)
    if not faces:
        return {}
    crops = torch.cat([align(photos[[i]], face.landmarks[None]) for i, face in faces.items()])
    seen = zip(faces.values(), crops, face_model.embed(crops))
    return {i: FoundFace(*one) for i, one in zip(faces, seen)}


def named(found: dict[int, FoundFace], what: str) -> dict[str, Face]:
    """Faces by the name of their picture, as errors and notes call it."""
    return {f"{what} {i + 1}": one.face for i, one in found.items()}


def face_embeddings(face_model: ManagedFaceModel, photos: Tensor) -> list[Tensor | None]:
    """Unit embedding [D] of the largest face in each image of [B,3,H,W], None where there is none."""
    found = found_faces(face_model, photos)
    return [found[i].embedding if i in found else None for i in range(len(photos))]


def similarity_line(number: int, face: FoundFace | None, other: FoundFace | None, score: float | None) -> str:
    if face is None:
        return f"image {number}: no face found"
    if other is None:
        return f"image {number}: no face found in the image to compare with"
    return f"image {number}: {score:.3f}"
