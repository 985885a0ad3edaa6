"""The tables of RIDFR's paper, side by side with what the nano networks reach: `ridfr_core/nano/REPORT.md`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..metrics import Interval, bootstrap, similarity
from ..nano import WEIGHTS
from ..training.files import write_whole
from ..training.nano_arms import LAMBDAS, Arms
from ..training.nano_diffusion import latents_of
from .held_out import HeldOut, Measured, Method
from .measure import markdown
from .shipped import restorer

REPORT = WEIGHTS.parent / "REPORT.md"
PLOT = "lambda.png"
CAUSES = "## What did not come out, and why"
ARMS = ("baseline", "naive", "aligned")
TRAINED = {"3", "4", "lambda"}  # the tables of arms that are trained for them


@dataclass(frozen=True)
class Claim:
    """One thing the paper says. nano: a difference (neutral 0) or a ratio (neutral 1) that should lie above or below
    neutral, where that is asked, and above or below the bound, where there is one."""

    says: str
    paper: str
    nano: Interval
    neutral: float | None
    above: bool
    bound: float | None = None

    @property
    def sign(self) -> bool:
        """Whether the whole interval lies where it should."""
        return self.nano.low > self.neutral if self.above else self.nano.high < self.neutral

    @property
    def reached(self) -> bool:
        """Whether the estimate is on the right side of the bound."""
        return self.nano.value >= self.bound if self.above else self.nano.value <= self.bound

    def row(self) -> list[str]:
        sign = "" if self.neutral is None else yes(self.sign)
        target = "" if self.bound is None else f"{'≥' if self.above else '≤'} {self.bound:g}: {yes(self.reached)}"
        return [self.says, self.paper, str(self.nano), sign, target]


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    claims: Sequence[Claim]


def yes(value: bool) -> str:
    return "yes" if value else "**no**"


def mean(values: Tensor) -> str:
    return f"{values.mean():.3f}"


def ids(measured: Measured) -> Tensor:
    """Each person's similarity to the truth [P], over the references."""
    return measured.similarity.mean(1)


class NanoReport:
    """Makes the sections, training and measuring what they need.

    shipped: the method of Tables 1 and 2. seeds: how many of them each trained arm has. concat_steps: how long Table
    3's content stages last, as the arms' and further budgets. path: the report's file.
    """

    def __init__(self, held_out: HeldOut, shipped: Method, arms: Arms, seeds: int, guidances: Sequence[float],
                 concat_steps: Sequence[int], path: Path = REPORT):
        self.held_out, self.shipped, self.arms, self.path = held_out, shipped, arms, path
        self.seeds, self.guidances, self.concat_steps = range(seeds), guidances, concat_steps
        self.sections = {"1": self.blind_and_not, "4": self.alignment, "lambda": self.strengths,
                         "2": self.small_references, "3": self.concatenation}

    def measure(self, method: Method, guidance: float = 1.0, count: int | None = None, **how) -> Measured:
        """With the first `count` references (all by default; 0: blind)."""
        references = None if count == 0 else self.held_out.references[:, :count]
        return self.held_out.measure(method, references, guidance, **how)

    def arm(self, content: nn.Module, condition: Callable[[Tensor], Tensor] | None = None) -> Method:
        """The method of an arm's content module; see Restorer for `condition`, pixels by default."""
        nano = self.arms.nano
        return Method(restorer(nano.unet, nano.vae, content, condition), nano.adapter, nano.vision)

    def blind_and_not(self) -> Section:
        """RIDFR's Table 1."""
        bench = self.held_out
        blind = self.measure(self.shipped, count=0)
        restored = {guidance: self.measure(self.shipped, guidance) for guidance in self.guidances}
        wrong = bench.measure(self.shipped, bench.references[:, :1].roll(1, 0))
        rows = [("the LQ face itself", "", bench.compare(bench.lq)), ("blind", "0.389 (GPEN, the best)", blind)]
        rows += [(f"RIDFR, guidance {guidance:g}", "0.549", one) for guidance, one in restored.items()]
        rows += [("RIDFR with another person's photo, guidance 1", "", wrong)]
        table = [[name, paper, str(bootstrap(ids(one))), mean(one.psnr), mean(one.ssim),
                  "" if one.variance.isnan().any() else str(bootstrap(one.variance))] for name, paper, one in rows]
        rows = bench.references[:, 0]
        photo = bench.judged(bench.portraits.batch(rows), bench.portraits.landmarks[rows])
        photo = similarity(photo, bench.truth_embeddings)
        table.append(["another true photo of the person", "", str(bootstrap(photo)), "", "", ""])
        claims = [
            Claim(f"RIDFR over blind, guidance {guidance:g}", "1.41",
                  ratio(ids(one), ids(blind)), 1, True, 1.5)
            for guidance, one in restored.items()
        ]
        return Section("Table 1: identity similarity, RIDFR against blind",
                       markdown(["", "paper, IDS-HQ", "nano, IDS-HQ", "PSNR", "SSIM", "I.V."], table), claims)

    def small_references(self) -> Section:
        """RIDFR's Table 2, with the first two references."""
        sizes = {1: "0.549 (512 to 64, mixed)", 4: "0.548 (128)", 8: "0.531 (64)"}
        measured = {shrink: self.measure(self.shipped, count=2, shrink=shrink) for shrink in sizes}
        table = [[f"1/{shrink} ({128 // shrink} pixels)" if shrink > 1 else "full (128 pixels)", sizes[shrink],
                  str(bootstrap(ids(one))), mean(one.psnr)] for shrink, one in measured.items()]
        claims = [
            Claim(f"references of 1/{shrink} size over full ones", paper,
                  ratio(ids(measured[shrink]), ids(measured[1])), None, True, 0.95)
            for shrink, paper in ((4, "0.998"), (8, "0.967"))
        ]
        return Section("Table 2: identity similarity by the size of the references",
                       markdown(["references", "paper, IDS-HQ", "nano, IDS-HQ, guidance 1", "PSNR"], table), claims)

    def concatenation(self) -> Section:
        """RIDFR's Table 3, with all seeds at the first budget, with the first seed at the others: two content modules
        of the same budget, restoring blindly."""
        nano, table, claims = self.arms.nano, [], []
        paper, names = {"pixel": "0.294", "latent": "0.417"}, {"psnr": "PSNR", "ssim": "SSIM", "similarity": "IDS-HQ"}
        for steps in self.concat_steps:
            seeds = self.seeds if steps == self.concat_steps[0] else [0]
            arms = {
                "pixel": [self.arm(self.arms.content(seed, steps=steps)) for seed in seeds],
                "latent": [self.arm(self.arms.content(seed, latent=True, steps=steps),
                                    lambda lq: latents_of(nano.vae, lq)) for seed in seeds],
            }
            measured = {kind: [self.measure(arm, count=0) for arm in of_kind] for kind, of_kind in arms.items()}
            means = {kind: {name: torch.stack([getattr(one, name).mean(1) for one in of_kind]).mean(0)
                            for name in names} for kind, of_kind in measured.items()}
            table += [[kind, f"{steps}", paper[kind], *(str(bootstrap(one[name])) for name in names),
                       of_seeds([m.psnr for m in measured[kind]])] for kind, one in means.items()]
            claims += [Claim(f"{label}, pixel minus latent, {steps} steps", "LPIPS 0.123 lower",
                             difference(means["pixel"][name], means["latent"][name]), 0, True)
                       for name, label in names.items()]
        head = ["concatenation", "steps", "paper, LPIPS", "nano, PSNR", "nano, SSIM", "nano, IDS-HQ",
                "PSNR of each seed"]
        return Section("Table 3: pixel against latent concatenation, after the content stage, blind",
                       markdown(head, table), claims)

    def alignment(self) -> Section:
        """RIDFR's Table 4."""
        made = {
            "baseline": [self.arm(self.arms.content(seed)) for seed in self.seeds],
            "naive": [self.arm(self.arms.finetuned(seed, 0.0)) for seed in self.seeds],
            "aligned": [self.arm(self.arms.finetuned(seed, 1.0)) for seed in self.seeds],
        }
        paper, table, claims = {"baseline": "0.361", "naive": "0.239", "aligned": "0.145"}, [], []
        for guidance in self.guidances:
            measured = {name: [self.measure(arm, guidance) for arm in arms] for name, arms in made.items()}
            variance = {name: torch.stack([one.variance for one in seeds]).mean(0) for name, seeds in measured.items()}
            alike = {name: torch.stack([ids(one) for one in seeds]).mean(0) for name, seeds in measured.items()}
            table += [[name, f"{guidance:g}", paper[name], str(bootstrap(variance[name])),
                       of_seeds([one.variance for one in measured[name]]), str(bootstrap(alike[name])),
                       of_seeds([one.similarity for one in measured[name]]),
                       mean(torch.stack([one.psnr for one in measured[name]]))] for name in ARMS]
            claims += alignment_claims(variance, alike, f", guidance {guidance:g}")
        head = ["arm", "guidance", "paper, I.V.", "nano, I.V.", "I.V. of each seed", "nano, IDS-HQ",
                "IDS-HQ of each seed", "PSNR"]
        return Section("Table 4: identity variance", markdown(head, table), claims)

    def strengths(self) -> Section:
        """The choice of lambda, with the first seed and the first guidance."""
        measured = {strength: self.measure(self.arm(self.arms.finetuned(0, strength)), self.guidances[0])
                    for strength in LAMBDAS}
        table = [[f"{strength:g}", str(bootstrap(one.variance)), str(bootstrap(ids(one))), mean(one.psnr)]
                 for strength, one in measured.items()]
        plot([(s, one.variance.mean().item(), ids(one).mean().item()) for s, one in measured.items()],
             self.path.with_name(PLOT))
        claim = Claim("IDS-HQ, λ 30 minus λ 1", "\"high λ harms identity\"",
                      difference(ids(measured[30.0]), ids(measured[1.0])), 0, False)
        text = markdown(["λ", "nano, I.V.", "nano, IDS-HQ", "PSNR"], table)
        return Section(f"λ: variance against similarity, guidance {self.guidances[0]:g}",
                       f"{text}\n\n![variance against similarity]({PLOT})", [claim])

    def write(self, names: Sequence[str], command: str) -> None:
        """Make the sections and write them; what a person wrote under the heading CAUSES stays."""
        sections = [self.sections[name]() for name in names]
        verdict = markdown(["what the paper says", "paper", "nano [95 %]", "sign", "target"],
                           [claim.row() for section in sections for claim in section.claims])
        parts = ["# RIDFR's tables at nano scale", *self.introduction(names, command), verdict,
                 *(f"## {section.title}\n\n{section.text}" for section in sections)]
        if self.path.exists() and CAUSES in (before := self.path.read_text(encoding="utf-8")):
            parts.append(CAUSES + before.split(CAUSES, 1)[1].rstrip())
        text = "\n\n".join(parts) + "\n"
        write_whole(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def introduction(self, names: Sequence[str], command: str) -> list[str]:
        """How the figures were made, in paragraphs; what is true of trained arms only where there are any."""
        bench, guidances = self.held_out, " and ".join(f"{guidance:g}" for guidance in self.guidances)
        paragraphs = [
            f"Made by `{command}`. {bench.people} people that no network has seen, {bench.references.shape[1]} "
            f"references each; UniPC, {bench.steps} steps (the paper: 20), in bfloat16; guidance on the identity "
            f"{guidances}. Every number in brackets is a 95 % bootstrap interval over people; differences and ratios "
            "are paired. IDS-HQ is the cosine to the truth by the judge, a recogniser of another architecture, "
            "other training people and another loss than the one that conditions. I.V., the identity variance, is "
            "the trace of the covariance of the judge's unit embeddings of the results for one LQ face under all "
            "references, mean over people: 1/(R-1) Σ|e - mean(e)|². All results for a person begin with the same "
            "noise, so the references alone make the difference. Faces are aligned by the landmarks they were drawn "
            "with.",
            "Tables 1 and 2 are of the shipped weights. The arms of the others share the base and the adapter; "
            f"{self.arms.content_steps} steps of the content stage (the bundle: the same code), then "
            f"{self.arms.align_steps} of finetuning; {len(self.seeds)} seeds in Table 4 and, after "
            f"{self.concat_steps[0]} steps, in Table 3, one elsewhere. Training them took "
            f"{self.arms.minutes():.0f} minutes in all. LPIPS and the quality metrics need weights that the bundle has "
            "not, and judge photographs, so Table 3 is by PSNR, SSIM and IDS-HQ.",
        ]
        return paragraphs if TRAINED & set(names) else paragraphs[:1]


def alignment_claims(variance: dict[str, Tensor], alike: dict[str, Tensor], where: str) -> list[Claim]:
    """What Table 4 says, of I.V. and IDS-HQ [P] of the three arms."""
    baseline, naive, aligned = (variance[name] for name in ARMS)
    return [
        Claim(f"I.V., naive over baseline{where}", "0.661", ratio(naive, baseline), 1, False),
        Claim(f"I.V., aligned over naive{where}", "0.606", ratio(aligned, naive), 1, False),
        Claim(f"I.V., aligned over baseline{where}", "0.401", ratio(aligned, baseline), 1, False, 0.6),
        Claim(f"IDS-HQ, aligned over naive{where}", "", ratio(alike["aligned"], alike["naive"]), None, True, 0.98),
    ]


def ratio(a: Tensor, b: Tensor) -> Interval:
    """Of the means over people."""
    return bootstrap(a, b, statistic=lambda a, b: a / b)


def difference(a: Tensor, b: Tensor) -> Interval:
    """Of the means over people."""
    return bootstrap(a, b, statistic=lambda a, b: a - b)


def of_seeds(values: Sequence[Tensor]) -> str:
    return " · ".join(map(mean, values))


def plot(points: Sequence[tuple[float, float, float]], path: Path) -> None:
    """Similarity over variance, a curve through each (lambda, variance, similarity)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    strengths, variances, similarities = zip(*points)
    axes.plot(variances, similarities, marker="o")
    for strength, x, y in points:
        axes.annotate(f"λ {strength:g}", (x, y), xytext=(-6, 5), textcoords="offset points", fontsize=8, ha="right")
    axes.margins(0.1)  # room for the outermost labels
    axes.set(xlabel="identity variance", ylabel="identity similarity to the truth")
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))
