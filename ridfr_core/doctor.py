"""What a ComfyUI lacks for the shipped graphs: model files, packages, folders. Reads only; opens no network."""

import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import known_models, model_search
from .errors import RidfrError, in_one_line
from .face_model import digest_of
from .files import sha256
from .host import OLDEST_COMFYUI, numbers
from .known_models import KnownModel
from .model_search import HOLDS, Folders, recognise
from .nano import WEIGHTS
from .packages import REQUIRED, PackageError, need

GPU_RUNTIMES = ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
SEARCHED = (*known_models.FOLDERS, "loras")  # the model folders that it looks through
SMALL = ("ipadapter", "controlnet", "clip_vision")  # those of few files, where every one can be looked at


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
        return f"{self.state:<8}{self.text}".encode("utf-8", "backslashreplace").decode()  # file names may be anything


def examine(folders: Folders, version: str, workflows: Sequence[str], hashes: bool = False) -> Iterator[Finding]:
    """All findings, as they are made.

    Args:
        folders: ComfyUI's model folders, those of SEARCHED, and "output".
        version: of ComfyUI, "" where it is not known.
        workflows: names of known_models.WORKFLOWS.
        hashes: whether to compare each file's SHA-256, which reads it whole.
    """
    yield comfyui_version(version)
    yield from packages()
    yield from runtimes()
    yield from bundled()
    needed = unique(known_models.WORKFLOWS, workflows)
    said = ""
    for model in needed:
        graphs = tuple(name for name in workflows if model in known_models.WORKFLOWS.get(name, ()))
        finding = model_file(model, folders, hashes)
        said += finding.text
        yield replace(finding, graphs=graphs)
    for model in unique(known_models.OPTIONAL, workflows):
        finding = model_file(model, folders, hashes)
        yield finding if finding.healthy else replace(finding, state="note")
    used = dict.fromkeys(model.folder for model in needed)
    for name in (name for name in used if name in SMALL):
        yield from (stray(path, home, folders) for path, home in model_search.strays(name, folders)
                    if str(path) not in said)
    for name in ("output", *used):
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
    if (known := numbers(version)) is None:
        what = f"ComfyUI's version, {version!r:.40}, is not understood" if version else "ComfyUI's version is not known"
        return Finding("note", f"{what}; {oldest} or newer is needed")
    if known < OLDEST_COMFYUI:
        return Finding("wrong", f"ComfyUI {version:.40} is too old: update it to {oldest} or newer")
    return Finding("ok", f"ComfyUI {version:.40}")


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    """torch and its device, and the pack's own requirements, which are imported as the nodes import them."""
    try:
        yield Finding("ok", f"torch {torch.__version__}, {device()}")
    except Exception as error:  # of the driver
        yield Finding("wrong", f"torch {torch.__version__} cannot use the graphics card ({in_one_line(error)}): "
                      "restart the computer, or update the card's driver")
    for name in REQUIRED:
        try:
            need(name)
        except PackageError as error:
            yield Finding("wrong", str(error))


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU"
    return "no GPU: sampling runs on the processor, which takes minutes per picture"


def runtimes() -> Iterator[Finding]:
    """onnxruntime, where it is, and what it runs on. Its builds share one folder, so the last one hides the others."""
    builds = {name: version for name in ("onnxruntime", *GPU_RUNTIMES) if (version := installed(name))}
    if not builds:
        return
    names = ", ".join(f"{name} {version}" for name, version in builds.items())
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except Exception as error:  # a broken package may raise anything
        yield Finding("note", f"{names} cannot be imported ({in_one_line(error)}): this pack works without, others may "
                      "need it. To mend it, reinstall one of them")
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
    path = None
    try:
        path = model_search.in_place(model, folders)
        if path is None:
            return misplaced(model, folders)
        return found(model, path, folders, hashes)
    except RidfrError as error:
        return Finding("wrong", f"{path or model.name}: {error}")
    except Exception as error:  # whatever a strange file or folder raises, the verdict comes
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        return Finding("wrong", f"{path or model.name} cannot be read ({reason}): replace it. {source(model)}")


def found(model: KnownModel, path: Path, folders: Folders, hashes: bool) -> Finding:
    held = recognise(path)
    if not model_search.suits(model, held):
        wanted = f", but {model.family} is needed" if held.kind == model.kind else ""
        return Finding("wrong", f"{path} holds {held}{wanted}: replace it. {source(model)}")
    size = path.stat().st_size
    parts = [str(path), choice(model, path, folders), readable(size), published(model, path, size, hashes),
             HOLDS[held.kind] if model.kind else ""]
    return Finding("ok", ", ".join(filter(None, parts)))


def choice(model: KnownModel, path: Path, folders: Folders) -> str:
    """What a user must choose in the graph, which names the model's own place; "" where the file is there."""
    for root in map(Path, folders[model.folder]):
        if path.is_relative_to(root):
            chosen, graphs = path.relative_to(root), Path(model.path)
            if model.pack:
                chosen, graphs = chosen.parts[1], model.pack
            return "" if chosen == graphs else f"choose {chosen} in the graph"
    return ""


def misplaced(model: KnownModel, folders: Folders) -> Finding:
    """The finding for a model that is not where a loader finds it."""
    path = model_search.elsewhere(model, folders)
    if path is None:
        return Finding("missing", absent(model, folders))
    target = place(model, folders).parent
    return Finding("wrong", f"{path} lies in the wrong folder ({model.purpose}): move it to {target}")


def stray(path: Path, home: str, folders: Folders) -> Finding:
    """A note on a file that belongs in the model folder `home`."""
    where = next(iter(folders.get(home, ())), Path("models") / home)
    return Finding("note", f"{path} holds {recognise(path)}: move it to {where}")


def place(model: KnownModel, folders: Folders) -> Path:
    roots = folders.get(model.folder) or [Path("models") / model.folder]
    return Path(roots[0]) / model.path


def absent(model: KnownModel, folders: Folders) -> str:
    """What is missing, where it belongs and where to get it."""
    return f"{place(model, folders)} ({model.purpose}). {source(model)}"


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
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        state = "wrong" if name == "output" else "note"
        reason = getattr(error, "strerror", None) or error
        return Finding(state, f"folder {root} cannot be written ({reason}): change its permissions")


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
