"""The content ControlNet in ComfyUI's own sampling, in this process, on random nano weights."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_content_controlnet(sample, nodes, nano):
    """It acts; strength 0 is no ControlNet at all; one LQ image serves a batch; it survives a second run and CFG."""
    from nodes import ControlNetApplyAdvanced

    control = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
    lq = torch.rand(2, 128, 128, 3)

    def controlled(image, strength, cfg=1.0):
        prompts = ControlNetApplyAdvanced().apply_controlnet(
            nano.prompt, nano.prompt, control, image, strength, 0.0, 1.0
        )
        return sample(nano.model, *prompts, cfg=cfg)

    plain, full = sample(nano.model, nano.prompt), controlled(lq, 1.0)
    assert torch.equal(controlled(lq, 0.0), plain)
    assert (full - plain).abs().max() > 0.1
    assert torch.equal(controlled(lq, 1.0), full)
    torch.testing.assert_close(controlled(lq[:1], 1.0)[0], full[0])
    torch.testing.assert_close(controlled(lq, 1.0, cfg=2.0), full, rtol=1e-3, atol=1e-3)
    rgba = torch.cat([lq, torch.rand(2, 128, 128, 1)], -1)
    assert torch.equal(controlled(rgba, 1.0), full)
    grey = lq[..., :1]
    assert torch.equal(controlled(grey, 1.0), controlled(grey.expand(-1, -1, -1, 3), 1.0))


def test_content_goes_with_identity(sample, nodes, nano, apply, identity):
    """ComfyUI calls the ControlNet's attention without patches: the identity acts in the UNet alone."""
    from nodes import ControlNetApplyAdvanced

    control = nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
    lq = torch.rand(2, 128, 128, 3)
    prompts = ControlNetApplyAdvanced().apply_controlnet(nano.prompt, nano.prompt, control, lq, 1.0, 0.0, 1.0)
    both = sample(apply(identity), *prompts)
    assert not torch.equal(both, sample(apply(identity), nano.prompt))
    assert not torch.equal(both, sample(nano.model, *prompts))
