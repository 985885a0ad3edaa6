"""A data set of faces as folders: restore it, measure it, and write what came out.

    DATA/PERSON/lq/NAME.png     a degraded face, cropped as the base was trained (FFHQ's crop)
    DATA/PERSON/gt/NAME.png     the same face as it was, if it is known
    DATA/PERSON/ref/*.png       other photos of the person
    OUT/restored/PERSON/NAME--REFERENCE.png, with the next seeds NAME--REFERENCE--seed1.png, ...
    OUT/images.csv, OUT/summary.md, OUT/sheet.png
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter import IdentityAdapter
from ..color import fix_colors
from ..errors import RidfrError
from ..face_model import FaceModel
from ..faces import Detector, align
from ..pictures import EXTENSIONS, PictureError, read_image, resized, to_pil
from ..randomness import seed_of
from ..recognition import embed
from ..restorer import KeysValues, Restorer
from ..training.files import write_png
from .guided import find_face, guided


class EvaluationError(RidfrError):
    """A data set cannot be evaluated; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Task:
    """One LQ face to restore with one reference; without one, blindly. seed: of the noise, which also depends on the
    face, but not on the reference."""

    person: str
    lq: Path
    truth: Path | None
    reference: Path | None
    seed: int = 0

    @property
    def name(self) -> str:
        again = f"--seed{self.seed}" if self.seed else ""
        return (f"{self.lq.stem}--{self.reference.stem}" if self.reference else self.lq.stem) + again

    @property
    def noise(self) -> int:
        """The seed of the start noise."""
        return seed_of(self.person, self.lq.stem, self.seed)

    def restored(self, out: Path) -> Path:
        return out / "restored" / self.person / f"{self.name}.png"


def find_tasks(data: Path, references: int, detector: Detector, seeds: int = 1) -> tuple[list[Task], dict[Path, str]]:
    """All that is to be restored, each LQ face with the first `references` photos that show a face (0: blindly), each
    `seeds` times, and why other files cannot be used. Raises EvaluationError if nothing is left, or if two results
    would have one name."""
    if not data.is_dir():
        raise EvaluationError(f"'{data}' is not a folder: give the one that holds a folder for each person.")
    tasks, unusable = [], {}
    for folder in sorted(path for path in data.glob("*") if path.is_dir()):
        if not (faces := readable(folder / "lq", unusable)):
            unusable[folder / "lq"] = "there is no degraded face, so the person is left out"
            continue
        photos = with_face(folder / "ref", references, detector, unusable) if references else [None]
        truths = {path.stem.casefold(): path for path in readable(folder / "gt", unusable)}
        found = {lq: fitting(lq, truths.get(lq.stem.casefold()), unusable) for lq in faces}
        tasks += [Task(folder.name, lq, truth, photo, seed)
                  for lq, truth in found.items() for photo in photos for seed in range(seeds)]
    if not tasks:
        raise EvaluationError(f"'{data}' has nothing to restore: it needs PERSON/lq/NAME.png"
                              + (" and PERSON/ref/*.png." if references else "."))
    check_names(tasks)
    return tasks, unusable


def check_names(tasks: list[Task]) -> None:
    """Raises EvaluationError where results of a person would overwrite one another: a--b with c, and a with b--c."""
    known: dict[tuple[str, str], Task] = {}
    for task in tasks:
        other = known.setdefault((task.person, task.name.casefold()), task)
        if other is not task:
            raise EvaluationError(f"The results of '{other.lq.name}' and '{task.lq.name}' of {task.person} would have "
                                  f"one name, {task.name}.png: rename the faces or the references.")


def with_face(folder: Path, count: int, detector: Detector, unusable: dict[Path, str]) -> list[Path]:
    """The first `count` images of a folder in which a face is found; why others are not used goes to `unusable`."""
    photos = []
    for path in readable(folder, unusable):
        if len(photos) == count:
            break
        if detector.detect(read_image(path)):
            photos.append(path)
        else:
            unusable[path] = "no face was found in it"
    if not photos:
        unusable[folder] = "there is no reference, so the person is left out"
    return photos


def readable(folder: Path, unusable: dict[Path, str]) -> list[Path]:
    """The images of a folder, each of another stem, by which results are called; the others go to `unusable` with the
    reason."""
    good: dict[str, Path] = {}
    for path in sorted(path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS):
        try:
            read_image(path)
        except PictureError as error:
            unusable[path] = error.reason
            continue
        first = good.setdefault(path.stem.casefold(), path)
        if first is not path:
            unusable[path] = f"its results would be called as those of {first.name}, so rename it"
    return list(good.values())


def fitting(lq: Path, truth: Path | None, unusable: dict[Path, str]) -> Path | None:
    """The truth, if it has the shape of the LQ face; else it cannot be compared."""
    if truth is not None and not alike(shape_of(lq), shape_of(truth)):
        unusable[truth] = "its shape is not that of the degraded face, so it is not compared"
        return None
    return truth


def only_square(tasks: list[Task], unusable: dict[Path, str]) -> list[Task]:
    """Those whose LQ face is a square, as the networks take it. Raises EvaluationError if there are none."""
    for lq in {task.lq: None for task in tasks}:
        height, width = shape_of(lq)
        if not alike((height, width), (1, 1)):
            unusable[lq] = f"it has {width}x{height} pixels, but must be a square"
    if square := [task for task in tasks if task.lq not in unusable]:
        return square
    raise EvaluationError(f"No degraded face is a square ('{tasks[0].lq}', for example, is not): crop each to a "
                          "square from above the hair to below the chin.")


def shape_of(path: Path) -> tuple[int, int]:
    """Height and width."""
    return tuple(read_image(path).shape[-2:])


def alike(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two shapes are the same but for their scale, to 2 %."""
    return abs(a[0] * b[1] / (a[1] * b[0]) - 1) < 0.02


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What restores: the networks on `device`, and the guidance on the identity. size: of the faces, in pixels.
    id_preserving: the step size of ID-preserving sampling, 0 without. color_fix: a method of `fix_colors`, or None."""

    restorer: Restorer
    adapter: IdentityAdapter
    shortcut: bool
    tower: nn.Module
    face_model: FaceModel
    size: int
    device: torch.device
    guidance: float = 1.0
    steps: int = 20
    id_preserving: float = 0.0
    color_fix: str | None = None

    def restore(self, tasks: list[Task]) -> Tensor:
        """[B,3,size,size]. Raises EvaluationError where a result is not finite."""
        lq = torch.stack([resized(read_image(task.lq), (self.size, self.size)) for task in tasks]).to(self.device)
        identity, nobody, restorer = None, None, self.restorer
        if tasks[0].reference is not None:
            embeddings, clip = map(torch.cat, zip(*(self.features(task.reference) for task in tasks)))
            identity = self._keys_values(embeddings, clip)
            nobody = [(k.expand(len(tasks), -1, -1), v.expand(len(tasks), -1, -1)) for k, v in self.nobody]
            if self.id_preserving:
                sights = [find_face(self.face_model, picture) for picture in lq.cpu()]
                restorer = guided(restorer, self.face_model, sights, embeddings.split(1), self.id_preserving)
        seeds = torch.tensor([task.noise for task in tasks])
        restored = restorer.restore(lq, identity, nobody, self.guidance, self.steps, seeds)
        for task, image in zip(tasks, restored):
            if not torch.isfinite(image).all():
                raise EvaluationError(f"The restoration of '{task.lq}' has NaN or infinite values: a weight file is "
                                      "damaged or of another base, or --guidance is too strong.")
        return fix_colors(restored, lq, self.color_fix).clamp(0, 1) if self.color_fix else restored

    @lru_cache(maxsize=256)  # noqa: B019  one pipeline lives as long as the command
    def features(self, photo: Path) -> tuple[Tensor, Tensor]:
        """Embedding [1,512] and CLIP features [1,T,D] of the face in a photo, which has one (see `find_tasks`)."""
        from ..training import clip_vision

        image = read_image(photo)
        face = self.face_model.detector.detect(image)[0]
        images, landmarks = image[None].to(self.device), face.landmarks[None].to(self.device)
        with torch.no_grad():
            return (embed(self.face_model.recogniser, align(images, landmarks)),
                    clip_vision.features(self.tower, images, landmarks))

    @cached_property
    def nobody(self) -> KeysValues:
        from ..training import clip_vision

        return self._keys_values(torch.zeros(1, 512, device=self.device),
                                 clip_vision.features_of_nobody(self.tower)[None])

    @torch.no_grad()
    def _keys_values(self, embeddings: Tensor, clip: Tensor) -> KeysValues:
        return self.adapter.keys_values(self.adapter.tokens(embeddings, clip, self.shortcut))


def load_pipeline(base: str, content: str, adapter: str, clip_vision: str, face_model: FaceModel, plus_v1: bool,
                  guidance: float, steps: int, id_preserving: float, color_fix: str | None,
                  device: torch.device) -> Pipeline:
    """From files, folders or "nano"; all in fp32. plus_v1: the adapter is FaceID Plus, not PlusV2."""
    from ..training.base import load_base
    from ..training.clip_vision import load_tower
    from ..training.networks import let_identity_in, merge_lora
    from ..training.run import check_adapter, load_adapter, load_content
    from ..training.stages import Frozen

    loaded = load_base(base)
    control, spec = load_content(content, loaded)
    projection, lora = load_adapter(adapter)
    tower = load_tower(clip_vision)
    check_adapter(projection, loaded, tower.config.hidden_size, adapter)
    merge_lora(loaded.unet, lora, 1.0)
    let_identity_in(loaded.unet)
    frozen = Frozen(loaded.to(device, torch.float32), spec)
    restorer = Restorer(
        unet=frozen.base.unet, vae=frozen.base.vae, content=control.to(device).eval(), spec=spec,
        context=frozen.base.prompt, schedule=dict(frozen.base.schedule.config),
        scale=frozen.base.vae.config.scaling_factor, condition=frozen.condition,
    )
    face_model.recogniser.to(device)
    size = 128 if loaded.name == "nano" else 512
    return Pipeline(restorer, projection.to(device).eval(), not plus_v1, tower.to(device), face_model,
                    size, device, guidance, steps, id_preserving, color_fix)


def restore_all(pipeline: Pipeline, tasks: list[Task], out: Path, batch: int) -> None:
    """Write the restored faces."""
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        for task, image in zip(part, pipeline.restore(part)):
            write_png(to_pil(image), task.restored(out))
        print(f"restored {start + len(part)} of {len(tasks)}", flush=True)


def export_portraits(folder: Path, people: int, references: int) -> None:
    """Held-out nano portraits as such a data set: view 0 severely degraded, the others as references."""
    from ..degradation import degrade
    from ..nano.portraits import SPLITS, render
    from ..training.nano_diffusion import SEVERE

    generator = torch.Generator().manual_seed(1)
    for person in range(people):
        seeds = torch.full((1 + references,), SPLITS["test"].start + person), torch.arange(1 + references)
        images = render(*seeds).image
        lq = degrade(images[:1], **SEVERE.draw(1, generator), generator=generator)
        named = {"lq/0": lq[0], "gt/0": images[0]} | {f"ref/{i}": one for i, one in enumerate(images[1:], 1)}
        for name, image in named.items():
            write_png(to_pil(image), folder / f"{person:04d}" / f"{name}.png")
