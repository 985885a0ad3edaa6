"""Whole runs: a graph of stock nodes and this pack's ends at the latent at which diffusers' pipeline ends."""

from dataclasses import replace

import pytest
import torch

from .reference import SCHEDULE, Size, comfy_model, content_controlnet, diffusers_unet, relative_rms

pytestmark = pytest.mark.usefixtures("inference_mode")

STEPS = 20
SEED = 5
SMALL_SDXL = Size(
    "SDXL",
    dict(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1, 1),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
)


@pytest.fixture(scope="module")
def samplers(pack):
    return pack.nodes.samplers


@pytest.fixture(scope="module")
def sample(comfy):
    """sample(model, positive, negative, latent, sampler, sigmas, cfg, add_noise) -> z_0, as Sampler Custom gives it."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    def sample(model, positive, negative, latent, sampler, sigmas, cfg, add_noise=True):
        out = SamplerCustom.execute(model, add_noise, SEED, cfg, positive, negative, sampler, sigmas, latent)[0]
        return model.model.process_latent_in(out["samples"])

    return sample


def test_ridfr(sd15, apply, load_content, samplers, sample):
    """UniPC, 20 steps, with content ControlNet, identity and LoRA. The pipeline takes one person."""
    import comfy.sample
    from diffusers import StableDiffusionControlNetPipeline

    from nodes import ControlNetApplyAdvanced

    sd15 = replace(sd15, photos=sd15.photos.first())
    net = content_controlnet(sd15.size)
    negative, positive = torch.randn(2, 1, 9, sd15.size.context)
    image, empty = torch.rand(1, 3, 128, 128), torch.zeros(1, 4, 16, 16)
    pipe = StableDiffusionControlNetPipeline(**sd15.pipe.components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        image=image,
        latents=comfy.sample.prepare_noise(empty, SEED),
        ip_adapter_image_embeds=[sd15.photos.show(sd15.unet, cfg=True)],
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        output_type="latent",
    ).images

    model = apply(sd15)
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        [[positive, {}]], [[negative, {}]], load_content(net), image.movedim(1, -1), 1.0, 0.0, 1.0
    )
    sigmas = samplers.PaperSchedule.execute(model, "linspace", STEPS)[0]
    sampler = samplers.PaperSampler.execute(samplers.UNIPC)[0]
    got = sample(model, positive, negative, {"samples": empty}, sampler, sigmas, 2.0)
    assert relative_rms(got, want) < 1e-3


def test_faceme(samplers, sample):
    """DDPM on the leading grid from the LQ-embedded start, with the same noises at each step."""
    import comfy.sample
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    from ridfr_core.layouts import unet_to_ldm

    unet = diffusers_unet(SMALL_SDXL)
    model = comfy_model(unet_to_ldm(unet.state_dict()), SMALL_SDXL)
    negative, positive = torch.randn(2, 1, 9, SMALL_SDXL.context)
    pooled, lq = torch.randn(1, 1280), 5 * torch.randn(1, 4, 16, 16)

    scheduler = DDPMScheduler(**SCHEDULE, timestep_spacing="leading", clip_sample=False, variance_type="fixed_small")
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    noise = comfy.sample.prepare_noise(lq, SEED)
    want = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=pooled,
        height=128,
        width=128,
        latents=scheduler.add_noise(lq * 0.13025, noise, torch.tensor([999])),
        generator=torch.Generator().manual_seed(SEED),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
    ).images

    more = {"pooled_output": pooled, "width": 128, "height": 128}
    sigmas = samplers.PaperSchedule.execute(model, "leading", STEPS)[0]
    start = samplers.LQStartNoise.execute(model, {"samples": lq}, sigmas, SEED)[0]
    sampler = samplers.PaperSampler.execute(samplers.DDPM)[0]
    generator = torch.Generator().manual_seed(SEED)
    # a dict of its own: ComfyUI gives all samplers the same one
    sampler.extra_options = {"noise_sampler": lambda *_: torch.randn(lq.shape, generator=generator)}
    got = sample(model, [[positive, more]], [[negative, more]], start, sampler, sigmas, 5.0, add_noise=False)
    assert relative_rms(got, want) < 1e-3
