"""The content ControlNet computes in ComfyUI what it computes in diffusers, where it is trained."""

import importlib

import pytest
import torch

from ridfr_core.content import ContentSpec, controlnet_to_ldm, prepare_lq


@pytest.fixture(scope="module")
def content_control(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.content_control").content_control


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def diffusers_controlnet(widths, layers, heads, context):
    from diffusers import ControlNetModel

    net = ControlNetModel(
        in_channels=7,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        attention_head_dim=heads,
        cross_attention_dim=context,
    )
    net.controlnet_cond_embedding = torch.nn.Identity()  # is handed zeros
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return net.eval()


def sample(net, z, lq, t, text, spec):
    return net(spec.concat(z, lq), t, text, controlnet_cond=torch.zeros(()), return_dict=False)


NETWORKS = {
    "nano": ((64, 128, 128, 128), 2, 4, 128, "nano"),
    "three levels": ((32, 64, 96), 1, 4, 64, "nano"),
    "SD1.5, narrow": ((32, 64, 128, 128), 2, 8, 64, "sd15"),
}


@pytest.mark.parametrize("case", NETWORKS)
@torch.inference_mode()
def test_network_matches_diffusers(content_control, case):
    widths, layers, heads, context, base = NETWORKS[case]
    net, spec = diffusers_controlnet(widths, layers, heads, context), ContentSpec(base=base)
    control = content_control(controlnet_to_ldm(net.state_dict()), spec)
    z, lq, text = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 5, context)
    t = torch.tensor([20.0, 900.0])
    down, middle = sample(net, z, lq, t, text, spec)
    got = control.control_model(x=z, hint=lq, timesteps=t, context=text)
    for ours, theirs in zip([*got["output"], *got["middle"]], [*down, middle], strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "area", "nearest-exact"])
@pytest.mark.parametrize("size", [40, 128])
def test_comfyui_prepares_the_lq_as_training_does(comfy, kernel, size):
    """ControlNet resizes by `upscale_algorithm`, then calls `preprocess_image`."""
    from comfy.utils import common_upscale

    image, spec = torch.rand(1, 3, size, size), ContentSpec(kernel=kernel)
    want = prepare_lq(image, (16, 16), spec)
    assert torch.equal(spec.to_range(common_upscale(image, 16, 16, kernel, "center")), want)


@torch.inference_mode()
def test_control_net_matches_diffusers_from_image_to_residuals(comfy, content_control):
    """Through ControlNet.get_control, as the sampler calls it: resize, value range, noise scaling, time step."""
    from comfy.model_sampling import V_PREDICTION, ModelSamplingDiscrete

    class Sampling(ModelSamplingDiscrete, V_PREDICTION):
        pass

    net, spec = diffusers_controlnet(*NETWORKS["nano"][:4]), ContentSpec(base="nano", kernel="area")
    control = content_control(controlnet_to_ldm(net.state_dict()), spec)
    image, x, text = torch.rand(1, 3, 128, 128), torch.randn(2, 4, 16, 16), torch.randn(2, 5, 128)
    sampling = Sampling()
    control.set_cond_hint(image, 1.0, (0.0, 1.0))
    control.pre_run(type("Model", (), {"model_sampling": sampling, "latent_format": None})(), sampling.percent_to_sigma)
    sigma = sampling.sigmas[[700, 700]]
    got = control.get_control(x * sigma[0], sigma, {"c_crossattn": text}, 2, {})
    z = x * sigma[0] / (sigma[0] ** 2 + 1) ** 0.5
    lq = prepare_lq(image, (16, 16), spec).expand(2, -1, -1, -1)
    down, middle = sample(net, z, lq, torch.tensor([700, 700]), text, spec)
    for ours, theirs in zip([*got["output"], *got["middle"]], [*down, middle], strict=True):
        assert relative_error(ours, theirs) < 1e-5
