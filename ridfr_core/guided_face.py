"""The face that guidance looks at: its place in the latent and in ArcFace's crop, and the search for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .faces import ARCFACE_TEMPLATE, Detector, align, similarity_transform, warp_grid
from .recognition import CROP_SIZE

# Brows to lower lip, cheek to cheek, in the pixels of the ArcFace crop: what the recogniser goes by.
FACE = torch.tensor([[20.0, 34.0], [92.0, 34.0], [92.0, 106.0], [20.0, 106.0]])
MARGIN = 2  # latent pixels decoded beyond it and thrown away: the decoder is not itself at its edges
SEARCHED = 3  # a face is looked for in a window of so many times its box, or of ENOUGH
ENOUGH = 64  # latent pixels; a larger window is looked at in half its size. Averaged latents were tried on nano alone

Box = tuple[int, int, int, int]  # top, bottom, left, right, in latent pixels


@dataclass(frozen=True)
class Sight:
    """A picture [3,H,W] in [0,1], and in its pixels a face's landmarks [5,2].

    window: the part of the latent that the picture shows, at whatever size; None: all of it. guessed: no face was seen,
    the landmarks are where one usually is.
    """

    picture: Tensor
    landmarks: Tensor
    window: Box | None = None
    guessed: bool = False


@dataclass(frozen=True)
class GuidedFace:
    """One element's face: where it lies in the latent, how it is aligned, and whom it shall resemble.

    box: what is decoded. inner: [1,1,H,W], 1 where the decoded pixels count. grid: [1,112,112,2], where `F.grid_sample`
    finds the ArcFace crop in them. surround: [1,3,112,112], the rest of the crop, 0 where the decoded pixels go.
    references: [N,512], unit length. guessed: see `Sight`.
    """

    box: Box
    inner: Tensor
    grid: Tensor
    surround: Tensor
    references: Tensor
    guessed: bool = False

    @property
    def window(self) -> tuple:
        """The index of the box in latents [...,h,w]."""
        return index(self.box)

    @property
    def place(self) -> Tensor:
        """The mean of the landmarks, x and y in latent pixels, on the CPU."""
        top, bottom, left, right = self.box
        x, y = ARCFACE_TEMPLATE.mean(0).round().int().tolist()
        middle = (self.grid[0, y, x].cpu() + 1) / 2
        return middle * torch.tensor([right - left, bottom - top]) + torch.tensor([left, top])

    def to(self, *args, **kwargs) -> "GuidedFace":
        """Moved as `Tensor.to` does."""
        names = ("inner", "grid", "surround", "references")
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in names})


def index(box: Box) -> tuple:
    top, bottom, left, right = box
    return (..., slice(top, bottom), slice(left, right))


def guided_face(sight: Sight, references: Tensor, latent_size: tuple[int, int], scale: int = 8,
                whole: bool = False) -> GuidedFace:
    """The face that is seen, in a latent of (height, width).

    scale: pixels per latent pixel. whole: decode the whole latent; else the face alone, and the crop's outer part, hair
    and neck, is the picture's.
    """
    height, width = latent_size
    first, last, near, far = sight.window or (0, height, 0, width)
    pixels = torch.tensor([far - near, last - first]) * scale / torch.tensor(sight.picture.shape[:0:-1])
    points = (sight.landmarks + 0.5) * pixels + torch.tensor([near, first]) * scale - 0.5
    matrix = similarity_transform(points[None], ARCFACE_TEMPLATE)
    top, bottom, left, right = kept = (0, height, 0, width) if whole else _face_box(matrix[0], latent_size, scale)
    top, bottom = max(top - MARGIN, 0), min(bottom + MARGIN, height)
    left, right = max(left - MARGIN, 0), min(right + MARGIN, width)
    inner = torch.zeros(1, 1, (bottom - top) * scale, (right - left) * scale)
    inner[..., (kept[0] - top) * scale:(kept[1] - top) * scale, (kept[2] - left) * scale:(kept[3] - left) * scale] = 1
    matrix = similarity_transform(points[None] - torch.tensor([left, top]) * scale, ARCFACE_TEMPLATE)
    grid = warp_grid(matrix, inner.shape[-2:], CROP_SIZE)
    crop = align(sight.picture[None], sight.landmarks[None])
    surround = crop * (1 - F.grid_sample(inner, grid, align_corners=False))
    return GuidedFace((top, bottom, left, right), inner, grid, surround, references, sight.guessed)


def look_again(decode: Callable[[Tensor], Tensor], detector: Detector, z0: Tensor, face: GuidedFace) -> Sight | None:
    """The face in an estimate [1,C,h,w], round its last place: the largest that reaches there, or None. Where the place
    was guessed, the largest.

    decode: latents to pictures in [0,1]. A face reaches as far as it is long, so that a neighbour's is never taken, and
    a small false find does not keep the true face away.
    """
    window, shrink = searched(face.box, z0.shape[-2:])
    part = z0[index(window)] if shrink == 1 else F.avg_pool2d(z0[index(window)], shrink)
    with torch.no_grad():
        picture = decode(part)[0].float().cpu().clamp(0, 1)
    top, _, left, right = window
    place = (face.place - torch.tensor([left, top])) * (picture.shape[-1] / (right - left))
    for found in detector.detect(picture):  # largest first
        x1, y1, x2, y2 = found.box.tolist()
        if face.guessed or (found.landmarks.mean(0) - place).norm() <= max(x2 - x1, y2 - y1):
            return Sight(picture, found.landmarks, window)
    return None


def searched(box: Box, latent_size: tuple[int, int]) -> tuple[Box, int]:
    """The window in which a face at `box` is looked for, SEARCHED times as large or ENOUGH, and how many of its pixels
    are averaged to one along each side."""
    sides = []
    for low, high, size in ((*box[:2], latent_size[0]), (*box[2:], latent_size[1])):
        side = min(max(SEARCHED * (high - low), ENOUGH), size)
        low = min(max((low + high - side) // 2, 0), size - side)
        sides.append((low, low + side))
    shrink = 2 if max(high - low for low, high in sides) > ENOUGH else 1
    (top, bottom), (left, right) = ((low, high - (high - low) % shrink) for low, high in sides)
    return (top, bottom, left, right), shrink


def _face_box(matrix: Tensor, latent_size: tuple[int, int], scale: int) -> Box:
    """FACE in latent pixels, at least one; matrix: [2,3], pixels to the crop."""
    corners = torch.linalg.solve(matrix[:, :2], (FACE.to(matrix) - matrix[:, 2]).T).T
    low, high = ((corners + 0.5) / scale).amin(0).floor().int(), ((corners + 0.5) / scale).amax(0).ceil().int()
    left, top = (max(0, min(int(a), size - 1)) for a, size in zip(low, latent_size[::-1]))
    right, bottom = (min(size, max(int(b), a + 1)) for a, b, size in zip((left, top), high, latent_size[::-1]))
    return top, bottom, left, right
