"""What guided runs did: values on their way from the device to the host, and the record that a RIDFR_GUIDANCE wire
carries."""

import hashlib
from dataclasses import dataclass, field

import comfy.model_management as management
import torch
from torch import Tensor

KEPT = 64  # latents whose curve is kept; a run gives one or two


@dataclass
class Curve:
    """One run. steps: it has; faces: the picture's number of each; notes: what was not as expected; similarity: step,
    from 0 -> one number per face, of the estimate before that step's guidance."""

    steps: int
    faces: list[int]
    notes: list[str] = field(default_factory=list)
    similarity: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class Record:
    """The runs of one guided model, each known by the latents that it gave.

    notes: what the user should know before any run; off: there are no runs, since the model is not guided.
    """

    notes: list[str] = field(default_factory=list)
    off: bool = False
    curves: dict[str, Curve] = field(default_factory=dict)

    def keep(self, curve: Curve, *latents: Tensor) -> None:
        for latent in latents:
            self.curves[digest(latent)] = curve
        while len(self.curves) > KEPT:
            del self.curves[next(iter(self.curves))]

    def of(self, latent: Tensor) -> Curve | None:
        """The curve of the last run that gave this latent, if it is still kept."""
        return self.curves.get(digest(latent))


def digest(latent: Tensor) -> str:
    """Of a latent's shape and values, as ComfyUI's samplers hand them on."""
    values = latent.detach().to("cpu", management.intermediate_dtype()).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()


class Reading:
    """A few numbers [N] on their way from the device to the host: nothing waits for them."""

    def __init__(self, values: Tensor):
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
