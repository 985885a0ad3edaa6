"""What the nano bundle reaches on people it never saw, for its model card."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..degradation import degrade
from ..face_model import load_face_model
from ..faces import align
from ..metrics import psnr
from ..nano import WEIGHTS
from ..nano.config import LATENT_SCALE
from ..recognition import embed
from .nano_diffusion import SEVERE, SPEC, Material, empty_prompt, latents_of, let_identity_in, prepare_lq, schedule
from .portrait_data import portrait_set

PEOPLE = 96
STEPS = 20


@torch.no_grad()
def sample(unet, content, lq: Tensor, identity=None, seed: int = 0) -> Tensor:
    """Latents [B,4,h,w] restored by UniPC in 20 steps, guidance 1.

    lq: prepared LQ [B,3,h,w]; identity: (K', V') of each layer, or None for the blind restoration.
    """
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler.from_config(schedule().config, solver_type="bh2")
    solver.set_timesteps(STEPS)
    z = torch.randn(len(lq), 4, *lq.shape[-2:], generator=torch.Generator().manual_seed(seed))
    context, kwargs = empty_prompt(len(lq)), {} if identity is None else {"identity": identity}
    for t in solver.timesteps:
        down, mid = content(SPEC.concat(z, lq), t, context, torch.zeros(()), return_dict=False)
        guess = unet(z, t, context, cross_attention_kwargs=kwargs, down_block_additional_residuals=down,
                     mid_block_additional_residual=mid).sample
        z = solver.step(guess, t, z).prev_sample
    return z


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images [B,3,H,W] in [0,1]."""
    with torch.no_grad():
        return (vae.decode(latents / LATENT_SCALE).sample / 2 + 0.5).clamp(0, 1)


def measure(nano, content: nn.Module, work: Path, split: str = "test") -> tuple[dict, dict[str, Tensor]]:
    """Restore `PEOPLE` held-out faces blindly, with the right and with a wrong person's photo.

    Returns the figures and the pictures they were measured on. Similarity is by the judge, which shares neither
    architecture nor training people with the recogniser that conditions; faces are aligned by the truth's landmarks.
    """
    held_out = portrait_set(work, split, PEOPLE, 2)
    judge = load_face_model(WEIGHTS / "insightface" / "models" / "nano_judge").recogniser
    material = Material(held_out, nano.vae, nano.vision, nano.material.recogniser)
    truth_rows = torch.arange(0, 2 * PEOPLE, 2)
    truth, points = held_out.batch(truth_rows), held_out.landmarks[truth_rows]

    generator = torch.Generator().manual_seed(1)
    lq = degrade(truth, **SEVERE.draw(PEOPLE, generator), generator=generator)
    pictures = {"lq": lq, "truth": truth, "reference": held_out.batch(truth_rows + 1)}
    prepared = prepare_lq(lq, material.latents.shape[-2:], SPEC)
    unet = let_identity_in(nano.unet)

    def identity(rows: Tensor):
        nobody = torch.zeros(len(rows), dtype=torch.bool)
        with torch.no_grad():
            return nano.adapter.keys_values(nano.adapter.tokens(*material.identity(rows, nobody)))

    conditions = {"blind": None, "ridfr": identity(truth_rows + 1), "wrong": identity((truth_rows + 1).roll(2))}
    for name, condition in conditions.items():
        pictures[name] = decode(nano.vae, sample(unet, content, prepared, condition))
    pictures["vae"] = decode(nano.vae, latents_of(nano.vae, truth))

    figures = {}
    with torch.no_grad():
        target = embed(judge, align(truth, points))
        for name, images in pictures.items():
            where = held_out.landmarks[truth_rows + 1] if name == "reference" else points
            similarity = (embed(judge, align(images, where)) * target).sum(1)
            figures[name] = {"similarity": round(similarity.mean().item(), 4)}
            if name not in ("truth", "reference"):
                figures[name]["psnr"] = round(psnr(images, truth).mean().item(), 2)
    return figures, pictures


def write(nano, work: Path) -> None:
    """Measure and keep the figures in `weights/figures.json`, and a sheet of pictures in the work folder."""
    from torchvision.utils import save_image

    figures = {}
    for name, content in {"content": nano.content, "aligned": nano.aligned}.items():
        figures[name], pictures = measure(nano, content, work)
    print(json.dumps(figures, indent=1))
    (WEIGHTS / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    order = ("lq", "blind", "ridfr", "truth", "reference", "wrong", "vae")
    rows = torch.stack([pictures[name][:12] for name in order], 1).flatten(0, 1)
    save_image(rows, work / "figures.png", nrow=len(order), padding=2)
