"""Going on from the shipped weights."""

import json

import pytest
import torch

from ridfr_core.checkpoints import read
from ridfr_core.content import controlnet_to_ldm
from ridfr_core.evaluation import nano_figures
from ridfr_core.layouts import vae_to_ldm
from ridfr_core.nano import WEIGHTS
from ridfr_core.training import nano_diffusion, nano_vae
from ridfr_core.training.loop import Run
from ridfr_core.training.nano import ALIGNED, NanoTraining
from ridfr_core.training.nano_shipped import CAPTIONS, adopt, from_ldm


def test_what_the_bundle_stores_comes_back_in_diffusers_layout():
    vae, content = nano_vae.build(), nano_diffusion.build_content(nano_diffusion.build_unet())
    for module, rename in ((vae, vae_to_ldm), (content, controlnet_to_ldm)):
        state = module.state_dict()
        back = from_ldm(module, rename, rename(state))
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_adopted_runs_are_finished_and_older_checkpoints_stay(tmp_path):
    (tmp_path / "vae.pt").write_text("mine")
    adopt(tmp_path)
    assert (tmp_path / "vae.pt").read_text() == "mine"
    unet, _ = nano_diffusion.train_base(tmp_path, material=None)  # no step is left to take
    shipped, _ = read(WEIGHTS / "checkpoint.safetensors")
    assert torch.equal(unet.conv_out.weight, shipped["model.diffusion_model.out.2.weight"].float())


def test_the_figures_of_the_shipped_weights_need_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "train", lambda *args: pytest.fail("trains"))
    for name, value in (("WEIGHTS", tmp_path), ("PEOPLE", 2), ("STEPS", 2)):
        monkeypatch.setattr(nano_figures, name, value)
    nano_figures.write(tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"shipped"} and figures["shipped"]["vae"]["psnr"] > 20
    assert (tmp_path / "figures.png").exists()


def test_the_base_goes_on_with_the_captions_it_knows(tmp_path):
    """With an encoder that has learnt nothing the base would unlearn."""
    adopt(tmp_path)
    _, captions = nano_diffusion.train_base(tmp_path, material=None)
    shipped, _ = read(CAPTIONS)
    assert all(torch.equal(weight, shipped[name].float()) for name, weight in captions.state_dict().items())


def test_the_shipped_content_lies_between_its_two_stages(tmp_path):
    nano = NanoTraining(tmp_path)
    nano.content, nano.aligned = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    with torch.no_grad():
        nano.content.weight.copy_(torch.tensor([[0.0, 10.0]]))
        nano.aligned.weight.copy_(torch.tensor([[10.0, 0.0]]))
    torch.testing.assert_close(nano.blended.weight, 10 * torch.tensor([[ALIGNED, 1 - ALIGNED]]))
    assert nano.aligned.weight[0, 0] == 10, "the blend is a copy"
