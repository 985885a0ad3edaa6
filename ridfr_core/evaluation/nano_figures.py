"""What the nano bundle reaches on people it never saw, for its model card."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..metrics import psnr, similarity
from ..nano import WEIGHTS
from ..pictures import to_pil
from ..training.files import write_png, write_whole
from ..training.nano_diffusion import latents_of
from .held_out import HeldOut, Method
from .shipped import nano_adapter, nano_restorer, nano_tower

PEOPLE = 96
STEPS = 20


def measure(method: Method, bench: HeldOut) -> tuple[dict, dict[str, Tensor]]:
    """Restore the held-out faces blindly, with the right and with a wrong person's photo.

    Returns the figures and the pictures they were measured on. Similarity is by the judge, which shares neither
    architecture nor training people with the recogniser that conditions; faces are aligned by the truth's landmarks.
    """
    vae, rows = method.restorer.vae, bench.references[:, 0]
    conditions = {"blind": None, "ridfr": bench.keys_values(method, rows),
                  "wrong": bench.keys_values(method, rows.roll(1))}
    pictures = {"lq": bench.lq, "truth": bench.truth, "reference": bench.portraits.batch(rows)}
    for name, identity in conditions.items():
        pictures[name] = method.restorer.restore(bench.lq, identity, steps=STEPS, seeds=torch.arange(bench.people))
    with torch.no_grad():
        decoded = vae.decode(latents_of(vae, bench.truth) / method.restorer.scale).sample
        pictures["vae"] = (decoded / 2 + 0.5).clamp(0, 1)
    figures = {}
    for name, images in pictures.items():
        landmarks = bench.portraits.landmarks[rows] if name == "reference" else bench.landmarks
        alike = similarity(bench.judged(images, landmarks), bench.truth_embeddings)
        figures[name] = {"similarity": round(alike.mean().item(), 4)}
        if name not in ("truth", "reference"):
            figures[name]["psnr"] = round(psnr(images, bench.truth).mean().item(), 2)
    return figures, pictures


def write(work: Path) -> None:
    """Measure what is shipped; keep the figures in `weights/figures.json`, a sheet of pictures in the work folder."""
    shipped = Method(nano_restorer(), nano_adapter(), nano_tower())
    measured, pictures = measure(shipped, HeldOut(work, PEOPLE, 1, STEPS))
    figures = {"shipped": measured}
    print(json.dumps(figures, indent=1))
    text = json.dumps(figures, indent=1) + "\n"
    write_whole(WEIGHTS / "figures.json", lambda partial: partial.write_text(text))
    order = ("lq", "blind", "ridfr", "truth", "reference", "wrong", "vae")
    rows = torch.stack([pictures[name][:12] for name in order], 1)
    grid = functional.pad(rows, (0, 2, 0, 2)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    write_png(to_pil(grid), work / "figures.png")
