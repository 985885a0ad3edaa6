"""Training at any scale: the losses of RIDFR against their formulas in float64, and what learns."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from ridfr_core.checkpoints import CheckpointError
from ridfr_core.content import ContentSpec
from ridfr_core.training.base import Base
from ridfr_core.training.networks import build_adapter, build_content, let_identity_in, merge_lora
from ridfr_core.training.stages import AdapterStage, AlignStage, ContentStage, Frozen

WIDTHS = (32, 32, 64, 64)


def toy_base(prediction="epsilon") -> Base:
    """SD1.5's topology with a hundredth of its width, in float64."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                             prediction_type=prediction)
    return Base(unet, vae, torch.randn(1, 3, 64), schedule, "sd15").to("cpu", torch.float64)


def toy_batch(count=2, references=2) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"hq": normal(count, 3, 64, 64).sigmoid(), "lq": normal(count, 3, 64, 64).sigmoid(),
            "noise": normal(count, 4, 8, 8), "posterior": normal(count, 4, 8, 8),
            "t": torch.tensor([100, 800])[:count], "embedding": normal(count, references, 512),
            "clip": normal(count, references, 5, 64)}


def awake(content: nn.Module) -> nn.Module:
    """A ControlNet whose zero convolutions are no longer zero, as after some training."""
    with torch.no_grad():
        for name, parameter in content.named_parameters():
            if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")) or name == "conv_in.weight":
                parameter.normal_(std=0.05)
    return content.double()


def toy_adapter(unet):
    return build_adapter(unet, dim=64, clip_dim=64).double()


def z_and_latents(base, batch):
    """z_t by the definition, in float64: sqrt(abar) x + sqrt(1 - abar) noise."""
    with torch.no_grad():
        posterior = base.vae.encode(batch["hq"] * 2 - 1).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior"]) * base.vae.config.scaling_factor
    signal = base.schedule.alphas_cumprod.double()[batch["t"]].view(-1, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * batch["noise"], latents, signal


def answer(base, content, spec, z, lq, t, identity=None):
    """One photo at a time: the UNet with the ControlNet's residuals."""
    down, mid = content(spec.concat(z, lq), t, base.prompt, torch.zeros(()), return_dict=False)
    return base.unet(z, t, base.prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid,
                     cross_attention_kwargs={} if identity is None else {"identity": identity}).sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_content_loss_is_equation_2(prediction):
    base, batch, spec = toy_base(prediction), toy_batch(), ContentSpec(value_range="0..1")
    content = awake(build_content(base.unet))
    z, latents, signal = z_and_latents(base, batch)
    lq = torch.nn.functional.interpolate(batch["lq"], size=(8, 8), mode="bicubic")
    target = batch["noise"] if prediction == "epsilon" else (
        signal.sqrt() * batch["noise"] - (1 - signal).sqrt() * latents)
    squares = [(answer(base, content, spec, z[i:i + 1], lq[i:i + 1], batch["t"][i:i + 1]) - target[i]).square().mean()
               for i in range(2)]
    stage = ContentStage(Frozen(base, spec), content)
    assert stage(batch)["loss"].item() == pytest.approx(sum(squares).item() / 2, rel=1e-4)


def test_alignment_loss_is_equations_4_to_6():
    base, batch, spec = toy_base(), toy_batch(), ContentSpec()
    content, adapter = awake(build_content(base.unet)), toy_adapter(base.unet)
    let_identity_in(base.unet)
    z, _, _ = z_and_latents(base, batch)
    lq = torch.nn.functional.interpolate(batch["lq"] * 2 - 1, size=(8, 8), mode="bicubic")
    diffusion, alignment = 0, 0
    for i in range(2):
        guesses = []
        for k in range(2):
            tokens = adapter.tokens(batch["embedding"][i:i + 1, k], batch["clip"][i:i + 1, k], True)
            identity = adapter.keys_values(tokens)
            guesses.append(answer(base, content, spec, z[i:i + 1], lq[i:i + 1], batch["t"][i:i + 1], identity))
            diffusion += (guesses[k] - batch["noise"][i]).square().mean() / 4
        alignment += (guesses[0] - guesses[1]).square().mean() / 2
    losses = AlignStage(Frozen(base, spec, adapter), content, strength=10.0)(batch)
    assert alignment.item() > 1e-4
    assert losses["diffusion"].item() == pytest.approx(diffusion.item(), rel=1e-4)
    assert losses["alignment"].item() == pytest.approx(alignment.item(), rel=1e-3)
    assert losses["loss"].item() == pytest.approx((diffusion + 10 * alignment).item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_only_the_content_module_learns(kind):
    base, batch = toy_base(), toy_batch()
    content = build_content(base.unet, {"pixel": 3, "latent": 4}[kind]).double()
    stage = AlignStage(Frozen(base, ContentSpec(kind=kind), toy_adapter(base.unet).requires_grad_(False)), content, 1.0)
    let_identity_in(base.unet)
    stage(batch)["loss"].backward()
    assert set(stage.state_dict()) == {f"content.{name}" for name in content.state_dict()}
    assert content.controlnet_mid_block.weight.grad.abs().max() > 0
    assert not [p for p in base.unet.parameters() if p.grad is not None]


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        base, batch = toy_base(), toy_batch()
        torch.manual_seed(2)
        content, adapter = awake(build_content(base.unet)), toy_adapter(base.unet).requires_grad_(False)
        let_identity_in(base.unet)
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
            content.enable_gradient_checkpointing()
        AlignStage(Frozen(base, ContentSpec(), adapter), content, 1.0)(batch)["loss"].backward()
        gradients.append(content.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_an_adapter_learns_from_photos_that_are_their_own_reference():
    base, batch = toy_base(), toy_batch(references=1)
    adapter = toy_adapter(base.unet)
    let_identity_in(base.unet)
    AdapterStage(Frozen(base), adapter)(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


def test_merging_a_lora_adds_its_product_to_the_layer_that_it_names():
    unet = toy_base().unet
    weights = {"to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
               "to_out.0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"}
    before = {name: unet.state_dict()[key].clone() for name, key in weights.items()}
    places = {"to_q": "input_blocks.1.1.transformer_blocks.0.attn1",
              "to_out.0": "middle_block.1.transformer_blocks.0.attn2"}
    lora = {f"diffusion_model.{places[name]}.{name}.lora_{side}.weight": torch.randn(shape)
            for name, width in (("to_q", 32), ("to_out.0", 64))
            for side, shape in (("up", (width, 4)), ("down", (4, width)))}
    merge_lora(unet, lora, 0.5)
    for name, key in weights.items():
        up, down = (lora[f"diffusion_model.{places[name]}.{name}.lora_{side}.weight"] for side in ("up", "down"))
        torch.testing.assert_close(unet.state_dict()[key], before[name] + 0.5 * (up @ down).double())
    again = toy_base().unet
    processors = {name: key.removesuffix(f".{name}.weight") for name, key in weights.items()}
    merge_lora(again, {f"unet.{processors[name]}.processor.{name.removesuffix('.0')}_lora.{side}.weight":
                       lora[f"diffusion_model.{places[name]}.{name}.lora_{side}.weight"]
                       for name in weights for side in ("up", "down")}, 0.5)
    assert all(torch.equal(again.state_dict()[key], unet.state_dict()[key]) for key in weights.values())
    with pytest.raises(CheckpointError, match="LoRA has 'lora_unet_mid.alpha', which the base does not have"):
        merge_lora(unet, {"lora_unet_mid.alpha": torch.ones(())}, 0.5)
