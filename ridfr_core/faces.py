"""Faces in images: detection by insightface's SCRFD in torch, and five-point similarity alignment.

Landmarks are pixels (x, y) with pixel centres at integers, in insightface's order: the viewer's left eye, the right
eye, nose tip, left and right mouth corner. Images are RGB in [0,1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import sha256
from .onnx_file import FaceModelError, read_graph
from .onnx_network import device_of, load_network
from .scrfd import LAYOUTS, Candidates, best_of_each, candidates, letterbox

# Where the five landmarks lie in an aligned crop. 112 px: insightface `face_align.arcface_dst`; 512 px: FFHQ's mean
# face as the face restoration field uses it (facexlib).
ARCFACE_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
FFHQ_TEMPLATE = torch.tensor(
    [[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935], [201.26117, 371.41043],
     [313.08905, 371.15118]])

CHUNK = 32  # crops cut in one go


def usual_place(width: int, height: int) -> Tensor:
    """Landmarks [5,2] where pictures cut to a face have it, as FFHQ's."""
    return (FFHQ_TEMPLATE + 0.5) * (torch.tensor([width, height]) / 512) - 0.5


def similarity_transform(src: Tensor, dst: Tensor) -> Tensor:
    """Least-squares rotation, scale and shift that take points onto others (Umeyama 1991).

    src: [B,N,2]; dst: [N,2] or [B,N,2]. Returns [B,2,3], M with dst ~ M[:, :2] src + M[:, 2]. In the plane the
    solution has a closed form: with both sets centred and read as complex numbers, factor = sum(conj(p) q) / sum|p|^2.
    In float32 at least, in an autocast region too, since there is no matrix product.
    """
    src = _at_least_float32(src)
    dst = dst.to(src).expand_as(src)
    src_mean, dst_mean = src.mean(1), dst.mean(1)
    p, q = src - src_mean[:, None], dst - dst_mean[:, None]
    norm = p.square().sum((1, 2))
    real = (p * q).sum((1, 2)) / norm
    imag = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / norm
    linear = torch.stack([torch.stack([real, -imag], -1), torch.stack([imag, real], -1)], 1)
    shift = dst_mean - (linear * src_mean[:, None]).sum(-1)
    return torch.cat([linear, shift[..., None]], -1)


def _at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 tells pixels of 512 apart only by fours."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def warp(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Resample images [B,C,H,W] by affine maps [B,2,3] from their pixels to those of a size x size output.

    Bilinear, zero outside, the pixel convention of `cv2.warpAffine`; differentiable in both arguments.
    Returns [B,C,size,size].
    """
    grid = warp_grid(matrix, images.shape[-2:], size)
    dtype = torch.promote_types(images.dtype, grid.dtype)
    warped = F.grid_sample(images.to(dtype), grid.to(dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(images.dtype)


def warp_grid(matrix: Tensor, image_size: tuple[int, int], size: int) -> Tensor:
    """`F.grid_sample`'s grid [B,size,size,2] of `warp`, for images of (height, width); in float32 at least."""
    (a, b, right), (c, d, down) = (row.unbind(-1) for row in _at_least_float32(matrix)[..., None, None, :].unbind(1))
    axis = torch.arange(size, device=a.device, dtype=a.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y, determinant = x - right, y - down, a * d - b * c
    source = torch.stack([d * x - b * y, a * y - c * x], -1) / determinant[..., None]
    extent = torch.tensor(image_size[::-1], device=a.device, dtype=a.dtype)
    return (2 * source + 1) / extent - 1


def align(images: Tensor, landmarks: Tensor, size: int = 112) -> Tensor:
    """Crops [B,3,size,size] aligned to the ArcFace template, as insightface's `norm_crop(image_size=size)`.

    images: [B,3,H,W]; landmarks: [B,5,2]; size: a multiple of 112 (112 for ArcFace, 224 for the CLIP of FaceID-Plus).
    """
    parts = zip(images.split(CHUNK), landmarks.to(images.device).split(CHUNK))
    template = ARCFACE_TEMPLATE * (size / 112)
    return torch.cat([warp(part, similarity_transform(points, template), size) for part, points in parts])


@dataclass(frozen=True)
class Face:
    """A detected face: box [4] (x1,y1,x2,y2) and landmarks [5,2] in pixels, score in [0,1]."""

    box: Tensor
    landmarks: Tensor
    score: float

    @property
    def area(self) -> float:
        x1, y1, x2, y2 = self.box.tolist()
        return (x2 - x1) * (y2 - y1)

    @property
    def height(self) -> float:
        """Of the box, in pixels."""
        return float(self.box[3] - self.box[1])


class Detector:
    """insightface's SCRFD, read from an ONNX file; it runs where its network lies.

    A face that fills the frame is easily missed, since the anchors end at about the input's size. So where nothing is
    found, the search goes on at other sizes and with a margin around the image.
    """

    MARGINS = (0.0, 0.25, 0.5)
    SIZES = (640, 320, 160)

    def __init__(self, path: str | Path, threshold: float = 0.5):
        """Raises FaceModelError for a file that is damaged, or of another network."""
        self.path, self.threshold = Path(path), threshold
        graph = read_graph(path)
        (shape,) = graph.inputs.values() if len(graph.inputs) == 1 else ([],)
        if len(graph.outputs) not in LAYOUTS or len(shape) != 4:
            raise FaceModelError(f"{self.path.name} is not an SCRFD detector with landmarks: use det_10g.onnx of "
                                 "insightface's buffalo_l, or another one whose name ends with kps or bnkps.")
        self.step = LAYOUTS[len(graph.outputs)].strides[-1]
        self.fixed = (shape[3], shape[2]) if shape[2] and shape[3] else None  # width, height
        width, height = self.fixed or (128, 128)
        self.network, outputs = load_network(self.path, graph, (1, 3, height, width))
        self._candidates(outputs, (width, height))  # are they what they should be?

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ONNX file."""
        return sha256(self.path)

    def detect(self, image: Tensor) -> list[Face]:
        """Faces in an image [3,H,W], RGB in [0,1], largest first; empty if there are none."""
        if not image.numel():
            return []
        for margin, size in self._attempts(image):
            if faces := self._search(image, margin, size):
                return sorted(faces, key=lambda face: face.area, reverse=True)
        return []

    @torch.no_grad()
    def _search(self, image: Tensor, margin: int, size: tuple[int, int]) -> list[Face]:
        pixels, scale = letterbox(image, size, margin)
        seen = self._candidates(self.network(pixels.to(device_of(self.network))), size)
        found = best_of_each(Candidates(seen.boxes / scale, seen.landmarks / scale, seen.scores))
        faces = zip(found.boxes - margin, found.landmarks - margin, found.scores.tolist())
        return [Face(box, landmarks, score) for box, landmarks, score in faces]

    def _candidates(self, outputs: Sequence[Tensor], size: tuple[int, int]) -> Candidates:
        try:
            return candidates(outputs, size, self.threshold)
        except ValueError as error:
            raise FaceModelError(f"{self.path.name} is not an SCRFD detector ({error}): use det_10g.onnx of "
                                 "insightface's buffalo_l.") from error

    def _attempts(self, image: Tensor) -> Iterator[tuple[int, tuple[int, int]]]:
        """(margin in the image's pixels, the input's width and height), the most promising first: no enlargement, no
        margin."""
        longest = max(image.shape[-2:])
        for share in self.MARGINS:
            margin = round(longest * share)
            if self.fixed:
                yield margin, self.fixed
                continue
            native = min(max(longest + 2 * margin, 128), 640)
            for size in dict.fromkeys(-(-size // self.step) * self.step for size in (native, *self.SIZES)):
                yield margin, (size, size)
