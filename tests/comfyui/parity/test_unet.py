"""Whole UNets with identity adapter and LoRA predict in ComfyUI the noise that they predict in diffusers."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from .reference import SD15_FULL, Pair, comfy_model, content_controlnet, predicted_noise, relative_rms

pytestmark = pytest.mark.usefixtures("inference_mode")

LAYERS = {"SD15": 16, "SDXL": 70}
T = 601


class Inputs:
    """Random inputs of a UNet for two images, prompts negative and positive."""

    def __init__(self, pair: Pair):
        g = torch.Generator().manual_seed(3)
        self.z = torch.randn(2, 4, 16, 16, generator=g)
        self.prompts = torch.randn(2, 9, pair.size.context, generator=g)
        self.pooled = torch.randn(2, 1280, generator=g)
        self.size = (512, 384, 16, 8, 1024, 768)  # of the original, where it was cropped, of the target: heights first

    def conditioning(self) -> list:
        """ComfyUI's, of the negative and the positive prompt."""
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        size = dict(zip(names, self.size))
        return [[[text[None], {"pooled_output": more[None], **size}]] for text, more in zip(self.prompts, self.pooled)]

    def noise(self, pair: Pair, cfg: float, **residuals) -> Tensor:
        """diffusers' prediction."""
        chunks = [0, 1] if cfg != 1 else [1]
        rows = [chunk for chunk in chunks for _ in self.z]
        added = {"image_embeds": [pair.photos.show(pair.unet, cfg != 1)]}
        if pair.size.base == "SDXL":
            added |= {"text_embeds": self.pooled[rows], "time_ids": torch.tensor([self.size] * len(rows))}
        z = self.z.repeat(len(chunks), 1, 1, 1)
        out = pair.unet(z, T, self.prompts[rows], added_cond_kwargs=added, **residuals).sample.chunk(len(chunks))
        return out[0] + cfg * (out[-1] - out[0]) if cfg != 1 else out[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("base", ["sd15", "sdxl", pytest.param("sd15_full", marks=pytest.mark.full_width)])
def test_noise_is_the_same(pack, apply, base, cfg, request, monkeypatch):
    """With 2 people of 2 photos each in the batch; every cross-attention takes part once."""
    pair = request.getfixturevalue(base)
    fired = Counter()
    attention = pack.nodes.id_attention.IdentityAttention
    call = attention.__call__

    def counted(self, q, k, v, extra_options):
        fired[extra_options["block"] + (extra_options["block_index"],)] += 1
        return call(self, q, k, v, extra_options)

    monkeypatch.setattr(attention, "__call__", counted)
    inputs = Inputs(pair)
    negative, positive = inputs.conditioning()
    got = predicted_noise(apply(pair), inputs.z, T, positive, negative, cfg)
    assert relative_rms(got, inputs.noise(pair, cfg)) < 1e-4
    assert fired == dict.fromkeys(pair.adapter.adapter.layers, 1) and len(fired) == LAYERS[pair.size.base]


@pytest.fixture(scope="module")
def sd15_full(pair) -> Pair:
    return pair(SD15_FULL)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_noise_is_nearly_the_same_in_half_precision(sd15, apply, dtype, error):
    inputs = Inputs(sd15)
    negative, positive = inputs.conditioning()
    model = comfy_model(sd15.weights, sd15.size, dtype)
    got = predicted_noise(apply(sd15, model), inputs.z, T, positive, negative, 3.0)
    assert relative_rms(got, inputs.noise(sd15, 3.0)) < error


@pytest.mark.parametrize("without", ["strength", "lora_strength"])
def test_identity_and_lora_matter(sd15, apply, without):
    """Else the tests above could not see an error in them."""
    inputs = Inputs(sd15)
    _, positive = inputs.conditioning()
    got = predicted_noise(apply(sd15, **{without: 0.0}), inputs.z, T, positive, positive, 1.0)
    assert relative_rms(got, inputs.noise(sd15, 1.0)) > 0.05


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_noise_is_the_same_with_the_content_controlnet(sd15, apply, load_content, cfg):
    from nodes import ControlNetApplyAdvanced

    inputs, net = Inputs(sd15), content_controlnet(sd15.size)
    image = torch.rand(2, 3, 128, 128)
    rows = [0, 0, 1, 1] if cfg != 1 else [1, 1]
    z, lq = inputs.z.repeat(len(rows) // 2, 1, 1, 1), image.repeat(len(rows) // 2, 1, 1, 1)
    down, middle = net(z, T, inputs.prompts[rows], lq, conditioning_scale=0.8, return_dict=False)
    want = inputs.noise(sd15, cfg, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    negative, positive = inputs.conditioning()
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, load_content(net), image.movedim(1, -1), 0.8, 0.0, 1.0
    )
    got = predicted_noise(apply(sd15), inputs.z, T, positive, negative, cfg)
    assert relative_rms(got, want) < 1e-4
    assert relative_rms(got, inputs.noise(sd15, cfg)) > 0.05
