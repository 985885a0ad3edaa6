"""What a ComfyUI lacks for the shipped graphs: model files, packages, folders. Reads only; opens no network."""

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import checkpoints, known_models
from .face_model import digest_of, role_of
from .known_models import KnownModel
from .nano import WEIGHTS
from .recognition import FaceModelError

OLDEST_COMFYUI = (0, 18, 0)
PACKAGES = ("kornia", "safetensors", "insightface", "onnx", "onnxruntime")
GPU_RUNTIMES = ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
ROLES = {"detector": "a face detector", "recogniser": "a face recogniser", "other": "another network than a face model"}

Folders = Mapping[str, Sequence[Path]]  # ComfyUI's name of a model folder -> where it is, in the order of search


@dataclass(frozen=True)
class Finding:
    """state: "ok", "note" (works, but look at it), "missing" or "wrong"; the last two keep a graph from running.

    graphs: which; all of them if there are none.
    """

    state: str
    text: str
    graphs: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return self.state in ("ok", "note")

    def __str__(self) -> str:
        return f"{self.state:<8}{self.text}"


def examine(folders: Folders, version: str, workflows: Sequence[str], hashes: bool = False) -> Iterator[Finding]:
    """All findings, as they are made.

    Args:
        folders: ComfyUI's model folders, and "output".
        version: of ComfyUI, "" where it is not known.
        workflows: names of known_models.WORKFLOWS.
        hashes: whether to compare each file's SHA-256, which reads it whole.
    """
    yield comfyui_version(version)
    yield from packages()
    yield from runtimes()
    yield from bundled()
    needed = unique(known_models.WORKFLOWS, workflows)
    for model in needed:
        graphs = tuple(name for name in workflows if model in known_models.WORKFLOWS.get(name, ()))
        yield replace(model_file(model, folders, hashes), graphs=graphs)
    for model in unique(known_models.OPTIONAL, workflows):
        finding = model_file(model, folders, hashes)
        yield replace(finding, state="note") if finding.state == "missing" else finding
    for name in dict.fromkeys(["output", *(model.folder for model in needed)]):
        yield writable(name, folders.get(name, []))


def unique(table: Mapping[str, Sequence[KnownModel]], workflows: Sequence[str]) -> list[KnownModel]:
    return list(dict.fromkeys(model for name in workflows for model in table.get(name, ())))


def verdict(findings: Sequence[Finding], workflows: Sequence[str]) -> str:
    """The last lines: whether each graph can run."""

    def line(name: str) -> str:
        obstacles = sum(not one.healthy and (not one.graphs or name in one.graphs) for one in findings)
        return f"{name}: {f'obstacles: {obstacles}' if obstacles else 'ready'}"

    return "\n".join(map(line, workflows))


def comfyui_version(version: str) -> Finding:
    oldest = ".".join(map(str, OLDEST_COMFYUI))
    if not version:
        return Finding("note", f"ComfyUI's version is not known; {oldest} or newer is needed")
    if tuple(int(part) for part in version.split(".")[:3]) < OLDEST_COMFYUI:
        return Finding("wrong", f"ComfyUI {version} is too old: update it to {oldest} or newer")
    return Finding("ok", f"ComfyUI {version}")


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    """torch and its device, and the pack's own requirements."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = "Apple GPU"
    else:
        device = "no GPU: sampling runs on the processor, which takes minutes per picture"
    yield Finding("ok", f"torch {torch.__version__}, {device}")
    stand_ins = {"onnxruntime": GPU_RUNTIMES}
    missing = [name for name in PACKAGES if not any(map(installed, (name, *stand_ins.get(name, ()))))]
    if missing:
        names = " ".join(missing)
        yield Finding("wrong", f"not installed: {names}; run `pip install {names}` in ComfyUI's Python")


def runtimes() -> Iterator[Finding]:
    """onnxruntime and what it can run on. Its builds share one folder, so the one installed last hides the others."""
    builds = {name: version for name in ("onnxruntime", *GPU_RUNTIMES) if (version := installed(name))}
    if not builds:
        return  # `packages` has said so
    names = ", ".join(f"{name} {version}" for name, version in builds.items())
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except ImportError as error:
        yield Finding("wrong", f"{names} cannot be imported ({error}): reinstall one of them")
        return
    yield shadowed(builds, providers) or Finding("ok", f"{names}: {', '.join(providers)}")


def shadowed(builds: Mapping[str, str], providers: Sequence[str]) -> Finding | None:
    """A note where a GPU build of onnxruntime is installed but what is imported runs on the CPU alone."""
    gpu = [name for name in builds if name in GPU_RUNTIMES]
    if "onnxruntime" not in builds or not gpu or set(providers) - {"CPUExecutionProvider", "AzureExecutionProvider"}:
        return None
    return Finding(
        "note",
        f"onnxruntime {builds['onnxruntime']} (CPU) hides {gpu[0]} {builds[gpu[0]]}: this pack works, others may want "
        f"the GPU. To mend it: `pip uninstall onnxruntime`, then `pip install --force-reinstall --no-deps {gpu[0]}`",
    )


def bundled() -> Iterator[Finding]:
    """The nano models, which come with the pack."""
    broken = [name for name in known_models.BUNDLED if not (WEIGHTS / name).is_file()]
    if broken:
        yield Finding("wrong", f"nano models are missing from the pack ({', '.join(broken)}): install the pack again")
    else:
        yield Finding("ok", f"nano models: {len(known_models.BUNDLED)} files in {WEIGHTS}")


def model_file(model: KnownModel, folders: Folders, hashes: bool) -> Finding:
    """Where a model is, how large, whether it is the published file, and what it holds."""
    path = find(model, folders)
    if path is None:
        return Finding("missing", absent(model, folders))
    try:
        found = recognise(path)
    except (checkpoints.CheckpointError, FaceModelError) as error:
        return Finding("wrong", f"{path}: {error}")
    holds = (ROLES if path.suffix == ".onnx" else checkpoints.KINDS)[found]
    if model.kind and found != model.kind:
        return Finding("wrong", f"{path} holds {holds}: replace it. {source(model)}")
    size = path.stat().st_size
    parts = [str(path), readable(size), published(model, path, size, hashes), *([holds] if model.kind else [])]
    return Finding("ok", ", ".join(parts))


def find(model: KnownModel, folders: Folders) -> Path | None:
    """The file in its place, or one of its name deeper in a folder.

    Else any safetensors file of its kind: of an unpublished model, or a recogniser in its folder that was converted.
    """
    roots = [Path(root) for root in folders.get(model.folder, ())]
    for root in roots:
        if (root / model.path).is_file():
            return root / model.path
    for root in roots:
        below = root / Path(model.path).parent
        if deeper := sorted(below.rglob(model.name)):
            return deeper[0]
    if model.page and model.kind != "recogniser":
        return None
    below = Path(model.path).parent if model.page else Path()
    files = (path for root in roots for path in sorted((root / below).rglob("*.safetensors")))
    return next((path for path in files if holds_quietly(path) == model.kind), None)


def recognise(path: Path) -> str:
    """A key of checkpoints.KINDS or of ROLES. Raises CheckpointError or FaceModelError for a damaged file."""
    return role_of(path) if path.suffix == ".onnx" else checkpoints.kind_of(checkpoints.read(path, "meta")[0])


def holds_quietly(path: Path) -> str:
    try:
        return recognise(path)
    except checkpoints.CheckpointError:
        return "unknown"


def absent(model: KnownModel, folders: Folders) -> str:
    """What is missing, where it belongs and where to get it."""
    roots = folders.get(model.folder) or [Path("models") / model.folder]
    return f"{Path(roots[0]) / model.path} ({model.purpose}). {source(model)}"


def source(model: KnownModel) -> str:
    return f"From {model.page} (licence: {model.licence})" if model.page else "Train it: `ridfr train --help`"


def published(model: KnownModel, path: Path, size: int, hashes: bool) -> str:
    """Whether the file is the published one, by its size or, if asked, by its SHA-256."""
    if not model.sha256:
        return "not a published file"
    if model.kind == "recogniser" and path.suffix == ".safetensors":
        return f"converted from {'the published file' if digest_of(path) == model.sha256 else 'another file'}"
    if size != model.size:
        return f"another file than the published one of {readable(model.size)}"
    if not hashes:
        return "sha256 not compared"
    return "sha256 known good" if sha256(path) == model.sha256 else "sha256 unknown"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def writable(name: str, roots: Sequence[Path]) -> Finding:
    """Whether the first of a folder's places can be written: results go there, or a model that you download."""
    if not roots:
        return Finding("note", f"folder {name}: not known to this ComfyUI")
    root = Path(roots[0])
    try:
        with tempfile.TemporaryFile(dir=root):
            return Finding("ok", f"folder {root} can be written")
    except FileNotFoundError:
        return Finding("note", f"folder {root} is not there yet: make it")
    except OSError as error:
        state = "wrong" if name == "output" else "note"
        return Finding(state, f"folder {root} cannot be written ({error.strerror}): change its permissions")


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
