"""Eq. 7 on ComfyUI's MODEL: wrappers round each prediction (PREDICT_NOISE) and round the whole run (OUTER_SAMPLE)."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import comfy.model_management as management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.taesd.taesd import TAESD
from server import PromptServer
from torch import Tensor, nn

from ..ridfr_core.guidance import (
    DECODE_MODES,
    Ascent,
    DecodeMode,
    FaceSimilarity,
    GuidanceError,
    guide,
)
from ..ridfr_core.guided_face import GuidedFace, Sight, guided_face, look_again, searched
from .managed import ManagedFaceModel

KEY = "ridfr_guidance"
GRADIENT = 3  # what autograd keeps of the decoder, in multiples of what ComfyUI reckons for decoding (measured: 2.6)


@dataclass
class Record:
    """What a RIDFR_GUIDANCE wire carries: the similarities of the last run, filled while it goes on.

    similarity: step -> one number per face, of the estimate before that step's guidance; faces: the picture's number of
    each; notes: what the user should know; fallbacks: for what the memory did not suffice.
    """

    notes: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    steps: int = 0
    faces: list[int] = field(default_factory=list)
    similarity: dict[int, list[float]] = field(default_factory=dict)


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
    start: float
    end: float
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
        runs: list[Run] = []

        def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kw):
            def counted(step, *state):
                runs[-1].step = step + 1
                return callback(step, *state) if callback else None

            runs.append(Run(self, executor.class_obj.model_patcher, noise.shape, sigmas))
            try:
                samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, counted, *args, **kw)
                runs[-1].show(wait=True)
                return samples
            finally:
                runs.pop()  # also after an interrupt: what it held is free now
                management.soft_empty_cache()

        def predict_noise(executor, x, timestep, *args, **kw):
            denoised = executor(x, timestep, *args, **kw)
            return runs[-1].guide(x, denoised, timestep) if runs[-1].acts() else denoised

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
        return model


class Run:
    """One sampler run: the networks' weights, the faces, and the similarities on their way to the host."""

    def __init__(self, plan: GuidedSampling, model: ModelPatcher, shape: Sequence[int], sigmas: Tensor):
        self.settings, self.vae, self.record, self.step = plan.settings, plan.vae, plan.record, 0
        self.device, self.latent_size = model.load_device, tuple(shape[-2:])
        self.scale = plan.vae.spacial_compression_decode()
        self.subjects = for_batch(plan.subjects, shape, self.scale)
        self.face_model, self.format = plan.face_model.model, model.get_model_object("latent_format")
        sampling = model.get_model_object("model_sampling")
        self.range = [sampling.percent_to_sigma(part) for part in (self.settings.start, self.settings.end)]
        self.sigmas = sigmas.tolist()
        self.readings: list[Reading] = []
        self.find_every, self.found_at = plan.settings.find_every, -math.inf
        self.record.steps, self.record.similarity, self.record.fallbacks = len(self.sigmas) - 1, {}, []
        self.record.faces = [i for i, subject in enumerate(self.subjects, 1) if subject.sight]
        if self.record.faces:
            self._decode_by(plan.settings.mode, make_room=True)

    def acts(self) -> bool:
        """Whether this step is guided. Its noise level is looked up, since reading it from the device would stall."""
        first, last = self.range
        return bool(self.record.faces) and first >= self.sigmas[min(self.step, len(self.sigmas) - 2)] >= last

    def guide(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        self.show()
        with torch.inference_mode(False):
            # Tensors made in inference mode may not be kept for a gradient, copies of them may.
            x, denoised, sigma = (tensor.detach().clone() for tensor in (x, denoised, sigma))
            if self.find_every and self.step >= self.found_at + self.find_every:
                self._find_faces(denoised)
            while True:
                try:
                    guided, similarities = guide(self._ascend, x, denoised, sigma, self.faces)
                    break
                except Exception as error:
                    management.raise_non_oom(error)
                self._fall_back()  # outside the handler, whose traceback still holds the failed step's tensors
        self.readings.append(Reading(self.step, similarities[:, 0]))
        return guided

    def show(self, wait: bool = False) -> None:
        """Record and display what has reached the host; GuidanceError where the model's prediction was not a number."""
        while self.readings and (wait or self.readings[0].arrived()):
            reading = self.readings.pop(0)
            values = self.record.similarity[reading.step] = reading.values()
            for number, value in zip(self.record.faces, values, strict=True):
                if value != value:
                    raise GuidanceError(
                        f"The model's prediction for picture {number} is not a number (NaN) at step "
                        f"{reading.step + 1}: lower CFG, or run the model or the VAE in a higher precision."
                    )
            shown = ", ".join(f"{value:.3f}" for value in values)
            self._tell(f"step {reading.step + 1} of {self.record.steps}: similarity {shown}")

    def _ascend(self, eps: Tensor, x: Tensor, sigma: Tensor, face: GuidedFace) -> tuple[Tensor, Tensor]:
        management.throw_exception_if_processing_interrupted()
        return torch.func.functional_call(self.ascent, self.weights, (eps, x, sigma, face))

    def _decode_by(self, name: str, make_room: bool = False) -> None:
        """Set up networks, weights and faces for a decode mode.

        make_room: ask ComfyUI to unload what is in the way; in mid-run that might be the model that is sampled.
        """
        self.mode, mode = name, DECODE_MODES[name]
        settings = self.settings
        self.ascent = self.weights = None
        with torch.inference_mode(False):
            dtype = torch.bfloat16 if mode.half else torch.float32
            similarity = FaceSimilarity(self._decoder(mode, dtype), self.face_model.recogniser)
            self.ascent = Ascent(
                similarity, settings.step, settings.relative, settings.iterations, settings.target, mode.checkpointed
            )
            self.faces = [self._face(subject) if subject.sight else None for subject in self.subjects]
            if make_room:
                management.free_memory(self._memory(dtype), self.device)
            self.weights = borrowed(self.ascent, self.device, dtype)

    def _decoder(self, mode: DecodeMode, dtype: torch.dtype) -> nn.Module:
        if mode.approximate:
            return Decoder(TAESD(None, taesd_file(self.format), self.format.latent_channels), lambda z: z, dtype)
        return Decoder(self.vae.first_stage_model, self.format.process_out, dtype)

    def _memory(self, dtype: torch.dtype) -> float:
        """Bytes that one face takes, roughly: its gradient, or the search for it."""

        def decoding(box, shrink: int = 1) -> float:
            size = ((box[1] - box[0]) // shrink, (box[3] - box[2]) // shrink)
            return self.vae.memory_used_decode((1, self.format.latent_channels, *size), dtype)

        face = next(face for face in self.faces if face)
        search = decoding(*searched(face.box, self.latent_size)) if self.find_every else 0
        weights = sum(p.numel() for p in self.ascent.parameters()) * 4
        return weights + max(GRADIENT * decoding(face.box), search)

    def _face(self, subject: Subject) -> GuidedFace:
        whole = DECODE_MODES[self.mode].whole
        face = guided_face(subject.sight, subject.references.clone(), self.latent_size, self.scale, whole)
        return face.to(self.device)

    def _find_faces(self, denoised: Tensor) -> None:
        """Look for the faces in the estimate itself; where there is none, or no memory for it, the last place stays."""
        self.found_at = self.step
        prefix = "similarity.decoder."
        weights = {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}
        decode = partial(torch.func.functional_call, self.ascent.similarity.decoder, weights)
        try:
            for i, face in enumerate(self.faces):
                if face and (sight := look_again(decode, self.face_model.detector, denoised[i : i + 1], face)):
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
        names = list(DECODE_MODES)
        cheaper = names[names.index(self.mode) + 1 :]
        if cheaper and DECODE_MODES[cheaper[0]].approximate and not taesd_file(self.format, required=False):
            cheaper = []
        if not cheaper:
            raise GuidanceError(
                f"There is not enough memory to guide, even with the decode mode {self.mode!r}: close other programs, "
                "or restore smaller pictures."
            )
        self._note(f"Out of memory with the decode mode {self.mode!r}: going on with {cheaper[0]!r}.")
        self._decode_by(cheaper[0])

    def _note(self, text: str) -> None:
        logging.warning(text)
        self.record.fallbacks.append(text)
        self._tell(text)

    def _tell(self, text: str) -> None:
        PromptServer.instance.send_progress_text(text, self.settings.node)


class Reading:
    """A few numbers on their way from the device to the host: nothing waits for them."""

    def __init__(self, step: int, values: Tensor):
        self.step = step
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event:
            self._event.record()

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        if self._event:
            self._event.synchronize()
        return self._values.tolist()


class Decoder(nn.Module):
    """The model's latents [B,C,h,w] to pictures [B,3,H,W] in [0,1]. network: with `decode`, giving [-1,1]."""

    def __init__(self, network: nn.Module, to_network: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.network, self.to_network, self.dtype = network, to_network, dtype

    def forward(self, z: Tensor) -> Tensor:
        return self.network.decode(self.to_network(z).to(self.dtype)).to(z.dtype) / 2 + 0.5


def borrowed(ascent: Ascent, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights that a gradient may pass: ComfyUI's own are inference tensors, and may be unloaded.

    dtype: the decoder's; the recogniser stays in float32. Encoders, which nothing calls, are left out.
    """
    weights = {}
    for name, tensor in (*ascent.named_parameters(), *ascent.named_buffers()):
        if not name.startswith(("similarity.decoder.network.encoder.", "similarity.decoder.network.taesd_encoder.")):
            kind = dtype if name.startswith("similarity.decoder.") else torch.float32
            kind = kind if tensor.is_floating_point() else tensor.dtype
            weights[name] = tensor.detach().to(device, kind, copy=True)
    return weights


def taesd_file(latent_format, required: bool = True) -> str | None:
    """The file of ComfyUI's approximate decoder for a model. Raises GuidanceError where a required one is absent."""
    name = latent_format.taesd_decoder_name
    file = next((f for f in folder_paths.get_filename_list("vae_approx") if name and f.startswith(name)), None)
    if name is None and required:
        raise GuidanceError("There is no TAESD decoder for this model: choose another decode mode.")
    if file is None and required:
        folders = ", ".join(folder_paths.get_folder_paths("vae_approx"))
        raise GuidanceError(
            f"The decode mode 'face, TAESD' needs {name}.safetensors in {folders}: get it from "
            "github.com/madebyollin/taesd, or choose another decode mode."
        )
    return file and folder_paths.get_full_path("vae_approx", file)


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
