"""What `ridfr train` writes opens in ComfyUI, and computes there what was trained."""

import importlib

import pytest
import torch
from torch import nn

from ridfr_core.content import ContentSpec
from ridfr_core.training.base import load_base
from ridfr_core.training.networks import build_content
from ridfr_core.training.run import export
from ridfr_core.training.stages import ContentStage, Frozen


@pytest.mark.parametrize("kind, channels", [("pixel", 3), ("latent", 4)])
@torch.inference_mode()
def test_a_trained_content_controlnet(pack, tmp_path, kind, channels):
    base, spec = load_base("nano"), ContentSpec(base="nano", kind=kind)
    content = build_content(base.unet, channels).eval()
    torch.manual_seed(0)
    for name, parameter in content.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "conv_in")):
            nn.init.normal_(parameter, std=0.05)
    export(ContentStage(Frozen(base, spec), content), tmp_path / "content.safetensors", {"ridfr.steps": "20"})

    core, nodes = f"{pack.__name__}.ridfr_core", f"{pack.__name__}.nodes"
    state, metadata = importlib.import_module(f"{core}.checkpoints").read(tmp_path / "content.safetensors")
    state, told = importlib.import_module(f"{core}.content").understand(state, metadata, "content.safetensors")
    control = importlib.import_module(f"{nodes}.content_control").content_control(state, told)
    assert told.to_metadata() == spec.to_metadata() and metadata["ridfr.steps"] == "20"

    z, condition, text = torch.randn(2, 4, 16, 16), torch.randn(2, channels, 16, 16), base.context(2)
    t = torch.tensor([20.0, 900.0])
    down, middle = content(spec.concat(z, condition), t, text, torch.zeros(()), return_dict=False)
    got = control.control_model.float()(x=z, hint=condition, timesteps=t, context=text)
    for ours, theirs in zip([*got["output"], *got["middle"]], [*down, middle], strict=True):
        assert (ours - theirs).abs().max() < 5e-3 * theirs.abs().max()  # the file is in half precision
