"""The content ControlNet in ComfyUI's own sampling, in this process, on random nano weights."""

import os
from types import SimpleNamespace

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


@pytest.fixture
def applied(nodes, nano):
    """applied(image, vae) -> the CONTROL_NET with the image, as Apply ControlNet puts it on a prompt."""
    from nodes import ControlNetApplyAdvanced

    def applied(image, control=None, vae=None):
        control = control or nodes["RIDFR_LoadContentControlNet"].execute("nano")[0]
        return ControlNetApplyAdvanced().apply_controlnet(
            nano.prompt, nano.prompt, control, image, 1.0, 0.0, 1.0, vae=vae
        )

    return applied


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lq: lq.index_put_((torch.tensor(1), torch.tensor(5), torch.tensor(5)), torch.tensor(float("nan"))),
         "Apply ControlNet: image 2 has values that are not numbers"),
        (lambda lq: lq.index_put_((torch.tensor(0), torch.tensor(5), torch.tensor(5)), torch.tensor(float("inf"))),
         "Apply ControlNet: image 1 has values that are not numbers"),
        (lambda lq: lq[:0], r"Apply ControlNet: image is empty \(its size is 0x128x128x3\), but an image is expected"),
        (lambda lq: lq[:, :0], r"Apply ControlNet: image is empty \(its size is 2x0x128x3\), but an image is expected"),
        (lambda lq: lq * 255, "Apply ControlNet: image 1 has values from .* to 25., but 0"),
        (lambda lq: lq[[0, 1, 0]], "The content ControlNet has 3 degraded images, but the latent batch has 2: give it"),
        (lambda lq: lq[:, :64], "image has 128x64 pixels, but the picture will have 128x128: give the latent the prop"),
        (lambda lq: lq[:, :, :100], "image has 100x128 pixels, but the picture will have 128x128"),
        (lambda lq: lq[:, :1], "image has 128x1 pixels, but the picture will have 128x128"),
    ],
)
def test_images_that_do_not_fit(sample, nano, applied, change, sentence):
    """Refused before the first step, in the run alone: the same object serves the next one."""
    lq = torch.rand(2, 128, 128, 3)
    with pytest.raises(ValueError, match=sentence):
        sample(nano.model, *applied(change(lq.clone())))
    sample(nano.model, *applied(lq))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (1, 1), (100, 97), (129, 135), (121, 128), (7, 8)])
def test_sizes_that_are_rounded_fit(sample, nano, applied, height, width):
    """The picture of an LQ image has a multiple of 8 pixels, and the LQ image may have been made smaller."""
    assert sample(nano.model, *applied(torch.rand(1, height, width, 3))).isfinite().all()


def test_context_windows_have_the_images_of_their_pictures(nano, applied, monkeypatch):
    prompts = applied(lq := torch.rand(5, 128, 128, 3))
    control, sampling = prompts[0][0][1]["control"], nano.model.get_model_object("model_sampling")
    seen = []
    monkeypatch.setattr(control.control_model, "forward", lambda hint, **_: seen.append(hint) or {"output": []})

    def run(rows, dim=0):
        options = {} if rows is None else {"context_window": SimpleNamespace(index_list=rows, dim=dim)}
        count = 5 if rows is None or dim else len(rows)
        text, sigma = {"c_crossattn": torch.randn(2 * count, 5, 128)}, sampling.sigmas[[300]].expand(2 * count)
        control.get_control(torch.randn(2 * count, 4, 16, 16), sigma, text, 2, options)
        return seen[-1]

    control.pre_run(nano.model.model, sampling.percent_to_sigma)
    whole = run(None)[:5].clone()
    control.cleanup()
    control.pre_run(nano.model.model, sampling.percent_to_sigma)
    prepared, prepare = [], control.preprocess_image
    monkeypatch.setattr(control, "preprocess_image", lambda image: prepared.append(len(image)) or prepare(image))
    for rows in ([0, 1, 2], [2, 3, 4], [0, 1, 2], [4, 0], [2, 3, 4]):
        assert torch.equal(run(rows), whole[rows * 2])
    assert prepared == [3, 3, 2], "each window once"
    control.cleanup()
    control.pre_run(nano.model.model, sampling.percent_to_sigma)
    assert torch.equal(run(None), whole.repeat(2, 1, 1, 1)) and not control.hints
    assert torch.equal(run([0, 1], dim=2), whole.repeat(2, 1, 1, 1))
    assert torch.equal(control.cond_hint_original.movedim(1, -1), lq)


def test_a_changed_file_is_loaded_again(nodes, weights, pack, tmp_path, monkeypatch):
    """By its size as well: a copy can keep its time."""
    path = tmp_path / "x.safetensors"
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda folder, name: tmp_path / name)
    fingerprint = nodes["RIDFR_LoadContentControlNet"].fingerprint_inputs
    path.write_bytes(b"1")
    first = fingerprint(path.name)
    assert fingerprint(path.name, value_range="0..1") == first
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 0))
    second = fingerprint(path.name)
    path.write_bytes(b"123")
    os.utime(path, ns=(0, 0))
    assert len({first, second, fingerprint(path.name)}) == 3
