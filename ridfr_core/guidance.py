"""ID-preserving sampling: the predicted noise is moved until the face in the estimate resembles the reference.

"ID-PreFeR", section 3.4, Eq. 7:

    eps~ = eps^ + delta * grad_eps < f(D((z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t))), f(x_ref) >

With x = z_t / sqrt(abar_t) and sigma = sqrt((1 - abar_t) / abar_t), as k-diffusion and ComfyUI have it, the estimate is
z0 = x - sigma * eps. The gradient passes the VAE's decoder D and the recogniser f, never the UNet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import RidfrError
from .guided_face import GuidedFace
from .identity import Person, best_photo, mean_embedding
from .recognition import embed

MEAN, BEST, AUTO = "mean", "best", "auto"

# the defaults; docs/guidance.md has the measurements that they rest on
STEP = 0.1
FIND_EVERY = 5

LARGEST = 0.5  # change of z0 in a prediction, as a share of its own RMS at the face: docs/guidance.md has what it costs
TINY = torch.finfo(torch.float32).tiny


class GuidanceError(RidfrError):
    """Guidance cannot work on these inputs; the message says which, why and what to do."""


@dataclass(frozen=True)
class DecodeMode:
    """How the estimate becomes a picture: of the whole latent or of the face alone; with the decoder's blocks computed
    again in the backward pass instead of kept; in bfloat16; by an approximate decoder."""

    whole: bool = False
    checkpointed: bool = False
    half: bool = False
    approximate: bool = False


# Each needs less memory than the one before it.
DECODE_MODES = {
    "whole picture": DecodeMode(whole=True),
    "face": DecodeMode(),
    "face, checkpointed": DecodeMode(checkpointed=True),
    "face, checkpointed, bf16": DecodeMode(checkpointed=True, half=True),
    "face, TAESD": DecodeMode(approximate=True),
}


def sample(picture: Tensor, grid: Tensor) -> Tensor:
    """`F.grid_sample`, on the CPU for Apple's GPU, which has no gradient for it."""
    device = "cpu" if picture.device.type == "mps" else picture.device
    return F.grid_sample(picture.to(device), grid.to(device), align_corners=False).to(picture.device)


def references_of(person: Person, choice: str, lq_embedding: Tensor | None = None) -> Tensor:
    """The embeddings [N,512] that a face is compared with; the similarity is the largest of the N.

    choice: MEAN, the photos' weighted mean; BEST, all that have weight, so that at every step the most similar counts;
    AUTO, the one most similar to the low-quality face [512], as the paper selects x_ref, or MEAN where none is known.
    """
    if choice == MEAN or choice == AUTO and lq_embedding is None:
        return mean_embedding(person)[None]
    if choice == AUTO:
        return person.embeddings[[best_photo(person, lq_embedding)]]
    return person.embeddings[person.weights > 0]


class FaceSimilarity(nn.Module):
    """Cosine of the face in an estimate to its references: < f(align(D(z0))), f(x_ref) >.

    decoder: latents [1,C,h,w] to pictures [1,3,H,W] in [0,1]; recogniser: as `IResNet`.
    """

    def __init__(self, decoder: nn.Module, recogniser: nn.Module):
        super().__init__()
        self.decoder, self.recogniser = decoder, recogniser

    def forward(self, z0: Tensor, face: GuidedFace) -> Tensor:
        """z0: [1,C,h,w], the face's window of the estimate. Returns [1]; GuidanceError where the gradient ends."""
        picture = self.decoder(z0)
        if z0.requires_grad and not picture.requires_grad:
            raise GuidanceError("The VAE's decoder passes no gradient: use another VAE or another decode mode.")
        crop = sample(picture * face.inner, face.grid) + face.surround
        embedding = embed(self.recogniser, crop)
        if z0.requires_grad and not embedding.requires_grad:
            raise GuidanceError("The face model's recogniser passes no gradient: use a face model with an ArcFace "
                                "ResNet, such as buffalo_l or antelopev2.")
        return (embedding @ face.references.T).amax(1)


class Ascent(nn.Module):
    """Eq. 7, several times on one element, written in z0 = x - sigma * eps: no large numbers cancel at a high sigma.

    step: delta; relative: as a fraction of the noise's RMS over the gradient's, else as it stands in the equation;
    target: the similarity at which it stops; checkpointed: see `DecodeMode`. The gradient is taken within `forward`, so
    that `torch.func.functional_call` can lend the networks other weights.
    """

    def __init__(self, similarity: FaceSimilarity, step: float, relative: bool = True, iterations: int = 1,
                 target: float = 1.0, checkpointed: bool = False):
        super().__init__()
        self.similarity, self.step, self.relative = similarity, step, relative
        self.iterations, self.target, self.checkpointed = iterations, target, checkpointed

    def forward(self, z0: Tensor, x: Tensor, sigma: Tensor, face: GuidedFace) -> tuple[Tensor, Tensor]:
        """z0, x: [1,C,h,w], the face's window; sigma: []. Returns (z0~, the similarity before each update [K]).

        The RMS of z0's change is at most LARGEST of its own. Where the similarity is not below the target, or is not a
        number, z0 stays as it is.
        """
        first, similarities = z0, []
        with torch.enable_grad(), checkpoint_blocks(self.similarity.decoder) if self.checkpointed else nullcontext():
            for _ in range(self.iterations):
                z0 = z0.detach().requires_grad_()
                similarity = self.similarity(z0, face)
                (gradient,) = torch.autograd.grad(similarity.sum(), z0)
                z0, similarity = z0.detach(), similarity.detach()
                change = z0 + self._move(gradient, x - z0, sigma) - first
                z0 = torch.where(similarity < self.target, first + _within(LARGEST * _rms(first), change), z0)
                similarities.append(similarity)
        return z0, torch.cat(similarities)

    def _move(self, gradient: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """-sigma * (eps~ - eps). gradient: by z0, -1/sigma of that by eps; noise: sigma * eps."""
        if self.relative:
            return self.step * _rms(noise) / _rms(gradient).clamp_min(TINY) * gradient
        return self.step * sigma.square() * gradient


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _within(largest: Tensor, change: Tensor) -> Tensor:
    """The change, shortened to an RMS of at most `largest`."""
    return change * (largest / _rms(change).clamp_min(TINY)).clamp_max(1)


def guide(ascend: Callable[[Tensor, Tensor, Tensor, GuidedFace], tuple[Tensor, Tensor]], x: Tensor, denoised: Tensor,
          sigma: Tensor, faces: Sequence[GuidedFace | None]) -> tuple[Tensor, Tensor]:
    """Eq. 7 on each element of a batch that has a face, one after the other: the memory does not grow with the batch.

    ascend: an `Ascent`. x: [B,C,h,w] as z0 + sigma * eps; denoised: the model's z0, whatever it predicts (epsilon, v,
    z0); sigma: [B]. All is computed in float32 or better. Returns (the guided z0, similarities before each update
    [faces,K]).
    """
    guided, similarities = denoised.clone(), []
    precise = torch.promote_types(denoised.dtype, torch.float32)
    for i, face in enumerate(faces):
        if face is None:
            continue
        z0, x_face = (latents[i:i + 1][face.window].to(precise) for latents in (denoised, x))
        guided[i:i + 1][face.window], similarity = ascend(z0, x_face, sigma[i].to(precise), face)
        similarities.append(similarity)
    return guided, torch.stack(similarities)


@contextmanager
def checkpoint_blocks(network: nn.Module) -> Iterator[None]:
    """Within it, each innermost block of a network keeps its input alone and is computed again for its gradient."""
    blocks = [module for module in network.modules() if _is_block(module)]
    own = [vars(block).get("forward") for block in blocks]  # accelerate's hooks and other packs put one there
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _is_block(module: nn.Module) -> bool:
    """Whether it is made of layers and nothing larger: a residual block, an attention, an upsampling."""
    children = list(module.children())
    return bool(children) and not isinstance(module, (nn.ModuleList, nn.Sequential)) \
        and not any(list(child.children()) for child in children)
