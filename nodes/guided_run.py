"""Eq. 7 on ComfyUI's MODEL: wrappers round the whole run (OUTER_SAMPLE), round its loading of models
(PREPARE_SAMPLING) and round each prediction (PREDICT_NOISE)."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_management as management
import comfy.model_sampling as prediction
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from server import PromptServer
from torch import Tensor

from ..ridfr_core.guidance import Ascent, GuidanceError, guide
from ..ridfr_core.guided_face import GuidedFace, Sight, guided_face, look_again
from .guidance_record import Curve, Reading, Record
from .guided_networks import Networks, Room, cheaper
from .managed import ManagedFaceModel
from .noise_range import NoiseRange

KEY = "ridfr_guidance"


@dataclass(frozen=True)
class Subject:
    """One element: its face as it was seen last, and its references [N,512]."""

    sight: Sight | None  # where it is not guided
    references: Tensor


@dataclass(frozen=True)
class Settings:
    """As the node's inputs; node: its id, where the progress is shown."""

    step: float
    relative: bool
    iterations: int
    range: NoiseRange
    target: float
    mode: str
    find_every: int
    node: str


@dataclass(frozen=True)
class GuidedSampling:
    """Installs the wrappers. Nothing is loaded or kept on the device but while a sampler runs."""

    vae: comfy.sd.VAE
    face_model: ManagedFaceModel
    subjects: Sequence[Subject]
    settings: Settings
    record: Record

    def install(self, model: ModelPatcher) -> ModelPatcher:
        model = model.clone()
        runs: list[Run] = []  # the last is going on

        def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kw):
            run = Run(self, executor.class_obj.model_patcher, noise.shape, sigmas)

            def counted(step, x0, *state):
                run.count(step, x0)
                return callback(step, x0, *state) if callback else None

            runs.append(run)
            try:
                samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, counted, *args, **kw)
                run.finish(samples)
                return samples
            finally:
                runs.pop()  # also after an interrupt: what it held is free now
                management.soft_empty_cache()

        def prepare_sampling(executor, patcher, noise_shape, conds, *args, **kw):
            rooms = [*conds.get(KEY, []), {"control": Room(runs[-1].memory())}]
            loaded, conds, models = executor(patcher, noise_shape, conds | {KEY: rooms}, *args, **kw)
            return loaded, {name: cond for name, cond in conds.items() if name != KEY}, models

        def predict_noise(executor, x, timestep, *args, **kw):
            run = runs[-1]
            level = run.level(timestep)  # on its way to the host while the model computes
            denoised = executor(x, timestep, *args, **kw)
            return run.guide(x, denoised, timestep) if run.acts(level) else denoised

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
        return model


class Run:
    """One sampler run: the networks, the faces, and the similarities on their way to the host."""

    def __init__(self, plan: GuidedSampling, model: ModelPatcher, shape: Sequence[int], sigmas: Tensor):
        check_fit(model, plan.vae)
        if not sigmas.isfinite().all():
            raise GuidanceError(
                "The sampler's noise levels (sigmas) are not all numbers: look at the node that made them."
            )
        self.plan, self.settings = plan, plan.settings
        self.device, self.latent_size = model.load_device, tuple(shape[-2:])
        self.scale = plan.vae.spacial_compression_decode()
        self.subjects = for_batch(plan.subjects, shape, self.scale)
        self.face_model, self.format = plan.face_model.model, model.get_model_object("latent_format")
        self.to_latent = model.model.process_latent_out
        sampling = model.get_model_object("model_sampling")
        self.first, self.last = plan.settings.range.sigmas(sampling)
        self.outside = plan.settings.range.outside(sampling, sigmas, "ID-Preserving Sampling")
        self.curve = Curve(max(len(sigmas) - 1, 0), [i for i, one in enumerate(self.subjects, 1) if one.sight])
        self.step, self.x0 = 0, None
        self.latest: Tensor | None = None  # of this step's prediction so far
        self.readings: list[tuple[int, Reading]] = []
        self.find_every, self.found_at = plan.settings.find_every, -math.inf
        self._decode_by(plan.settings.mode)

    def level(self, sigma: Tensor) -> Reading | None:
        """The noise level of a prediction, to be known on the host; None where every level is guided or none."""
        everywhere = self.settings.range.start <= 0 and self.settings.range.end >= 1
        return None if everywhere or not self.curve.faces else Reading(sigma.flatten()[:1])

    def acts(self, level: Reading | None) -> bool:
        """Whether a prediction is guided.

        Its level was put on its way before the model's work was queued, so that the device is busy with that, should
        the host wait here. Solvers ask for levels between those of the steps, which nothing else tells.
        """
        self.latest = None
        return bool(self.curve.faces) and (level is None or self.last <= level.values()[0] <= self.first)

    def guide(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        self.show()
        with torch.inference_mode(False):
            # Tensors made in inference mode may not be kept for a gradient, copies of them may.
            x, denoised, sigma = (tensor.detach().clone() for tensor in (x, denoised, sigma))
            while True:
                try:
                    self.networks.load(self.device)
                    if self.find_every and self.step >= self.found_at + self.find_every:
                        self._find_faces(denoised)
                    guided, similarities = guide(self._ascend, x, denoised, sigma, self.faces)
                    break
                except Exception as error:
                    management.raise_non_oom(error)
                self._fall_back()  # outside the handler, whose traceback still holds the failed step's tensors
        self.latest = similarities[:, 0]
        return guided

    def count(self, step: int, x0: Tensor) -> None:
        """A sampler's callback: this step has its own prediction, the latest; what solvers ask for besides, between
        the steps, comes after it."""
        self.step, self.x0 = step + 1, x0
        if self.latest is not None:
            self.readings.append((step, Reading(self.latest)))

    def show(self, wait: bool = False) -> None:
        """Record and display what has reached the host; GuidanceError where the model's prediction was not a number."""
        while self.readings and (wait or self.readings[0][1].arrived()):
            step, reading = self.readings.pop(0)
            values = self.curve.similarity[step] = reading.values()
            for number, value in zip(self.curve.faces, values, strict=True):
                if value != value:
                    raise GuidanceError(
                        f"The model's prediction for picture {number} is not a number (NaN) at step {step + 1}: "
                        "lower CFG, or run the model or the VAE in a higher precision."
                    )
            shown = ", ".join(f"{value:.3f}" for value in values)
            self._tell(f"step {step + 1} of {self.curve.steps}: similarity {shown}")

    def finish(self, samples: Tensor) -> None:
        """Keep the curve for the latents that samplers hand on: the result, and the last estimate."""
        self.show(wait=True)
        if self.outside and not self.curve.similarity:
            self._note(self.outside)
        estimate = [] if self.x0 is None else [self.to_latent(self.x0.cpu())]  # as the node SamplerCustom does it
        self.plan.record.keep(self.curve, *estimate, samples)

    def memory(self) -> float:
        """Bytes that guidance takes at its peak, beside what the model does."""
        face = next((face for face in self.faces if face), None)
        size = (self.format.latent_channels, *self.latent_size)
        return self.networks.memory(face, size, bool(self.find_every)) if face else 0

    def _ascend(self, z0: Tensor, x: Tensor, sigma: Tensor, face: GuidedFace) -> tuple[Tensor, Tensor]:
        management.throw_exception_if_processing_interrupted()
        return self.networks.ascend(z0, x, sigma, face)

    def _decode_by(self, mode: str) -> None:
        """Set up networks and faces for a decode mode; those before are let go of first."""
        settings = self.settings
        self.networks = None
        ascent_of = partial(
            Ascent,
            step=settings.step,
            relative=settings.relative,
            iterations=settings.iterations,
            target=settings.target,
        )
        self.networks = Networks(mode, self.plan.vae, self.face_model.recogniser, self.format, ascent_of)
        with torch.inference_mode(False):
            self.faces = [self._face(subject) if subject.sight else None for subject in self.subjects]

    def _face(self, subject: Subject) -> GuidedFace:
        references = subject.references.clone()
        face = guided_face(subject.sight, references, self.latent_size, self.scale, self.networks.whole)
        return face.to(self.device)

    def _find_faces(self, denoised: Tensor) -> None:
        """Look for the faces in the estimate itself; where there is none, or no memory for it, the last place stays."""
        self.found_at = self.step
        detector = self.face_model.detector
        try:
            for i, face in enumerate(self.faces):
                if face and (sight := look_again(self.networks.decode, detector, denoised[i : i + 1], face)):
                    self.subjects[i] = replace(self.subjects[i], sight=sight)
                    self.faces[i] = self._face(self.subjects[i])
            return
        except Exception as error:
            management.raise_non_oom(error)
        self.find_every = 0
        management.soft_empty_cache()
        self._note("Out of memory while the face was looked for again: it is guided where it was seen last.")

    def _fall_back(self) -> None:
        """Go on with the next cheaper decode mode; GuidanceError after the last."""
        management.soft_empty_cache()
        mode = self.networks.mode
        following = cheaper(mode, self.format)
        if following is None:
            raise GuidanceError(
                f"There is not enough memory to guide, even with the decode mode {mode!r}: close other programs, "
                "or restore smaller pictures."
            )
        self._note(f"Out of memory with the decode mode {mode!r}: going on with {following!r}.")
        self._decode_by(following)

    def _note(self, text: str) -> None:
        logging.warning(text)
        self.curve.notes.append(text)
        self._tell(text)

    def _tell(self, text: str) -> None:
        PromptServer.instance.send_progress_text(text, self.settings.node)


def check_fit(model: ModelPatcher, vae: comfy.sd.VAE) -> None:
    """Raises GuidanceError for a model that does not predict noise, and for the VAE of another latent space."""
    sampling = model.get_model_object("model_sampling")
    # of ComfyUI's kinds, those in which z0 = x - sigma * eps: epsilon, v, EDM and x0
    if not isinstance(sampling, prediction.EPS) or isinstance(sampling, prediction.IMG_TO_IMG):
        raise GuidanceError(
            "ID-Preserving Sampling moves the predicted noise, and this model (a flow model, such as Flux or SD3) "
            "predicts none: use one that does, such as SD1.5 or SDXL."
        )
    channels = model.get_model_object("latent_format").latent_channels
    if vae.latent_dim != 2 or vae.latent_channels != channels:
        raise GuidanceError(
            f"The VAE has {vae.latent_channels} latent channels for {'pictures' if vae.latent_dim == 2 else 'video'} "
            f"but the model has {channels} for pictures: connect the VAE that belongs to the model."
        )


def for_batch(subjects: Sequence[Subject], shape: Sequence[int], scale: int) -> list[Subject]:
    """One subject per latent. Raises GuidanceError where numbers or proportions do not go together."""
    if len(shape) != 4:
        raise GuidanceError("ID-Preserving Sampling works on pictures, and these are latents of a video or of sound.")
    if len(subjects) not in (1, shape[0]):
        raise GuidanceError(
            f"ID-Preserving Sampling has {len(subjects)} faces but the latent batch has {shape[0]} images: give as "
            "many people and LQ images as latents, or one for all."
        )
    height, width = (side * scale for side in shape[-2:])
    for sight in (subject.sight for subject in subjects if subject.sight):
        rows, columns = sight.picture.shape[-2:]
        if abs(rows * width - columns * height) > 0.05 * rows * width:
            raise GuidanceError(
                f"The LQ image is {columns}x{rows} but the latent is for {width}x{height}: connect the picture that "
                "is being restored, in its own proportions."
            )
    return list(subjects) * (shape[0] // len(subjects))
