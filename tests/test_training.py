"""Nano training: interrupted runs, the VAE's rescaling, the stages' networks."""

import copy
import json
import os
from functools import partial

import numpy
import pytest
import torch
from torch import nn

from ridfr_core.faces import align
from ridfr_core.nano import WEIGHTS
from ridfr_core.recognition import embed, load_iresnet
from ridfr_core.training import nano_diffusion, nano_vae, portrait_data
from ridfr_core.training.loop import Recipe, Run
from ridfr_core.training.portrait_data import portrait_set
from ridfr_core.training.recogniser import export_onnx
from ridfr_core.training.settings import TrainingError
from ridfr_core.training.small_faces import small_crops, teach, with_batch_norms

RECIPE = Recipe(steps=30, batch=8, lr=0.01, warmup=3, seed=7)


def fit(folder, recipe=RECIPE, fail_at=None):
    torch.manual_seed(0)
    net = nn.Linear(4, 1)

    def loss(step, generator):
        if step == fail_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    run = Run(folder, "fit", net, recipe)
    run.save_every = 0  # a checkpoint after each step
    run.train(loss, log_every=10)
    return net, run


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, _ = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", fail_at=17)
    resumed, run = fit(tmp_path / "parts")
    assert run.step == 30
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


def test_a_run_learns_and_logs(tmp_path):
    _, run = fit(tmp_path, Recipe(steps=400, batch=8, lr=0.05, ema=0.9))
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10, 401, 10))
    assert rows[-1]["loss"] < 0.01 * rows[0]["loss"]


@pytest.mark.parametrize("loss, value", [(lambda weight: weight.sum() * torch.nan, "nan"),
                                         (lambda weight: (0 * weight.sum()).sqrt(), "0.0")])
def test_a_loss_or_a_gradient_that_is_no_number_stops_the_run(tmp_path, loss, value):
    net = nn.Linear(1, 1)
    run = Run(tmp_path, "broken", net, RECIPE)
    with pytest.raises(TrainingError, match=f"broken: the loss is {value} and the gradient nan at step 0, with the "
                                            "learning rate 0.00333333; the last good checkpoint is none"):
        run.train(lambda step, generator: loss(net.weight))


class Code:
    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.mark.parametrize("damage", ["empty", "words", "code", "other"])
def test_a_damaged_checkpoint_is_named_and_code_in_it_never_runs(tmp_path, damage):
    fit(tmp_path, Recipe(steps=2, batch=8, lr=0.01, warmup=1))
    path, sign = tmp_path / "fit.pt", tmp_path / "code-ran"
    if damage in ("code", "other"):
        torch.save({"step": Code(sign)} if damage == "code" else {"step": 2}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"no checkpoint")
    with pytest.raises(TrainingError, match="fit.pt' is not a checkpoint of fit, or a damaged one: remove it"):
        fit(tmp_path)
    assert not sign.exists()


def only_read(open_memmap, *where, mode="r+", **how):
    assert mode == "r", "a full disk kills who writes into a mapped file"
    return open_memmap(*where, mode=mode, **how)


def test_portraits_and_their_features_are_written_whole(tmp_path, monkeypatch):
    """A damaged file is made again; features of other code are not taken."""
    monkeypatch.setattr(numpy.lib.format, "open_memmap", partial(only_read, numpy.lib.format.open_memmap))
    portraits = portrait_set(tmp_path, "val", 2, 2)
    images, net = numpy.array(portraits.images), nn.Linear(1, 1)
    assert images.shape == (4, 3, 128, 128) and images.dtype == numpy.uint8
    for name in ("images", "landmarks"):
        (portraits.folder / f"{name}.npy").write_bytes(b"")
        again = portrait_set(tmp_path, "val", 2, 2)
        assert numpy.array_equal(again.images, images) and torch.equal(again.landmarks, portraits.landmarks)
    seen = []

    def compute(pictures, landmarks):
        seen.append(len(pictures))
        return pictures.mean((2, 3))

    first = again.feature("mean", net, compute)
    assert torch.equal(again.feature("mean", net, compute), first) and seen == [4] and first.dtype == torch.float16
    monkeypatch.setattr(portrait_data, "VERSION", -1)
    again.feature("mean", net, compute)
    assert seen == [4, 4]


def test_the_rate_rises_stays_and_falls():
    recipe = Recipe(steps=1000, batch=1, lr=1.0, warmup=100, cooldown=0.4)
    assert recipe.rate(0) == pytest.approx(0.01)
    assert recipe.rate(300) == 1.0
    assert recipe.rate(800) == pytest.approx(0.525)
    assert recipe.rate(1000) == pytest.approx(0.05)


class FourPortraits:
    """Stands for a PortraitSet."""

    def __len__(self):
        return 4

    def batch(self, rows):
        return torch.rand(len(rows), 3, 64, 64, generator=torch.Generator().manual_seed(int(rows.sum())))


def test_the_decoder_trains_on_while_the_latents_stay(tmp_path):
    torch.manual_seed(0)
    vae, portraits = nano_vae.build().eval(), portrait_set(tmp_path, "val", 2, 2)
    before = copy.deepcopy(vae.state_dict())
    nano_vae.train_decoder(tmp_path, portraits, vae, Recipe(steps=2, batch=4, lr=1e-3, warmup=1))
    changed = {key.split(".")[0] for key, weight in vae.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_small_faces_are_drawn_to_what_the_teacher_says_of_whole_ones(tmp_path):
    torch.manual_seed(0)
    path = WEIGHTS / "insightface" / "models" / "nano" / "rec_nano.onnx"
    teacher, student, portraits = load_iresnet(path), load_iresnet(path), portrait_set(tmp_path, "val", 4, 3)
    for weight in student.parameters():
        weight.data *= 1 + 0.2 * torch.randn_like(weight) * (weight.ndim > 1)
    before, rows = copy.deepcopy(student), torch.arange(12)

    def alike(student):
        small = small_crops(portraits, rows, 16, torch.Generator().manual_seed(1))
        whole = align(portraits.batch(rows), portraits.landmarks[rows]) * 2 - 1
        with torch.no_grad():
            return torch.cosine_similarity(student(small), teacher(whole)).mean()

    teach(tmp_path, student, teacher, portraits, Recipe(steps=15, batch=12, lr=1e-3, warmup=1, ema=0.5))
    assert alike(student) > alike(before) + 0.1
    for name, weight in student.named_parameters():
        assert torch.equal(weight, before.get_parameter(name)) == (weight.ndim == 1)


def test_what_learnt_small_faces_is_written_as_insightface_has_it(tmp_path):
    net = load_iresnet(WEIGHTS / "insightface" / "models" / "nano" / "rec_nano.onnx")
    export_onnx(with_batch_norms(net), tmp_path / "rec.onnx")
    again, crops = load_iresnet(tmp_path / "rec.onnx"), torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(embed(again, crops), embed(net, crops))


def test_standardised_latents_keep_what_the_decoder_shows():
    torch.manual_seed(0)
    vae, portraits = nano_vae.build(), FourPortraits()
    with torch.no_grad():
        vae.quant_conv.bias += 3
        images = portraits.batch(torch.arange(4)) * 2 - 1
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        variance = vae.encode(images).latent_dist.var
        nano_vae.standardise(vae, portraits, count=40)
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mode()).sample
        latents = torch.cat([
            nano_diffusion.latents_of(vae, portraits.batch(rows)) for rows in torch.linspace(0, 3, 40).long().split(20)
        ])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert 0.7 < latents.std() < 1.3
    assert (posterior.var / variance).std() < 1e-3 * (posterior.var / variance).mean()  # one gain for all


def test_content_starts_as_the_unets_encoder_and_the_lq_channels_at_zero():
    torch.manual_seed(0)
    unet = nano_diffusion.build_unet()
    content = nano_diffusion.build_content(unet)
    assert torch.equal(content.conv_in.weight[:, :4], unet.conv_in.weight)
    assert not content.conv_in.weight[:, 4:].any()
    both, t, prompt = torch.randn(2, 7, 16, 16), torch.tensor([10, 900]), nano_diffusion.empty_prompt(2)
    down, mid = content(both, t, prompt, torch.zeros(()), return_dict=False)
    assert not mid.any() and not any(residual.any() for residual in down)
    assert unet(both[:, :4], t, prompt).sample.shape == (2, 4, 16, 16)


def test_identity_processors_without_identity_are_plain_attention():
    torch.manual_seed(0)
    unet = nano_diffusion.build_unet().eval()
    z, t, prompt = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), nano_diffusion.empty_prompt(2)
    with torch.no_grad():
        plain = unet(z, t, prompt).sample
        adapter = nano_diffusion.build_adapter(unet, **nano_diffusion.ADAPTER)
        nano_diffusion.let_identity_in(unet)
        torch.testing.assert_close(unet(z, t, prompt).sample, plain, rtol=1e-4, atol=1e-5)
        tokens = adapter.tokens(torch.randn(2, 512), torch.randn(2, 65, 128))
        identity = adapter.keys_values(tokens)
        changed = unet(z, t, prompt, cross_attention_kwargs={"identity": identity}).sample
    assert len(identity) == 16
    assert not torch.allclose(changed, plain, atol=1e-3)
