"""ID-Preserving Sampling against the same update in a loop of diffusers."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("inference_mode")


def in_diffusers(weights, network, convert, prefix):
    """A diffusers network with the weights of the checkpoint."""
    from safetensors.torch import load_file

    state = load_file(weights / "checkpoint.safetensors")
    names = convert({key: torch.full((1,), i) for i, key in enumerate(network.state_dict())})
    keys = list(network.state_dict())
    back = {keys[int(i)]: state[prefix + name] for name, i in names.items()}
    network.load_state_dict({k: v.view(network.state_dict()[k].shape) for k, v in back.items()})
    return network.eval().requires_grad_(False)


def guided_by_diffusers(weights, recogniser, references, landmarks, noise, prompt, update):
    """Eq. 7 in the second half of a DDIM loop of diffusers, in the paper's symbols, from pure noise at its level.

    update(eps, gradient): what is added to eps.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from ridfr_core.faces import align
    from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
    from ridfr_core.nano import config

    unet = in_diffusers(weights, UNet2DConditionModel(**config.UNET), unet_to_ldm, "model.diffusion_model.")
    vae = in_diffusers(weights, AutoencoderKL(**config.VAE), vae_to_ldm, "first_stage_model.")
    solver = DDIMScheduler(
        **config.SCHEDULE, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    solver.set_timesteps(4)
    z = noise * (1 - solver.alphas_cumprod[499]).sqrt()
    for t in solver.timesteps[2:]:  # 499, 249: at the first two, random networks amplify rounding errors
        alpha_bar = solver.alphas_cumprod[t]
        v = unet(z, t, prompt.expand(len(z), -1, -1)).sample
        eps = alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * z
        for _ in range(2):
            eps.requires_grad_()
            z0 = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            face = align(vae.decode(z0 / config.LATENT_SCALE).sample / 2 + 0.5, landmarks) * 2 - 1
            similarity = F.cosine_similarity(recogniser(face), references)
            (gradient,) = torch.autograd.grad(similarity.sum(), eps)
            eps = (eps + update(eps, gradient)).detach()
        v = (eps - (1 - alpha_bar).sqrt() * z) / alpha_bar.sqrt()
        z = solver.step(v, t, z).prev_sample
    return z / config.LATENT_SCALE


def rms(x):
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize(
    "kind, step_size, update",
    [
        ("raw, as in the paper", 10.0, lambda eps, gradient: 10 * gradient),
        ("relative to the noise", 0.03, lambda eps, gradient: 0.03 * rms(eps) * gradient / rms(gradient)),
    ],
    ids=["raw", "relative"],
)
def test_the_same_update_in_diffusers(guided, nano, people, face_model, weights, kind, step_size, update):
    """Euler's steps in sigma are DDIM's; the whole picture is decoded, since that is Eq. 7 without a short cut."""
    from comfy.sample import sample_custom
    from comfy.samplers import sampler_object

    from ridfr_core.recognition import load_iresnet

    g = torch.Generator().manual_seed(5)
    lq, noise = torch.rand(2, 128, 128, 3, generator=g), torch.randn(2, 4, 16, 16, generator=g)
    sigmas = nano.model.get_model_object("model_sampling").sigmas[torch.tensor([499, 249])]
    sigmas = torch.cat([sigmas, torch.zeros(1)])

    def comfy(model):
        latent = torch.zeros_like(noise)
        return sample_custom(model, noise, 1.0, sampler_object("euler"), sigmas, nano.prompt, nano.prompt, latent)

    ours = comfy(guided(lq=lq, step_kind=kind, step_size=step_size, iterations=2, decode="whole picture")[0])
    landmarks = face_model.model.detector.detect(lq[0].movedim(-1, 0))[0].landmarks
    with torch.inference_mode(False):
        recogniser = load_iresnet(weights / "insightface" / "models" / "nano" / "rec_nano.onnx")
        references = torch.cat([person.embeddings for person in people.people]).clone()
        theirs = guided_by_diffusers(
            weights,
            recogniser,
            references,
            landmarks.clone().expand(2, -1, -1),
            noise.clone(),
            nano.prompt[0][0].clone()[:, :1],
            update,
        )
    plain = comfy(nano.model)
    assert ((ours - theirs).square().mean() / theirs.square().mean()).sqrt() <= 1e-3
    assert ((ours - plain).square().mean() / plain.square().mean()).sqrt() >= 0.03
