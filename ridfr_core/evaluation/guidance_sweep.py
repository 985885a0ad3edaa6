"""What ID-preserving sampling does at nano scale, on held-out people: step size x iterations x range x decode mode, and
how often the face is looked for."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ..faces import align
from ..guidance import LARGEST, STEP
from ..guided_face import Sight
from ..metrics import psnr, similarity
from ..recognition import embed
from ..restorer import Restorer
from ..training import clip_vision
from .guided import find_face, guided
from .held_out import BATCH, HeldOut, Method, kept
from .measure import markdown
from .nano_report import difference
from .shipped import nano_adapter, nano_restorer, nano_tower

ARMS = {False: "blind content", True: "identity adapter"}
PLACES = {None: "given", 0: "once"}  # find_every, in words
SEARCH = 3  # raise it when the search for faces changes; see held_out.PROTOCOL
MEASURES = ("judge", "guiding", "psnr")


@dataclass(frozen=True)
class Cell:
    """One point of the sweep. adapter: with the identity adapter, or blind content alone; step: relative to the noise's
    RMS, 0 is no guidance; start, end: of the run, 0 to 1; decode: a key of DECODE_MODES. find_every: None, the face's
    true place is given; else it is looked for as the node does it, in the LQ face, in the first estimate and again
    every so many steps; 0: in the LQ face alone."""

    adapter: bool
    step: float = 0.0
    iterations: int = 1
    start: float = 0.0
    end: float = 1.0
    decode: str = "face"
    find_every: int | None = None

    @property
    def name(self) -> tuple:
        """Of all fields that are set, so that a new one leaves the old cells' names alone."""
        return tuple((name, value) for name, value in asdict(self).items() if value is not None)


class Sweep:
    """Restores the first `people` of a split in every cell, with `seeds` start noises each; what was measured stays in
    the work folder."""

    def __init__(self, work: Path, split: str, people: int, seeds: int, steps: int = 20):
        self.bench, self.split, self.seeds = HeldOut(work, people, 1, steps, split=split), split, range(seeds)
        self.method = Method(nano_restorer(), nano_adapter(), nano_tower())
        self.key = self.bench.key(self.method)
        bench, rows = self.bench, self.bench.references[:, 0]
        photos, landmarks = bench.portraits.batch(rows), bench.portraits.landmarks[rows]
        with torch.no_grad():
            self.references = embed(bench.recogniser, align(photos, landmarks))
            self.truth = {"judge": bench.judged(bench.truth, bench.landmarks),
                          "guiding": embed(bench.recogniser, align(bench.truth, bench.landmarks))}
            clip = clip_vision.features(self.method.tower, photos, landmarks)
            self.tokens = self.method.adapter.tokens(self.references, clip)

    def measure(self, cell: Cell) -> dict[str, Tensor]:
        """Similarity to the truth by the judge and by the guiding recogniser, and PSNR: each [P], over the seeds."""
        parts = [self._measure(cell, seed) for seed in self.seeds]
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in MEASURES}

    def _measure(self, cell: Cell, seed: int) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            bench, images = self.bench, self._restore(cell, seed)
            with torch.no_grad():
                seen = {"judge": bench.judged(images, bench.landmarks),
                        "guiding": embed(bench.recogniser, align(images, bench.landmarks))}
            measured = {name: similarity(seen[name], self.truth[name]) for name in seen}
            return measured | {"psnr": psnr(images, bench.truth)}

        bound = (LARGEST,) if cell.step else ()
        detector = () if cell.find_every is None else (SEARCH, self.bench.face_model.detector.digest)
        return kept(self.bench.cache, (self.key, cell.name, seed, *bound, *detector), compute)

    def _restore(self, cell: Cell, seed: int) -> Tensor:
        """Restored faces [P,3,S,S]; a person's start noise is the same in every cell."""
        images = []
        for who in torch.arange(self.bench.people).split(BATCH):
            with torch.no_grad():
                identity = self.method.adapter.keys_values(self.tokens[who]) if cell.adapter else None
            restorer = self._restorer(cell, who)
            seeds = who + seed * 10_000
            images.append(restorer.restore(self.bench.lq[who], identity, steps=self.bench.steps, seeds=seeds))
        return torch.cat(images)

    def _restorer(self, cell: Cell, who: Tensor) -> Restorer:
        if cell.step == 0:
            return self.method.restorer
        bench, rows = self.bench, who.tolist()
        if cell.find_every is None:
            sights = [Sight(bench.lq[i], bench.landmarks[i]) for i in rows]
        else:
            sights = [find_face(bench.face_model, bench.lq[i]) for i in rows]
        return guided(self.method.restorer, bench.face_model, sights, [self.references[[i]] for i in rows], cell.step,
                      cell.iterations, cell.start, cell.end, cell.decode, cell.find_every or 0)


def cells(steps: Iterable[float], iterations: Iterable[int], ranges: Sequence[tuple[float, float]],
          decodes: Sequence[str], searches: Iterable[int]) -> list[Cell]:
    """For both arms: no guidance; every step size with every number of iterations over the first range, in the first
    mode; every further range, every further mode and every search (see `Cell.find_every`) with the node's step and one
    iteration."""
    grid = [*((step, n, ranges[0], decodes[0]) for n, step in product(iterations, steps)),
            *((STEP, 1, part, decodes[0]) for part in ranges[1:]),
            *((STEP, 1, ranges[0], decode) for decode in decodes[1:]),
            *((STEP, 1, ranges[0], decodes[0], every) for every in searches)]
    return [cell for adapter in ARMS
            for cell in (Cell(adapter), *(Cell(adapter, step, n, *part, *how) for step, n, part, *how in grid))]


def row(cell: Cell, measured: dict[str, Tensor], plain: dict[str, Tensor]) -> list[str]:
    """A table's row; the differences are to the same arm without guidance, with 95 % intervals over people."""
    name = [ARMS[cell.adapter], "none", *[""] * 4] if cell.step == 0 else \
        [ARMS[cell.adapter], f"{cell.step:g}", str(cell.iterations), f"{cell.start:g} to {cell.end:g}", cell.decode,
         PLACES.get(cell.find_every, f"every {cell.find_every}")]
    values = [f"{measured[m].mean():.3f}" for m in ("judge", "guiding")] + [f"{measured['psnr'].mean():.2f}"]
    if cell.step == 0:
        return [*name, *values, "", "", "", ""]
    rise = {m: difference(measured[m], plain[m]) for m in MEASURES}
    gap = difference(measured["guiding"] - plain["guiding"], measured["judge"] - plain["judge"])
    return [*name, *values, *(str(rise[m]) for m in MEASURES), str(gap)]


HEAD = ["arm", "step size", "iterations", "range", "decode", "face's place", "judge", "guiding", "PSNR",
        "judge, gain [95 %]", "guiding, gain [95 %]", "PSNR, gain in dB [95 %]",
        "gap: guiding's gain minus judge's [95 %]"]


def write(sweep: Sweep, out: Path, points: Sequence[Cell], command: str) -> None:
    """Measure the cells and write guidance_sweep.md, .json and .png into `out`."""
    measured, rows = {}, []
    for number, cell in enumerate(points, 1):
        measured[cell] = sweep.measure(cell)
        rows.append(row(cell, measured[cell], measured[Cell(cell.adapter)]))
        print(f"{number}/{len(points)}", *rows[-1], sep=" | ", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = (f"# The sweep\n\n`{command}`\n\n{sweep.bench.people} people of the {sweep.split} split, "
            f"{len(sweep.seeds)} start noises each. "
            "*judge*: similarity to the true face by a recogniser that shares neither architecture nor training people "
            "with the one that guides; *guiding*: by the latter. *face's place*: given, by the landmarks that the "
            "portrait was drawn with; once, found by the detector in the degraded face (its usual place where none is "
            "found); every N, found again in the estimate, at the first step and after so many.\n\n")
    (out / "guidance_sweep.md").write_text(text + markdown(HEAD, rows) + "\n\n![the sweep](guidance_sweep.png)\n",
                                           encoding="utf-8")
    data = [{**asdict(cell), **{name: values.tolist() for name, values in found.items()}}
            for cell, found in measured.items()]
    (out / "guidance_sweep.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    plot(measured, out / "guidance_sweep.png")


def plot(measured: dict[Cell, dict[str, Tensor]], path: Path) -> None:
    """Both recognisers' similarity over the step size: a panel for each arm, a line for each number of iterations, over
    the first range and decode mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=110, layout="constrained")
    guided = [cell for cell in measured if cell.step]
    for axes, (adapter, title) in zip(figure.subplots(1, 2, sharey=True), ARMS.items()):
        for i, iterations in enumerate(dict.fromkeys(cell.iterations for cell in guided)):
            first = guided[0]
            line = [Cell(adapter)] + [
                cell for cell in guided if cell == replace(first, adapter=adapter, step=cell.step,
                                                           iterations=iterations)]
            for name, style in (("judge", "-"), ("guiding", "--")):
                axes.plot([cell.step for cell in line], [measured[cell][name].mean() for cell in line], style,
                          color=f"C{i}", marker="o", label=f"{name}, {iterations} iteration{'s' * (iterations > 1)}")
        axes.set(title=title, xlabel="step size, relative to the noise", ylabel="similarity to the true face")
        axes.legend(fontsize=8)
    figure.savefig(path)
