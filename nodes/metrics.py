"""Nodes that measure: image quality, and how much an identity varies."""

import torch
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..ridfr_core.errors import RidfrError
from ..ridfr_core.metrics import identity_variance, landmark_distance, psnr, ssim
from ..ridfr_core.perceptual import FULL_REFERENCE, METRICS, MetricAbsent, load, score
from . import types
from .border import fit_to, same_batch, to_core, to_photos
from .checks import checked
from .identity import face_embeddings
from .managed import ManagedFaceModel

EQUAL = 100.0  # dB; the PSNR of equal pictures is infinite, and so would be the mean of a batch with one such pair


class ImageQuality(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_ImageQuality",
            display_name="Image Quality",
            category=types.CATEGORY,
            description="Says how close restored pictures are to the true ones, in the measures that papers use. To "
            "judge whose face it is, use Compare Identity.",
            search_aliases=["psnr", "ssim", "lpips", "landmark distance", "image metrics", "compare images", "musiq"],
            inputs=[
                io.Image.Input("image", tooltip="The pictures to judge."),
                io.Image.Input(
                    "truth",
                    tooltip="What they should look like, in the same shape: one for each, or one for all. Scaled to "
                    "the pictures' size.",
                ),
                types.FaceModel.Input(
                    "face_model",
                    optional=True,
                    tooltip="From Load Face Model. With it, the report also says by how many pixels the eyes, nose "
                    "and mouth are out of place (LMD).",
                ),
                io.Boolean.Input(
                    "perceptual",
                    default=False,
                    tooltip="Also ask networks that judge pictures as people do (LPIPS, MUSIQ, MANIQA, CLIP-IQA, "
                    "HyperIQA, PI). They need the Python package pyiqa and its weights on this disk; the report "
                    "says what is missing. They run on the processor and take their time.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="PSNR", tooltip="In decibels, the mean of all pictures; more is closer, 100 is equal."
                ),
                io.Float.Output(display_name="SSIM", tooltip="Up to 1, the mean of all pictures; more is closer."),
                io.String.Output(display_name="report", tooltip="A line for each measure: the mean and each picture."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, truth: Tensor, perceptual: bool = False, face_model: ManagedFaceModel | None = None
    ) -> io.NodeOutput:
        pictures = to_core(image)
        wanted = fit_to(to_core(truth), pictures.shape[-2:], "The truth", "the picture to judge")
        images, truths = same_batch(pictures, wanted, "The first input", "the truth")
        found = {"PSNR": psnr(images, truths).clamp(max=EQUAL).tolist(), "SSIM": ssim(images, truths).tolist()}
        if face_model is not None:
            found["LMD"] = landmark_distances(face_model, pictures, wanted)
        lines = [measure_line(name, values) for name, values in found.items()]
        if perceptual:
            lines += perceptual_lines(images, truths)
        text = "\n".join(lines)
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(mean(found["PSNR"]), mean(found["SSIM"]), text, ui={"text": [text]})


def landmark_distances(face_model: ManagedFaceModel, images: Tensor, truths: Tensor) -> list[float | None]:
    """LMD of each pair of images [B,3,H,W], of which one may be for all; None where a face is missing."""
    faces, others = (face_model.largest_faces(photos) for photos in (images, truths))
    number = max(len(images), len(truths))
    pairs = [(faces.get(i % len(images)), others.get(i % len(truths))) for i in range(number)]
    return [landmark_distance(a.landmarks, b.landmarks).item() if a and b else None for a, b in pairs]


def perceptual_lines(images: Tensor, truths: Tensor) -> list[str]:
    """What pyiqa's metrics say, or why they cannot. FID compares sets of images, so it is not among them."""
    lines = []
    for name in METRICS:
        if name == "FID":
            continue
        try:
            metric = load(name)
        except MetricAbsent as reason:
            lines.append(f"{name}: absent, {reason}")
        else:
            truth = truths if name in FULL_REFERENCE else None
            lines.append(measure_line(name, score(metric, images, truth)))
    return lines


def mean(values: list[float | None]) -> float:
    """Over those that are there; 0 if none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else 0.0


def measure_line(name: str, values: list[float | None]) -> str:
    each = ", ".join("no face found" if value is None else f"{value:.4g}" for value in values)
    return f"{name}: {mean(values):.4g} ({each})"


class IdentityVariance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_IdentityVariance",
            display_name="Identity Variance",
            category=types.CATEGORY,
            description="Says how much the face changes between several restorations of one picture, each with "
            "another photo of the person: 0 is always the same face, about 1 always a stranger.",
            search_aliases=["identity variance", "robustness", "consistency of faces", "id variance"],
            inputs=[
                types.FaceModel.Input(
                    "face_model",
                    tooltip="The recogniser that judges. Another one than that of Extract Identity gives the more "
                    "honest answer.",
                ),
                io.Image.Input("images", tooltip="A batch of restorations of the same picture, two or more."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="variance",
                    tooltip="1 minus the mean likeness of two different ones. Look at Compare Identity beside it: a "
                    "face that is always the same wrong one has no variance either.",
                ),
                io.String.Output(display_name="report", tooltip="The variance, and how many faces it is of."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, face_model: ManagedFaceModel, images: Tensor) -> io.NodeOutput:
        found = [e for e in face_embeddings(face_model, to_photos(images, "image")) if e is not None]
        if len(found) < 2:
            raise RidfrError(
                f"A face was found in {len(found)} of {len(images)} images: connect at least two in which it can be "
                "seen."
            )
        variance = identity_variance(torch.stack(found)[None]).item()
        text = f"identity variance {variance:.4f} over {len(found)} of {len(images)}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(variance, text, ui={"text": [text]})
