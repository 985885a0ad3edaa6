"""The decoder and the recogniser of a guided run: which, with what weights, and the memory that they take."""

from collections.abc import Callable

import comfy.sd
import folder_paths
import torch
from comfy.controlnet import ControlBase
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn

from ..ridfr_core.guidance import DECODE_MODES, Ascent, DecodeMode, FaceSimilarity, GuidanceError
from ..ridfr_core.guided_face import GuidedFace, searched

ENCODERS = ("similarity.decoder.network.encoder.", "similarity.decoder.network.taesd_encoder.")  # nothing calls them
DECODER = "similarity.decoder."


class Networks:
    """Those of one decode mode, a key of DECODE_MODES. Nothing of them is on the device before `load`.

    ascent_of: Ascent, but for its arguments similarity and checkpointed.
    """

    def __init__(self, mode: str, vae: comfy.sd.VAE, recogniser: nn.Module, latent_format,
                 ascent_of: Callable[..., Ascent]):
        self.mode, how = mode, DECODE_MODES[mode]
        self.whole, self._vae = how.whole, vae
        self._per_decoding, self._dtype = gradient_memory(how), torch.bfloat16 if how.half else torch.float32
        with torch.inference_mode(False):
            decoder = _decoder(how, vae, latent_format, self._dtype)
            self.ascent = ascent_of(FaceSimilarity(decoder, recogniser), checkpointed=how.checkpointed)
        self._weights: dict[str, Tensor] = {}

    def load(self, device: torch.device) -> None:
        """Copy the weights, unless that was done: ComfyUI's own are inference tensors, which no gradient passes, and
        may be unloaded at any time. The recogniser stays in float32."""
        if not self._weights:
            self._weights = {
                name: tensor.detach().to(device, self._kind(name, tensor), copy=True) for name, tensor in self._lent()
            }

    def ascend(self, *args) -> tuple[Tensor, Tensor]:
        """See `Ascent`."""
        return torch.func.functional_call(self.ascent, self._weights, args)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B,C,h,w] to pictures [B,3,H,W] in [0,1]."""
        weights = {name.removeprefix(DECODER): w for name, w in self._weights.items() if name.startswith(DECODER)}
        return torch.func.functional_call(self.ascent.similarity.decoder, weights, (z,))

    def memory(self, face: GuidedFace, latent_shape: tuple[int, ...], search: bool) -> float:
        """Bytes: the copied weights, and the gradient of one face or the search for it, whichever takes more.

        latent_shape: of one element, (C, h, w).
        """

        def decoding(box, shrink: int = 1) -> float:
            size = ((box[1] - box[0]) // shrink, (box[3] - box[2]) // shrink)
            return self._vae.memory_used_decode((1, latent_shape[0], *size), self._dtype)

        weights = sum(tensor.numel() * self._kind(name, tensor).itemsize for name, tensor in self._lent())
        looking = decoding(*searched(face.box, latent_shape[1:])) if search else 0
        return weights + max(self._per_decoding * decoding(face.box), looking)

    def _lent(self) -> list[tuple[str, Tensor]]:
        tensors = (*self.ascent.named_parameters(), *self.ascent.named_buffers())
        return [(name, tensor) for name, tensor in tensors if not name.startswith(ENCODERS)]

    def _kind(self, name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return self._dtype if name.startswith(DECODER) else torch.float32


def gradient_memory(how: DecodeMode) -> float:
    """What a gradient through the decoder takes at its peak, in multiples of what ComfyUI reckons for decoding.

    Measured on a processor for Stable Diffusion's decoder, 28x28 latents in float32: 3.5, 2.3 and 0.6.
    """
    return 0.6 if how.approximate else 2.3 if how.checkpointed else 3.5


class Room(ControlBase):
    """Lets ComfyUI keep bytes of memory free for a run, as it does for what ControlNets compute; and does no more."""

    def __init__(self, size: float):
        super().__init__()
        self.size = size

    def inference_memory_requirements(self, dtype) -> float:
        return self.size

    def deepclone_multigpu(self, load_device, autoregister: bool = False) -> "Room":
        if autoregister:
            self.multigpu_clones[load_device] = Room(0)
        return self


class Decoder(nn.Module):
    """The model's latents [B,C,h,w] to pictures [B,3,H,W] in [0,1]. network: with `decode`, giving [-1,1]."""

    def __init__(self, network: nn.Module, to_network: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.network, self.to_network, self.dtype = network, to_network, dtype

    def forward(self, z: Tensor) -> Tensor:
        return self.network.decode(self.to_network(z).to(self.dtype)).to(z.dtype) / 2 + 0.5


def _decoder(how: DecodeMode, vae: comfy.sd.VAE, latent_format, dtype: torch.dtype) -> Decoder:
    if how.approximate:
        return Decoder(TAESD(None, taesd_file(latent_format), latent_format.latent_channels), lambda z: z, dtype)
    return Decoder(vae.first_stage_model, latent_format.process_out, dtype)


def cheaper(mode: str, latent_format) -> str | None:
    """The decode mode to go on with where memory does not suffice for this one."""
    names = list(DECODE_MODES)
    following = names[names.index(mode) + 1 :][:1]
    if following and DECODE_MODES[following[0]].approximate and not taesd_file(latent_format, required=False):
        return None
    return following[0] if following else None


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
