"""ridfr_core networks in the care of ComfyUI's model management, which loads, unloads and counts them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from torch import Tensor, nn

from ..ridfr_core.adapter import IdentityAdapter
from ..ridfr_core.errors import RidfrError
from ..ridfr_core.face_model import FaceModel, FaceModelError, digest_of
from ..ridfr_core.faces import Face
from ..ridfr_core.identity import Identity
from ..ridfr_core.onnx_network import device_of
from . import paths

CHUNK = 32  # face crops in one forward: 400 MB of activations in R100, the largest recogniser


def managed(network: nn.Module) -> ModelPatcher:
    return CoreModelPatcher(
        network,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def eager(operations: type) -> type:
    """ComfyUI's layers, all with their weights from the start.

    With DynamicVRAM, its default on NVIDIA, a Linear has none before its file is loaded, and a file is checked against
    the network before that. A Linear with a loader of its own keeps them.
    """

    class Linear(operations.Linear):
        def _load_from_state_dict(self, *args):
            nn.Linear._load_from_state_dict(self, *args)

    return type("Eager", (operations,), {"Linear": Linear})


def loaded(patcher: ModelPatcher, whole: bool = False) -> torch.device:
    """Have the network on its compute device; returns that device.

    whole: all of it, for networks of layers that are not ComfyUI's, which cannot fetch their weights themselves.
    """
    comfy.model_management.load_models_gpu([patcher], force_full_load=whole)
    return patcher.load_device


def one_by_one(items: Sequence) -> Iterator:
    """The items, with ComfyUI's progress bar going on and its stop button working between them."""
    bar = comfy.utils.ProgressBar(len(items))
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update(1)


@dataclass(frozen=True)
class ManagedFaceModel:
    """What a RIDFR_FACE_MODEL wire carries. patcher: of detector and recogniser together."""

    model: FaceModel
    patcher: ModelPatcher

    @classmethod
    def of(cls, model: FaceModel) -> "ManagedFaceModel":
        return cls(model, managed(nn.ModuleList([model.recogniser, model.detector.network])))

    def ready(self) -> FaceModel:
        """The face model, with its networks on their compute device."""
        loaded(self.patcher, whole=True)
        return self.model

    def largest_faces(self, photos: Tensor) -> dict[int, Face]:
        """The largest face in each image of [B,3,H,W], by its index; images without a face are left out."""
        detector = self.ready().detector  # once: with DynamicVRAM, to load is to copy all weights again
        found = ((i, detector.detect(photo)) for i, photo in enumerate(one_by_one(photos)))
        return {i: faces[0] for i, faces in found if faces}

    def features(self, crops: Tensor) -> Tensor:
        """Raw embeddings [B,D] of aligned crops [B,3,112,112] in [0,1]; their length tells of the crop's quality."""
        recogniser = self.ready().recogniser
        device = device_of(recogniser)
        parts = [recogniser(part.to(device) * 2 - 1).cpu() for part in one_by_one(crops.split(CHUNK))]
        features = torch.cat(parts).float()
        if bad := (~(features.isfinite().all(1) & features.any(1))).nonzero().flatten().tolist():
            raise FaceModelError(
                f"The face model {self.model.name} gives no numbers, or NaN or infinity, of crop {bad[0] + 1}: its "
                "recogniser's file is damaged, or made for other pictures, so use that of an insightface pack."
            )
        return features

    def embed(self, crops: Tensor) -> Tensor:
        """Unit embeddings [B,D] of aligned crops [B,3,112,112] in [0,1]."""
        return F.normalize(self.features(crops), dim=-1)


@dataclass(frozen=True)
class ManagedAdapter:
    """What a RIDFR_IDENTITY_ADAPTER wire carries.

    shortcut: the projection's forward is PlusV2's, not Plus's. lora: what the adapter wants changed in the diffusion
    model, under names that ComfyUI's LoRA loading knows (see `adapter_lora.with_lora`); empty where it has none.
    raw: face embeddings are read as the recogniser gives them, not of unit length. recogniser: FaceModel.digest of the
    face model that the adapter was trained with, None where that is not known.
    """

    name: str
    adapter: IdentityAdapter
    shortcut: bool
    patcher: ModelPatcher
    lora: dict[str, Tensor] = field(default_factory=dict)
    raw: bool = False
    recogniser: str | None = None

    def check_recogniser(self, identity: Identity) -> None:
        """Raises RidfrError where the identity was made with a face model that the adapter was not made for."""
        made = f"the face model {identity.recogniser or f'of digest {identity.digest[:8]}'}"
        if self.recogniser and identity.digest != self.recogniser:
            nano = self.recogniser == digest_of(paths.own_recognisers()[0])
            raise RidfrError(
                f"The identity was made with {made}, but the adapter {self.name} was made for another face model: use "
                f"Extract Identity with {'nano' if nano else 'the one that it was trained with'}."
            )
        if not self.recogniser and identity.digest.removeprefix("bgr-") in map(digest_of, paths.own_recognisers()):
            raise RidfrError(
                f"The identity was made with {made}, which knows drawn portraits only, and the adapter {self.name} is "
                "for photos: extract it with the face model that the adapter was made for, buffalo_l for FaceID."
            )
