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


@pytest.mark.parametrize("batch", [1, 2])
def test_latent_kind_reads_the_vaes_latent(pack, nano, monkeypatch, batch):
    """Through Apply ControlNet with a VAE: the hint is the mode of the LQ image's latent times the scale factor."""
    from nodes import ControlNetApplyAdvanced
    from tests.comfyui.test_content_parity import NANO, diffusers_controlnet

    content, control_module = pack.ridfr_core.content, pack.nodes.content_control
    net = diffusers_controlnet(**NANO | {"kind": "latent"})
    spec = content.ContentSpec(kind="latent", base="nano")
    control = control_module.content_control(content.controlnet_to_ldm(net.state_dict()), spec)
    image = torch.rand(batch, 128, 128, 3)
    prompts = ControlNetApplyAdvanced().apply_controlnet(
        nano.prompt, nano.prompt, control, image, 1.0, 0.0, 1.0, vae=nano.vae
    )
    applied = prompts[0][0][1]["control"]
    sampling = nano.model.get_model_object("model_sampling")
    applied.pre_run(nano.model.model, sampling.percent_to_sigma)
    seen = {}
    monkeypatch.setattr(control.control_model, "forward", lambda **inputs: seen.update(inputs) or {"output": []})
    sigma = sampling.sigmas[[300, 300]]
    applied.get_control(torch.randn(2, 4, 16, 16), sigma, {"c_crossattn": torch.randn(2, 5, 128)}, 1, {})
    want = nano.vae.encode(image) * 0.18215
    torch.testing.assert_close(seen["hint"], want, rtol=1e-4, atol=1e-4)

    without = ControlNetApplyAdvanced().apply_controlnet(nano.prompt, nano.prompt, control, image, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="needs a VAE"):
        without[0][0][1]["control"].get_control(torch.randn(2, 4, 16, 16), sigma, {"c_crossattn": None}, 1, {})


def test_choices_override_the_metadata(nodes):
    loader = nodes["RIDFR_LoadContentControlNet"]
    said = loader.execute("nano")[0]
    chosen = loader.execute("nano", "0..1", "nearest-exact", "lq,z")[0]
    spec = chosen.control_model.spec
    assert (spec.value_range, spec.kernel, spec.order, spec.base) == ("0..1", "nearest-exact", "lq,z", "nano")
    assert said.control_model.spec != spec
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(chosen.preprocess_image(image), image)
    assert chosen.upscale_algorithm == "nearest-exact"


def test_nano_without_its_metadata_is_chosen_by_hand(nodes, weights, pack, tmp_path, monkeypatch):
    """Its tensors look like SD1.5's, which has 8 heads."""
    from safetensors.torch import load_file, save_file

    state = load_file(weights / "content_controlnet.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda folder, name: tmp_path / name)
    loader = nodes["RIDFR_LoadContentControlNet"]
    bases = [loader.execute("bare.safetensors", base=base)[0].control_model.spec.base for base in ("auto", "nano")]
    assert bases == ["sd15", "nano"]


def test_what_was_understood_is_shown(nodes, shown):
    nodes["RIDFR_LoadContentControlNet"].execute("nano")
    assert "for the nano models, pixel, -1..1, bicubic, z,lq; training: not said" in shown.values()
