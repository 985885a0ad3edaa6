"""ID-preserving sampling in a Restorer, as the node does it in ComfyUI."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor, nn

from ..face_model import FaceModel
from ..faces import usual_place
from ..guidance import DECODE_MODES, FIND_EVERY, STEP, Ascent, FaceSimilarity, guide
from ..guided_face import GuidedFace, Sight, guided_face, look_again
from ..restorer import Restorer


@dataclass(frozen=True)
class Guided(Restorer):
    """A Restorer whose predictions are guided by `ascend` towards `faces` while t is in `range` (first, last).

    alphas: [1000], cumulative. find(number, z0, face): the face found again in an estimate [1,4,h,w], or None; asked
    at the first guided step and every `find_every` steps after (0: never).
    """

    ascend: Ascent
    faces: list[GuidedFace]
    range: tuple[float, float]
    alphas: Tensor
    find_every: int = 0
    find: Callable[[int, Tensor, GuidedFace], GuidedFace | None] | None = None
    steps: Iterator[int] = field(default_factory=count)
    searched: list[float] = field(default_factory=lambda: [-math.inf])  # at which steps

    def predict(self, z, t, *args):
        guess, step = super().predict(z, t, *args), next(self.steps)
        if not self.range[0] >= t >= self.range[1]:
            return guess
        signal, noise = self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()
        v = self.schedule["prediction_type"] == "v_prediction"
        z0 = signal * z - noise * guess if v else (z - noise * guess) / signal
        if self.find_every and step >= self.searched[-1] + self.find_every:
            self.searched.append(step)
            self.faces[:] = [self.find(i, z0[i:i + 1], face) or face for i, face in enumerate(self.faces)]
        z0, _ = guide(self.ascend, z / signal, z0, (noise / signal).expand(len(z)), self.faces)
        return (signal * z - z0) / noise if v else (z - signal * z0) / noise


class Picture(nn.Module):
    """The VAE's decoder as guidance takes it: latents at unit variance to pictures in [0,1]."""

    def __init__(self, vae: nn.Module, scale: float):
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.scale).sample / 2 + 0.5


def find_face(face_model: FaceModel, picture: Tensor) -> Sight:
    """The largest face of a picture [3,H,W]; where none is found, its usual place."""
    found = face_model.detector.detect(picture)
    return Sight(picture, found[0].landmarks if found else usual_place(*picture.shape[:0:-1]), guessed=not found)


def guided(plain: Restorer, face_model: FaceModel, sights: Sequence[Sight], references: Sequence[Tensor],
           step: float = STEP, iterations: int = 1, start: float = 0.0, end: float = 1.0, decode: str = "face",
           find_every: int = FIND_EVERY) -> Guided:
    """`plain` with guidance for one batch.

    sights: each LQ picture and its face; references: each person's embeddings [N,512]. step: relative to the noise's
    RMS; start, end: of the run, 0 to 1; decode: a key of DECODE_MODES.
    """
    from diffusers import UniPCMultistepScheduler

    device, mode, picture = references[0].device, DECODE_MODES[decode], Picture(plain.vae, plain.scale)
    ascend = Ascent(FaceSimilarity(picture, face_model.recogniser), step, iterations=iterations,
                    checkpointed=mode.checkpointed)
    size = tuple(side // 8 for side in sights[0].picture.shape[-2:])

    def face(i: int, sight: Sight) -> GuidedFace:
        return guided_face(sight, references[i].cpu(), size, whole=mode.whole).to(device)

    def find(i: int, z0: Tensor, last: GuidedFace) -> GuidedFace | None:
        sight = look_again(picture, face_model.detector, z0, last)
        return sight and face(i, sight)

    alphas = UniPCMultistepScheduler.from_config(plain.schedule).alphas_cumprod.to(device)
    return Guided(**vars(plain), ascend=ascend, faces=[face(i, sight) for i, sight in enumerate(sights)],
                  range=(999 * (1 - start), 999 * (1 - end)), alphas=alphas, find_every=find_every, find=find)
