"""The papers' samplers as stock SAMPLER, SIGMAS and LATENT, for the stock node Sampler Custom."""

import math
from functools import partial

import comfy.sample
import comfy.samplers
import torch
from comfy.extra_samplers import uni_pc
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete
from comfy_api.latest import io
from torch import Tensor

from ..ridfr_core.errors import RidfrError
from ..ridfr_core.schedules import GRIDS, diffuse, timesteps
from . import types
from .checks import checked

UNIPC, DDPM = "UniPC (RIDFR)", "DDPM (FaceMe)"
MOST_IMAGES = 10_000  # of a batch: noise is drawn for all indices up to the largest


class PaperSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_PaperSampler",
            display_name="Paper Sampler",
            category=types.CATEGORY,
            description="The sampler of the paper, for the stock node Sampler Custom. The stock uni_pc_bh2 is nearly "
            "RIDFR's UniPC, but of third order instead of second, and it stops at a noise level of 0.001 instead of 0: "
            "with KSampler's 'normal', the nano models' latent after 20 steps is off by 1.4e-3 (relative RMS). "
            "The stock ddpm is FaceMe's as it is.",
            search_aliases=["unipc", "uni_pc_bh2", "ddpm", "diffusers scheduler", "ridfr sampler", "faceme sampler"],
            inputs=[
                io.Combo.Input(
                    "paper",
                    options=[UNIPC, DDPM],
                    default=UNIPC,
                    display_name="sampler",
                    tooltip="UniPC is RIDFR's, for 20 steps of the 'linspace' schedule. DDPM is FaceMe's, for 50 steps "
                    "of the 'leading' schedule; it adds new noise at every step.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Goes to Sampler Custom."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, paper: str) -> io.NodeOutput:
        if paper == DDPM:
            return io.NodeOutput(comfy.samplers.sampler_object("ddpm"))
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_unipc))


def sample_unipc(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    """UniPC of order 2 with B_2(h), its last step down to the given last sigma. An interface of k-diffusion's kind.

    Raises RidfrError for fewer than 2 steps, and for levels that do not fall, between which the solver would divide by
    zero.
    """
    schedule = uni_pc.SigmaConvert()
    check_falling(sigmas, "UniPC", least=3)
    steps = schedule.marginal_lambda(sigmas[:-1]).diff()
    if not ((steps > 0) & steps.isfinite()).all():
        raise RidfrError(
            "UniPC needs noise levels that lie apart, all but the last between about 0.001 and a million: use those "
            "of Paper Schedule."
        )
    solver = uni_pc.UniPC(partial(uni_pc.predict_eps_sigma, model, **extra_args or {}), schedule, variant="bh2")
    x = x / (1 + sigmas[0] ** 2).sqrt()  # the solver's x keeps unit variance
    order = min(2, len(sigmas) - 2)
    x = solver.sample(x, sigmas, order=order, method="multistep", callback=callback, disable_pbar=disable)
    return x / schedule.marginal_alpha(sigmas[-1])


class PaperSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_PaperSchedule",
            display_name="Paper Schedule",
            category=types.CATEGORY,
            description="The noise levels at which the papers call the model, for the stock node Sampler Custom. The "
            "stock scheduler 'ddim_uniform' with 50 steps is 'leading' here; KSampler's 'normal' is near 'linspace', "
            "but at times between the whole numbers that the model was trained on, such as 949.05.",
            search_aliases=["sigmas", "scheduler", "timesteps", "linspace", "leading", "diffusers schedule"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: SD1.5, SDXL or the nano models."),
                io.Combo.Input(
                    "grid",
                    options=list(GRIDS),
                    default=GRIDS[0],
                    tooltip="'linspace' is RIDFR's: 20 steps are the model's times 999, 949, ..., 50. 'leading' is "
                    "FaceMe's: 50 steps are 981, 961, ..., 1.",
                ),
                io.Int.Input("steps", default=20, min=2, max=500, tooltip="RIDFR takes 20 steps, FaceMe 50."),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="Noise levels, falling to 0. Goes to Sampler Custom and LQ Start Noise.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, grid: str, steps: int) -> io.NodeOutput:
        levels = noise_levels(model)
        sigmas = levels[timesteps(grid, steps, len(levels))]
        return io.NodeOutput(torch.cat([sigmas, sigmas.new_zeros(1)]))


class LQStartNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LQStartNoise",
            display_name="LQ Start Noise",
            category=types.CATEGORY,
            description="The start of FaceMe: the degraded face under strong noise, instead of noise alone. "
            "For the stock node Sampler Custom with 'add_noise' off. KSampler with the degraded face's latent does "
            "something else: it adds the noise of its first time, 981, where FaceMe adds that of the last, 999, in "
            "which the face is a tenth fainter. (FaceMe draws the latent at random around what VAE Encode gives.)",
            search_aliases=["faceme init", "lq embedded noise", "add noise", "q sample", "initial noise"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: SD1.5, SDXL or the nano models."),
                io.Latent.Input("latent", tooltip="The degraded face, from the stock node VAE Encode."),
                io.Sigmas.Input("sigmas", tooltip="From Paper Schedule: the same as Sampler Custom gets."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=types.LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="The same seed gives the same start.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Goes to Sampler Custom, with 'add_noise' off.")],
        )

    @classmethod
    @checked
    def execute(cls, model: ModelPatcher, latent: dict, sigmas: Tensor, seed: int) -> io.NodeOutput:
        levels = noise_levels(model)
        samples = latent["samples"].cpu()
        check_latent(samples, latent.get("batch_index"), model.get_model_object("latent_format").latent_channels)
        check_falling(sigmas, "LQ Start Noise", least=2)
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        to_model, from_model = (model.get_model_object(f"process_latent_{way}") for way in ("in", "out"))
        start = diffuse(to_model(samples), noise, levels[-1])
        start = start * math.hypot(1, sigmas[0])  # as samplers scale it, who take it to be at their first level
        return io.NodeOutput({**latent, "samples": from_model(start)})


def check_falling(sigmas: Tensor, who: str, least: int) -> None:
    """Raises RidfrError unless `sigmas` are at least `least` noise levels that fall, none of them below 0."""
    if len(sigmas) < least:
        raise RidfrError(f"{who} needs at least {least - 1} steps, but there are {len(sigmas)} noise levels: ask the "
                         "schedule for more.")
    if not ((sigmas.diff() < 0).all() and sigmas[-1] >= 0):
        shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6].tolist())
        raise RidfrError(f"{who} needs noise levels that fall at every step and end at 0 or above, but they begin with "
                         f"{shown}: use those of Paper Schedule or a stock scheduler node as they are.")


def check_latent(samples: Tensor, batch_index, channels: int) -> None:
    """Raises RidfrError unless `samples` are pictures' latents with the model's channels and an index for each."""
    if samples.ndim != 4 or samples.shape[1] != channels:
        size = "x".join(map(str, samples.shape))
        raise RidfrError(f"The latent has the size {size}, but this model's are batch x {channels} x height x width: "
                         "encode the degraded face with this model's VAE.")
    if batch_index is None:
        return
    whole = isinstance(batch_index, (list, tuple)) and all(isinstance(index, int) for index in batch_index)
    if not (whole and len(batch_index) == len(samples) and all(0 <= index < MOST_IMAGES for index in batch_index)):
        raise RidfrError("The latent's batch_index does not fit its pictures (one number for each, from 0): look at "
                         "the node that made it.")


def noise_levels(model: ModelPatcher) -> Tensor:
    """sigma of each of the model's training times [1000], rising. Raises RidfrError for models of another kind."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete):
        raise RidfrError(
            f"The papers' schedules are for models with a table of noise levels, as SD1.5 and SDXL, but this model "
            f"({type(model.model).__name__}) has none: use a stock scheduler node for it."
        )
    return sampling.sigmas.cpu()
