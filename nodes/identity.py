"""Nodes that say who a face is: extract an identity, apply it, compare two."""

import comfy.clip_vision
import comfy.model_management
import torch
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.faces import align
from ..ridfr_core.identity import Identity, Person, reference_faces
from . import types
from .border import same_batch, to_comfy, to_core, to_photos
from .id_attention import IdentityAttention, cross_attention_widths, install
from .managed import ManagedAdapter, ManagedFaceModel, loaded

ONE_PERSON = "all photos show one person"
MANY_PEOPLE = "each photo is another person"


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
                    tooltip="The image encoder that the adapter was made for: ViT-H for "
                    "FaceID Plus and PlusV2, or the one of the nano models.",
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
            ],
            outputs=[types.Identity.Output(display_name="identity", tooltip="Who it is; goes to Apply Identity.")],
        )

    @classmethod
    def execute(cls, face_model: ManagedFaceModel, clip_vision, images: Tensor, batch: str) -> io.NodeOutput:
        photos = to_photos(images, "reference image")
        landmarks = reference_faces(face_model.model, photos)
        crops = align(photos, landmarks, 112)
        embeddings = face_model.embed(crops)
        clip = clip_vision.encode_image(to_comfy(align(photos, landmarks, 224)))["penultimate_hidden_states"].float()
        groups = [slice(None)] if batch == ONE_PERSON else [slice(i, i + 1) for i in range(len(photos))]
        people = tuple(Person(embeddings[g], clip[g], torch.ones(len(embeddings[g]))) for g in groups)
        return io.NodeOutput(Identity(people, zero_image_states(clip_vision), face_model.model.digest, crops))


def zero_image_states(clip_vision: comfy.clip_vision.ClipVisionModel) -> Tensor:
    """CLIP's penultimate hidden states [T,D] of zeros *after* normalisation: the unconditional image of IP-Adapter."""
    pixels = torch.zeros(1, 3, clip_vision.image_size, clip_vision.image_size, device=loaded(clip_vision.patcher))
    return clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1][0].float().cpu()


class ApplyIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_ApplyIdentity",
            display_name="Apply Identity",
            category=types.CATEGORY,
            description="Makes the model draw this person's face. Several can follow one another.",
            search_aliases=["ip-adapter faceid apply", "apply faceid", "face identity", "same person"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model: SD1.5 or SDXL, as the adapter."),
                types.IdentityAdapter.Input("adapter", tooltip="From Load Identity Adapter."),
                types.Identity.Input(
                    "identity",
                    tooltip="From Extract Identity. With several people, there must be as "
                    "many pictures in the batch as people.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the face is drawn towards this person: 0 not at all, 1 as trained.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_name="start",
                    tooltip="The part of the run at which the identity sets in: 0 is the beginning.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_name="end",
                    tooltip="The part of the run at which the identity stops acting: 1 is the end.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model that knows the person; goes to the sampler.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        adapter: ManagedAdapter,
        identity: Identity,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        check_fit(model, adapter, identity)
        if strength == 0 or start_percent >= end_percent:
            return io.NodeOutput(model)
        sigmas = None
        if (start_percent, end_percent) != (0.0, 1.0):
            sampling = model.get_model_object("model_sampling")
            sigmas = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
        layers = zip(adapter.adapter.layers, keys_values(adapter, identity), strict=True)
        patches = {place: IdentityAttention(keys, values, strength, sigmas) for place, (keys, values) in layers}
        return io.NodeOutput(install(model, patches))


def check_fit(model, adapter: ManagedAdapter, identity: Identity) -> None:
    """Raises ValueError if the adapter is of another family than the model or the image encoder."""
    widths = cross_attention_widths(model)
    expected = dict(zip(adapter.adapter.layers, adapter.adapter.channels, strict=True))
    if widths != expected:
        raise ValueError(
            f"The adapter {adapter.name} is {family(expected)} but the model is {family(widths)}: load an "
            "adapter made for this model."
        )
    needed = adapter.adapter.image_proj.perceiver_resampler.proj_in.in_features
    width = identity.people[0].clip.shape[-1]
    if width != needed:
        raise ValueError(
            f"The adapter {adapter.name} needs a CLIP vision model of width {needed} but the identity was "
            f"extracted with one of width {width}: extract it with the other."
        )


def family(widths: dict) -> str:
    name = {70: "for SDXL", 16: "for SD1.5"}.get(len(widths), "of another kind")
    return f"{name} ({len(widths)} cross-attention layers, the widest has {max(widths.values(), default=0)} channels)"


def keys_values(adapter: ManagedAdapter, identity: Identity) -> list[tuple[Tensor, Tensor]]:
    """K' and V' of every layer, [people + 1, tokens, channels]: of each person, then of no one.

    The tokens of a person's photos stand side by side, so that attention chooses among them.
    """
    device = loaded(adapter.patcher)
    embeddings = torch.cat([person.embeddings for person in identity.people] + [torch.zeros(1, 512)])
    clip = torch.cat([person.clip for person in identity.people] + [identity.clip_uncond[None]])
    tokens = adapter.adapter.tokens(embeddings.to(device), clip.to(device), adapter.shortcut)
    photos = len(identity.people[0].embeddings)
    people = tokens[:-1].unflatten(0, (-1, photos)).flatten(1, 2)
    tokens = torch.cat([people, tokens[-1:].repeat(1, photos, 1)])
    return [(k.cpu(), v.cpu()) for k, v in adapter.adapter.keys_values(tokens)]


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
    def execute(cls, face_model: ManagedFaceModel, image_a: Tensor, image_b: Tensor) -> io.NodeOutput:
        image_a, image_b = same_batch(image_a, image_b, "The first input", "the second")
        a = face_embeddings(face_model, to_core(image_a, "image"))
        b = face_embeddings(face_model, to_core(image_b, "image to compare with"))
        scores = [float(x @ y) if x is not None and y is not None else None for x, y in zip(a, b, strict=True)]
        found = [score for score in scores if score is not None]
        mean = sum(found) / len(found) if found else 0.0
        lines = [
            describe(number, x, y, score) for number, (x, y, score) in enumerate(zip(a, b, scores, strict=True), 1)
        ]
        text = "\n".join([f"similarity {mean:.3f} over {len(found)} of {len(scores)}", *lines])
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(mean, text, ui={"text": [text], "similarity": scores})


def face_embeddings(face_model: ManagedFaceModel, photos: Tensor) -> list[Tensor | None]:
    """Unit embedding [512] of the largest face in each image of [B,3,H,W], None where there is none."""
    faces = {i: found[0] for i, photo in enumerate(photos) if (found := face_model.model.detector.detect(photo))}
    embeddings = [None] * len(photos)
    if faces:
        crops = align(photos[list(faces)], torch.stack([face.landmarks for face in faces.values()]))
        for i, embedding in zip(faces, face_model.embed(crops), strict=True):
            embeddings[i] = embedding
    return embeddings


def describe(number: int, a: Tensor | None, b: Tensor | None, score: float | None) -> str:
    if a is None:
        return f"image {number}: no face found"
    if b is None:
        return f"image {number}: no face found in the image to compare with"
    return f"image {number}: {score:.3f}"
