"""Model files known by what they hold, whatever they are called: which one a graph can use, and where each belongs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from . import checkpoints
from .face_model import role_of
from .known_models import KnownModel

Folders = Mapping[str, Sequence[Path]]  # ComfyUI's name of a model folder -> where it is, in the order of search

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
WHOLE = 10**9  # bytes; PyTorch's old format, unlike the others, would be read whole to see what it holds
ROLES = {"detector": "a face detector", "recogniser": "a face recogniser", "other": "another network than a face model"}
HOLDS = checkpoints.KINDS | ROLES
HOMES = {  # kind -> ComfyUI's name of the folder that such files belong in
    "identity-adapter": "ipadapter", "ip-adapter": "ipadapter", "content-controlnet": "controlnet",
    "controlnet": "controlnet", "sd-checkpoint": "checkpoints", "clip-vision": "clip_vision", "lora": "loras",
}
BASES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}  # width of the text features that cross-attention reads
VISIONS = {(1024, 24): "ViT-L", (1280, 32): "ViT-H", (1664, 48): "ViT-bigG"}  # (width, layers)


class Contents(NamedTuple):
    """kind: a key of HOLDS. family: "SD1.5", "ViT-H", ...; "" where the tensors do not tell."""

    kind: str
    family: str = ""

    def __str__(self) -> str:
        return HOLDS[self.kind] + (f": {self.family}" if self.family else "")


def recognise(path: Path) -> Contents:
    """What a file holds, from its names and shapes alone. Raises RidfrError for a damaged one, OSError."""
    stat = path.stat()
    return _recognised(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _recognised(path: Path, size: int, _: int) -> Contents:
    if not size:
        raise checkpoints.CheckpointError(f"'{path.name}' is empty (0 bytes): download it again.")
    if path.suffix.lower() == ".onnx":
        return Contents(role_of(path))
    with path.open("rb") as file:
        if size > WHOLE and file.read(1) == b"\x80":
            return Contents("unknown")
    tensors, _ = checkpoints.read(path, "meta")
    kind = checkpoints.kind_of(tensors)
    return Contents(kind, _vision(tensors) if kind == "clip-vision" else _base(tensors))


def _base(tensors: Mapping[str, Tensor]) -> str:
    """The family of diffusion models that a checkpoint, a ControlNet or an adapter belongs to."""
    ends = ("attn2.to_k.weight", "to_k_ip.weight")
    widths = {width for key, tensor in tensors.items() if key.endswith(ends) for width in tensor.shape[1:2]}
    known = [BASES[width] for width in widths if width in BASES]
    foreign = widths or any(key.startswith("model.diffusion_model.") for key in tensors) and not any(
        key.startswith("model.diffusion_model.input_blocks.") for key in tensors)
    return known[0] if known else "of another family" if foreign else ""


def _vision(tensors: Mapping[str, Tensor]) -> str:
    """The size of a CLIP vision encoder, of transformers' names or of OpenCLIP's."""
    widths = [tensor.shape[0] for key, tensor in tensors.items() if tensor.ndim and key.endswith(
        ("embeddings.class_embedding", "patch_embedding.weight", "visual.class_embedding", "visual.conv1.weight",
         "vision_model.encoder.layers.0.layer_norm1.weight"))]
    blocks = ("vision_model.encoder.layers.", "visual.transformer.resblocks.")
    layers = {key.removeprefix(block).partition(".")[0] for key in tensors for block in blocks if key.startswith(block)}
    if not widths:
        return ""
    return VISIONS.get((widths[0], len(layers)), f"{widths[0]} wide, with {len(layers)} layers")


def fits(model: KnownModel, path: Path) -> bool:
    """Whether a file, of any name, can be used in the known one's place; a file that cannot be read cannot."""
    if model.word not in path.name.lower():
        return False
    try:
        return suits(model, recognise(path))
    except Exception:  # of a stranger's file; it need not be readable
        return False


def suits(model: KnownModel, held: Contents) -> bool:
    return held.kind == (model.kind or "unknown") and held.family in ("", model.family)


def weight_files(root: Path) -> Iterator[Path]:
    """All weight files below a folder, through links as ComfyUI goes, in the order of their names."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True) if os.path.isdir(root) else ():
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        paths = (Path(folder, name) for name in sorted(names))
        yield from (path for path in paths if path.suffix.lower() in SUFFIXES and os.path.isfile(path))


def in_place(model: KnownModel, folders: Folders) -> Path | None:
    """The file where a loader finds it: in its place, of its name deeper in its folder, or another that fits."""
    roots = [Path(root) for root in folders.get(model.folder, ())]
    if found := next((root / model.path for root in roots if os.path.isfile(root / model.path)), None):
        return found
    inside = [path for root in roots for path in weight_files(root / Path(model.path).parent)]
    packs = [pack for root in roots if model.pack for pack in sorted((root / "models").glob("*"))]
    beside = [path for pack in packs for path in weight_files(pack)]
    named = (path for path in inside + beside if path.name == model.name)
    return next(named, None) or next((path for path in inside if fits(model, path)), None)


def elsewhere(model: KnownModel, folders: Folders) -> Path | None:
    """The file in a folder where no loader finds it: of its name, or one that fits and whose kind tells enough."""
    searched = [root for name, roots in folders.items() if name != "output" for root in roots]
    paths = [path for root in searched for path in weight_files(root)]
    named = next((path for path in paths if path.name == model.name), None)
    tensors = [path for path in paths if path.suffix.lower() != ".onnx"] if model.kind in HOMES else []
    return named or next((path for path in tensors if fits(model, path)), None)


def strays(name: str, folders: Folders) -> Iterator[tuple[Path, str]]:
    """(file, name of the folder that it belongs in) of the files of a model folder that belong in another one."""
    for path in (path for root in folders.get(name, ()) for path in weight_files(Path(root))):
        try:
            home = HOMES.get(recognise(path).kind, name)
        except Exception:  # as in `fits`
            continue
        if home != name and not _has_adapter(path):
            yield path, home


def _has_adapter(lora: Path) -> bool:
    """Whether a file is NAME_lora of an adapter NAME beside it, where Load Identity Adapter looks for it."""
    adapter, mark, _ = lora.stem.rpartition("_lora")
    return bool(mark) and any(lora.with_name(adapter + suffix).is_file() for suffix in SUFFIXES)
