"""ID-Preserving Sampling (ID-PreFeR, section 3.4), and the plot of what it did."""

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.face_model import OnnxRecogniser
from ..ridfr_core.faces import align, usual_place
from ..ridfr_core.guidance import (
    AUTO,
    BEST,
    DECODE_MODES,
    FIND_EVERY,
    MEAN,
    STEP,
    GuidanceError,
    references_of,
)
from ..ridfr_core.guided_face import Sight
from ..ridfr_core.identity import Identity, check_recogniser
from ..ridfr_core.line_chart import line_chart
from . import types
from .border import to_photos
from .checks import checked
from .guidance_record import Curve, Record
from .guided_networks import taesd_file
from .guided_run import GuidedSampling, Settings, Subject, check_fit
from .managed import ManagedFaceModel
from .noise_range import END, START, NoiseRange

UNKNOWN = (
    "This latent is not the result of a run that the guidance knows, so there is nothing to plot: connect the latent "
    "of the sampler that has the guided model, and let it run again."
)
RELATIVE, RAW = "relative to the noise", "raw, as in the paper"
USUAL_PLACE, LEAVE_ALONE = "take the usual place", "leave the picture alone"


class IDPreservingSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_IDPreservingSampling",
            display_name="ID-Preserving Sampling",
            category=types.CATEGORY,
            description="While the sampler runs, looks at the picture that is taking shape and moves it so that a face "
            "recogniser sees the person in it. Works on top of any other way to bring the person in, or alone, with "
            "every sampler; each guided step takes longer. Models: SD1.5, SDXL and their like.",
            search_aliases=["id guidance", "arcface guidance", "face guidance", "id-prefer", "identity loss"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, before or after Apply Identity and LoRAs."),
                io.Vae.Input("vae", tooltip="The VAE of this model: the picture is looked at through it."),
                types.FaceModel.Input(
                    "face_model",
                    tooltip="The recogniser that guides, the same one that the identity was extracted with: buffalo_l "
                    "or antelopev2.",
                ),
                types.Identity.Input(
                    "identity",
                    tooltip="From Extract Identity: one person for all pictures, or one for each picture of the batch.",
                ),
                io.Image.Input(
                    "lq_image",
                    display_name="LQ image",
                    tooltip="The degraded pictures that are being restored: they say where the face is. One for all, "
                    "or one for each picture of the batch.",
                ),
                io.Float.Input(
                    "step_size",
                    display_name="step size",
                    default=STEP,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="How far the picture is moved at once; 0 switches guidance off. Too much pleases "
                    "the recogniser but makes the face strange: compare with a second recogniser in Compare Identity.",
                ),
                io.Combo.Input(
                    "step_kind",
                    display_name="step size is",
                    options=[RELATIVE, RAW],
                    default=RELATIVE,
                    tooltip=f"'{RELATIVE}': 0.1 changes the predicted noise at the face by a tenth, whatever the model "
                    f"and the moment; 0.03 to 0.2 are usual. '{RAW}': the gradient is multiplied by it; right values "
                    "differ from model to model and may be in the hundreds.",
                ),
                io.Int.Input(
                    "iterations",
                    default=1,
                    min=1,
                    max=20,
                    tooltip="How many times the picture is moved in each step. Each costs about the same time.",
                ),
                io.Float.Input(
                    "start_percent",
                    display_name="start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=START.format(what="guidance"),
                ),
                io.Float.Input(
                    "end_percent",
                    display_name="end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=END.format(what="guidance"),
                ),
                io.Float.Input(
                    "target",
                    display_name="target similarity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A face that is this similar already is left alone; 1 never stops. Two photos of a person "
                    "are seldom more alike than 0.7, so more is not more likeness.",
                ),
                io.Combo.Input(
                    "references",
                    options=[AUTO, MEAN, BEST],
                    default=AUTO,
                    tooltip=f"With several photos of the person: '{AUTO}' takes the one most similar to the LQ face, "
                    f"'{MEAN}' their average, '{BEST}' at each step the one that is most similar then.",
                ),
                io.Combo.Input(
                    "no_face",
                    display_name="where no face is found",
                    options=[USUAL_PLACE, LEAVE_ALONE],
                    default=USUAL_PLACE,
                    tooltip=f"In a very bad LQ image: '{USUAL_PLACE}' assumes the place that it has in pictures "
                    f"cropped to a face, such as FFHQ's; '{LEAVE_ALONE}' does not guide that picture.",
                ),
                io.Combo.Input(
                    "decode",
                    options=list(DECODE_MODES),
                    default="face",
                    tooltip="How the picture is looked at. 'face' decodes brows to mouth alone and takes hair and neck "
                    "from the picture in which the face was found; 'whole picture' is exact, and takes more time and "
                    "memory the larger the picture is beside the face; 'checkpointed' computes some things twice to "
                    "keep less in memory; 'bf16' computes in half precision, less exact; 'TAESD' uses ComfyUI's "
                    "preview decoder from models/vae_approx, fast and approximate. When memory runs out, the next one "
                    "is used.",
                ),
                io.Int.Input(
                    "find_every",
                    display_name="find the face again every",
                    default=FIND_EVERY,
                    min=0,
                    max=100,
                    tooltip="At the first guided step, and again after so many, the face is looked for in the picture "
                    "that is taking shape: in a very degraded photo its place is only a guess. Each time costs "
                    "a decoding and a search. 0: never.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The guided model; goes to the sampler."),
                types.Guidance.Output(
                    display_name="guidance", tooltip="What happens at each step; goes to Guidance Plot."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        vae,
        face_model: ManagedFaceModel,
        identity: Identity,
        lq_image: Tensor,
        references: str,
        no_face: str,
        step_kind: str,
        step_size: float,
        iterations: int,
        start_percent: float,
        end_percent: float,
        target: float,
        decode: str,
        find_every: int,
    ) -> io.NodeOutput:
        check_fit(model, vae)
        check_recogniser(identity, face_model.model.name, face_model.model.digest)
        if isinstance(face_model.model.recogniser, OnnxRecogniser):
            raise GuidanceError(
                f"The recogniser of the face model {face_model.model.name} passes no gradient, so it cannot guide: use "
                "a face model with an ArcFace ResNet, such as buffalo_l or antelopev2, here and in Extract Identity."
            )
        if step_size == 0 or start_percent >= end_percent:
            why = "its step size is 0" if step_size == 0 else "its start is not before its end"
            off = f"Guidance is off, since {why}."
            PromptServer.instance.send_progress_text(off, cls.hidden.unique_id)  # shown on the node
            return io.NodeOutput(model, Record([off], off=True))
        if DECODE_MODES[decode].approximate:
            taesd_file(model.get_model_object("latent_format"))
        record = Record()
        guided = subjects(face_model, identity, to_photos(lq_image, "LQ image"), references, no_face, record.notes)
        settings = Settings(
            step_size,
            step_kind == RELATIVE,
            iterations,
            NoiseRange(start_percent, end_percent),
            target,
            decode,
            find_every,
            cls.hidden.unique_id,
        )
        if record.notes:
            PromptServer.instance.send_progress_text("\n".join(record.notes), cls.hidden.unique_id)
        return io.NodeOutput(GuidedSampling(vae, face_model, guided, settings, record).install(model), record)


def subjects(
    face_model: ManagedFaceModel, identity: Identity, pictures: Tensor, references: str, no_face: str, notes: list[str]
) -> list[Subject]:
    """Who is where in the pictures [B,3,H,W]; what is not as expected is added to the notes."""
    people = identity.people
    if len(people) != len(pictures) and 1 not in (len(people), len(pictures)):
        raise GuidanceError(
            f"The identity has {len(people)} people and there are {len(pictures)} LQ images: give as many people as "
            "LQ images, or one."
        )
    faces = face_model.largest_faces(pictures)
    landmarks = [faces[row].landmarks if row in faces else None for row in range(len(pictures))]
    for number, found in enumerate(landmarks, 1):
        if found is None:
            notes.append(
                f"No face was found in LQ image {number}: "
                + ("its usual place is taken." if no_face == USUAL_PLACE else "it is not guided.")
            )
    embeddings = embed_seen(face_model, pictures, landmarks) if references == AUTO else [None] * len(pictures)
    usual = None if no_face == LEAVE_ALONE else usual_place(*pictures.shape[:-3:-1])
    places = [usual if found is None else found for found in landmarks]
    size = max(len(people), len(pictures))
    people, rows = list(people) * (size // len(people)), list(range(len(pictures))) * (size // len(pictures))
    return [
        Subject(
            None if places[row] is None else Sight(pictures[row], places[row], guessed=landmarks[row] is None),
            references_of(person, references, embeddings[row]),
        )
        for person, row in zip(people, rows, strict=True)
    ]


def embed_seen(
    face_model: ManagedFaceModel, pictures: Tensor, landmarks: list[Tensor | None]
) -> list[Tensor | None]:
    """The embedding [512] of each picture's face, None where none was found."""
    rows = [row for row, found in enumerate(landmarks) if found is not None]
    if not rows:
        return [None] * len(pictures)
    seen = face_model.embed(align(pictures[rows], torch.stack([landmarks[row] for row in rows])))
    return [seen[rows.index(row)] if row in rows else None for row in range(len(pictures))]


class GuidancePlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_GuidancePlot",
            display_name="Guidance Plot",
            category=types.CATEGORY,
            description="Plots how similar each face was to its person at each step of the guided sampler run.",
            search_aliases=["similarity plot", "guidance curve", "id guidance plot"],
            inputs=[
                types.Guidance.Input("guidance", tooltip="From the ID-Preserving Sampling whose model was sampled."),
                io.Latent.Input("latent", tooltip="The sampler's result: the plot shows the run that gave it."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="A line for each face; goes to Preview Image."),
                io.String.Output(display_name="report", tooltip="The same in words, with what was not as expected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(cls, guidance: Record, latent: dict) -> io.NodeOutput:
        curve = guidance.of(latent["samples"])
        title, notes = "Similarity to the reference", guidance.notes
        if curve is None:
            curve = Curve(1, [])
            if not guidance.off:
                title, notes = "Not a latent of this guidance", [UNKNOWN]
                PromptServer.instance.send_progress_text(UNKNOWN, cls.hidden.unique_id)
        lines = {
            f"picture {number}": [(step + 1, values[i]) for step, values in curve.similarity.items()]
            for i, number in enumerate(curve.faces)
        }
        chart = line_chart(lines, title, "step", "similarity (cosine)", max(curve.steps, 1))
        report = [
            f"{name}: {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}"
            for name, points in lines.items()
            if points
        ]
        pixels = torch.frombuffer(bytearray(chart.tobytes()), dtype=torch.uint8).view(1, chart.height, chart.width, 3)
        if not report and UNKNOWN not in notes:
            report = ["No step was guided."]
        return io.NodeOutput(pixels / 255, "\n".join([*notes, *curve.notes, *report]))
