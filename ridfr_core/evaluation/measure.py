"""Measure restored faces of a data set: a row per image, a summary in the papers' columns, a contact sheet."""

import csv
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import perceptual
from ..contact_sheet import contact_sheet
from ..face_model import FaceModel
from ..faces import align
from ..metrics import Interval, bootstrap, identity_variance, landmark_distance, psnr, similarity, ssim
from ..pictures import read_image, resized, to_pil
from ..recognition import embed
from ..training.files import write_png, write_whole
from .folder import EvaluationError, Task

ROWS_OF_SHEET = 12
ODD = "backslashreplace"  # file names need not be Unicode, text files must be
# RIDFR's Table 1, then what FaceMe's tables have besides, then ours; with the better direction
COLUMNS = {"LPIPS": "↓", "IDS-HQ": "↑", "MANIQA": "↑", "MUSIQ": "↑", "CLIP-IQA": "↑", "HyperIQA": "↑", "PI": "↓",
           "PSNR": "↑", "SSIM": "↑", "FID": "↓", "LMD": "↓", "IDS-REF": "↑", "I.V.": "↓"}


@dataclass(frozen=True)
class Row:
    """values: column -> number, without those that could not be measured. embedding: the judge's, None if it found
    no face."""

    person: str
    image: str
    reference: str
    values: dict[str, float]
    embedding: Tensor | None
    seed: int = 0


class Judge:
    """Measures images with a recogniser and detector of its own, and with those of pyiqa's metrics that are here.

    absent: why metrics are not -> their names.
    """

    def __init__(self, face_model: FaceModel, device: torch.device):
        self.face_model, self.device = face_model, device
        self.face_model.recogniser.to(device)
        self.metrics, self.absent = {}, defaultdict(list)
        for name in perceptual.METRICS:
            try:
                self.metrics[name] = perceptual.load(name, device)
            except perceptual.MetricAbsent as reason:
                self.absent[str(reason)].append(name)
        self.faces: dict[Path, tuple[Tensor, Tensor] | None] = {}

    def row(self, task: Task, path: Path) -> Row:
        """Measure the image at `path`, which shows what the task asks for."""
        image = read_image(path)
        values, face = {}, self.face(path)
        truth = None if task.truth is None else resized(read_image(task.truth), image.shape[-2:])
        if truth is not None:
            values["PSNR"], values["SSIM"] = (metric(image[None], truth[None]).item() for metric in (psnr, ssim))
        for name, metric in self.metrics.items():
            full = name in perceptual.FULL_REFERENCE
            if name != "FID" and (truth is not None or not full):
                pair = (image[None].to(self.device), truth[None].to(self.device) if full else None)
                values[name] = perceptual.score(metric, *pair)[0]
        for column, photo in (("IDS-HQ", task.truth), ("IDS-REF", task.reference)):
            if face and photo and (other := self.face(photo)):
                values[column] = similarity(face[0], other[0]).item()
        if face and task.truth and (true := self.face(task.truth)):
            values["LMD"] = landmark_distance(face[1][None], true[1][None]).item() * image.shape[-1]
        reference = task.reference.stem if task.reference else ""
        return Row(task.person, task.lq.stem, reference, values, face and face[0], task.seed)

    @torch.no_grad()
    def face(self, path: Path) -> tuple[Tensor, Tensor] | None:
        """Unit embedding [512] and landmarks [5,2] as shares of the width, of the largest face; None without one."""
        if path not in self.faces:
            image, found = read_image(path), None
            if faces := self.face_model.detector.detect(image):
                landmarks = faces[0].landmarks
                crop = align(image[None].to(self.device), landmarks[None].to(self.device))
                found = embed(self.face_model.recogniser, crop)[0].cpu(), landmarks / image.shape[-1]
                if not torch.isfinite(found[0]).all():
                    raise EvaluationError(f"The judge {self.face_model.name} makes NaN of '{path}': its recogniser is "
                                          "damaged, get it again.")
            self.faces[path] = found
        return self.faces[path]

    def fid(self, images: list[Path], truths: list[Path]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            for kind, paths in (("images", images), ("truths", truths)):
                (Path(folder) / kind).mkdir()
                for number, path in enumerate(paths):
                    shutil.copy(path, Path(folder) / kind / f"{number:06d}{path.suffix}")
            return float(self.metrics["FID"](f"{folder}/images", f"{folder}/truths"))


def check_judge(judge: FaceModel, conditions: FaceModel) -> None:
    """Raises EvaluationError if the judge is the recogniser that the restoration was told by."""
    if judge.digest == conditions.digest:
        raise EvaluationError(f"The judge {judge.name} has the same recogniser file as {conditions.name}, which "
                              "conditions: it would judge its own work. Give another with --judge.")


def variance(rows: list[Row]) -> float | None:
    """Mean identity variance over LQ faces that were restored with several references; None if there are none."""
    several = [value for _, value in variances(rows)]
    return sum(several) / len(several) if several else None


def variances(rows: list[Row]) -> list[tuple[str, float]]:
    """(person, identity variance) of each LQ face that was restored with several references, from the same noise."""
    faces = defaultdict(list)
    for row in rows:
        if row.embedding is not None:
            faces[row.person, row.image, row.seed].append(row.embedding)
    return [(person, identity_variance(torch.stack(one)[None]).item())
            for (person, *_), one in faces.items() if len(one) > 1]


def averages(rows: list[Row]) -> dict[str, float]:
    """Column -> mean over the rows that have it."""
    means = {}
    for column in COLUMNS:
        found = [row.values[column] for row in rows if column in row.values]
        if found:
            means[column] = sum(found) / len(found)
    spread = variance(rows)
    return means if spread is None else means | {"I.V.": spread}


def intervals(rows: list[Row]) -> dict[str, Interval]:
    """Column -> the mean and its interval over people, of whom there are several."""
    found = {column: [(row.person, row.values[column]) for row in rows if column in row.values] for column in COLUMNS}
    return {column: interval for column, values in (found | {"I.V.": variances(rows)}).items()
            if (interval := over_people(values)) is not None}


def over_people(values: list[tuple[str, float]]) -> Interval | None:
    """Of (person, value): the mean over all values, and its interval where whole people are drawn; None of one person
    or where a value is infinite."""
    people: dict[str, list[float]] = defaultdict(list)
    for person, value in values:
        people[person].append(value)
    if len(people) < 2 or not all(math.isfinite(value) for _, value in values):
        return None
    sums, counts = (torch.tensor([float(one) for one in map(of, people.values())]) for of in (sum, len))
    return bootstrap(sums, counts, statistic=lambda total, count: total / count)


def write_csv(rows: list[Row], path: Path) -> None:
    columns = [column for column in COLUMNS if any(column in row.values for row in rows)]
    table = [["person", "image", "reference", "seed", *columns]]
    for row in rows:
        numbers = [f"{row.values[column]:.5g}" if column in row.values else "" for column in columns]
        table.append([row.person, row.image, row.reference, row.seed, *numbers])

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8", errors=ODD) as file:
            csv.writer(file).writerows(table)

    write_whole(path, write)


def summary(results: dict[str, dict[str, float]], notes: list[str],
            spreads: dict[str, dict[str, Interval]] | None = None) -> str:
    """Markdown: a line per method, the columns that anything was measured in, and notes below. spreads: the intervals
    of a method's columns."""
    columns = [column for column in COLUMNS if any(column in means for means in results.values())]
    head = ["method", *(f"{column} {COLUMNS[column]}" for column in columns)]
    spreads = spreads or {}
    rows = [[name, *(cell(means.get(c), spreads.get(name, {}).get(c)) for c in columns)]
            for name, means in results.items()]
    return "\n\n".join([markdown(head, rows), *notes]) + "\n"


def cell(mean: float | None, interval: Interval | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4g}" if interval is None else f"{mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def draw_sheet(tasks: list[Task], rows: list[Row], out: Path, title: str) -> None:
    """The first reference of the first LQ faces."""
    first = {}
    for task, row in zip(tasks, rows):
        first.setdefault((task.person, task.lq.stem), (task, row))
    shown = list(first.values())[:ROWS_OF_SHEET]
    kinds = {"degraded": lambda t: t.lq, "restored": lambda t: t.restored(out), "truth": lambda t: t.truth,
             "reference": lambda t: t.reference}
    columns = {name: [to_pil(read_image(path(task))) for task, _ in shown] for name, path in kinds.items()
               if all(path(task) for task, _ in shown)}
    alike = {"restored": [row.values.get("IDS-HQ") for _, row in shown]} if "truth" in columns else {}
    note = "similarity to the truth, by the judge" if alike else ""
    write_png(contact_sheet(columns, alike, title, note), out / "sheet.png")
