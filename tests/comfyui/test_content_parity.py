"""The content ControlNet computes in ComfyUI what it computes in diffusers, where it is trained."""

import importlib
import random
import time

import pytest
import torch

from ridfr_core.content import ContentSpec, controlnet_to_ldm, prepare_lq
from tests.test_fuzz_files import content_file, made


@pytest.fixture(scope="module")
def content_control(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.content_control").content_control


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def diffusers_controlnet(widths, layers, context, kind, **options):
    """ControlNetModel of random weights; without a hint encoder it is handed zeros for what that would give."""
    from diffusers import ControlNetModel

    net = ControlNetModel(
        in_channels={"hint": 4, "pixel": 7, "latent": 8}[kind],
        block_out_channels=widths,
        layers_per_block=layers,
        cross_attention_dim=context,
        **options,
    )
    if kind != "hint":
        net.controlnet_cond_embedding = torch.nn.Identity()
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return net.eval()


def blocks(attending, plain=1):
    return {"down_block_types": ("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",) * plain}


def sample(net, z, lq, t, text, spec, **added):
    if spec.kind == "hint":
        return net(z, t, text, controlnet_cond=lq, return_dict=False, **added)
    return net(spec.concat(z, lq), t, text, controlnet_cond=torch.zeros(()), return_dict=False, **added)


NANO = dict(widths=(64, 128, 128, 128), layers=2, context=128, kind="pixel", attention_head_dim=4, **blocks(3))
SD15 = dict(widths=(32, 64, 128, 128), layers=2, context=64, attention_head_dim=8, **blocks(3))
SD21 = dict(  # heads of 64 channels; diffusers' attention_head_dim is their number
    widths=(64, 64, 128, 128),
    layers=2,
    context=96,
    attention_head_dim=(1, 1, 2, 2),
    use_linear_projection=True,
    **blocks(3),
)
SDXL = dict(
    widths=(32, 64, 128),
    layers=2,
    context=64,
    attention_head_dim=(1, 1, 2),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 3),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 24,
)
NETWORKS = {
    "nano": (NANO, "nano"),
    "three levels": (NANO | dict(widths=(32, 64, 96), layers=1, context=64) | blocks(2), "nano"),
    "RIDFR on SD1.5": (SD15 | dict(kind="pixel"), "sd15"),
    "RIDFR's ablation": (SD15 | dict(kind="latent"), "sd15"),
    "DiffBIR v1 on SD2.1": (SD21 | dict(kind="latent"), "sd21"),
    "RIDFR's way on SDXL": (SDXL | dict(kind="pixel"), "sdxl"),
    "FaceMe on SDXL": (SDXL | dict(kind="hint"), "sdxl"),
}


@pytest.mark.parametrize("case", NETWORKS)
@torch.inference_mode()
def test_network_matches_diffusers(pack, content_control, case):
    """Written as diffusers does, loaded, run. Only nano's base has to be said; the rest is read off the tensors."""
    options, base = NETWORKS[case]
    net = diffusers_controlnet(**options)
    choices = {"value_range": "-1..1"} | ({"base": base} if base == "nano" else {})
    state, spec = pack.ridfr_core.content.understand(net.state_dict(), {}, "x", choices)
    assert (spec.base, spec.kind) == (base, options["kind"])
    control = content_control(state, spec)
    lq = torch.rand(2, *{"pixel": (3, 16, 16), "latent": (4, 16, 16), "hint": (3, 128, 128)}[spec.kind]) * 2 - 1
    z, text, t = torch.randn(2, 4, 16, 16), torch.randn(2, 5, options["context"]), torch.tensor([20.0, 900.0])
    added, y = {}, {}
    if base == "sdxl":
        pooled, times = torch.randn(2, 24), torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
        y = {"y": torch.cat([pooled, net.add_time_proj(times.flatten()).view(2, -1)], 1)}
    down, middle = sample(net, z, lq, t, text, spec, **added)
    got = control.control_model(x=z, hint=lq, timesteps=t, context=text, **y)
    for ours, theirs in zip([*got["output"], *got["middle"]], [*down, middle], strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["pixel", "hint"])
def test_a_model_of_another_family_is_named(content_control, pack, kind):
    content = pack.ridfr_core.content
    small = NANO | dict(widths=(32, 32), layers=1, context=64, kind=kind) | blocks(1)
    state = content.controlnet_to_ldm(diffusers_controlnet(**small).state_dict())
    control = content_control(state, content.ContentSpec(base="sd15", kind=kind), "x.pth")
    z, lq, t = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1)
    with pytest.raises(ValueError, match=r"'x.pth' is for SD1.5 and reads prompts of width 64, but .* have width 96"):
        control.control_model(x=z, hint=lq, timesteps=t, context=torch.zeros(1, 7, 96))


@torch.inference_mode()
def test_every_missing_tensor_is_refused(pack, content_control):
    """Also where it confuses the detection of the network's sizes."""
    checkpoints, content = pack.ridfr_core.checkpoints, pack.ridfr_core.content
    small = NANO | dict(widths=(32, 32), layers=1, context=64) | blocks(1)
    state = content.controlnet_to_ldm(diffusers_controlnet(**small).state_dict())
    content_control(state, content.ContentSpec(base="nano"), "x.pth")
    for key in state:
        with pytest.raises(checkpoints.CheckpointError, match="'x.pth' (lacks|holds)"):
            content_control({k: w for k, w in state.items() if k != key}, content.ContentSpec(base="nano"), "x.pth")


def test_missing_and_foreign_tensors_are_named(pack, content_control):
    checkpoints, content = pack.ridfr_core.checkpoints, pack.ridfr_core.content
    small = NANO | dict(widths=(32, 32), layers=1, context=64) | blocks(1)
    state = content.controlnet_to_ldm(diffusers_controlnet(**small).state_dict())
    spec = content.ContentSpec(base="nano")
    half = {k: w for k, w in state.items() if not k.startswith("middle_block.1.norm")}
    with pytest.raises(checkpoints.CheckpointError, match="'x' lacks middle_block.1.norm.weight and 1 more, which bel"):
        content_control(half, spec, "x")
    with pytest.raises(checkpoints.CheckpointError, match="'x' holds 1 tensors, such as task_embedding, that do not"):
        content_control(state | {"task_embedding": torch.zeros(1)}, spec, "x")
    with pytest.raises(checkpoints.CheckpointError, match=r"'x' has zero_convs.0.0.bias of shape \[2\], but .* \[32\]"):
        content_control(state | {"zero_convs.0.0.bias": torch.zeros(2)}, spec, "x")


def damaged(state):
    """(name, tensors) of files that are small and would make a large network, or none."""
    zeros = torch.zeros
    wide = "input_blocks.1.0.out_layers.3.weight"
    yield "far block", state | {"input_blocks.99999999.0.op.weight": zeros(1)}
    yield "many blocks", state | {f"input_blocks.{i}.0.op.weight": zeros(1) for i in range(20_000)}
    yield "gap", {key.replace("input_blocks.2.", "input_blocks.98."): weight for key, weight in state.items()}
    yield "deep", state | {f"middle_block.1.transformer_blocks.{i}.norm1.weight": zeros(1) for i in range(90)}
    yield "wide", state | {wide: zeros(32 * 4000, 1, 1, 1)}
    yield "context", state | {key: zeros(1, 10**6) for key in state if key.endswith("attn2.to_k.weight")}
    yield "another model's names", state | {"double_blocks.0.img_attn.norm.key_norm.scale": zeros(1)}
    yield "int8", {key: weight.to(torch.int8) for key, weight in state.items()}
    for key, weight in state.items():
        yield f"0-d {key}", state | {key: torch.tensor(1.0)}
        yield f"empty {key}", state | {key: weight[:0]}
        yield f"flat {key}", state | {key: weight.flatten()[:7]}
        yield f"narrow {key}", state | {key: weight[:1]}


@torch.inference_mode()
def test_damaged_files_are_refused_at_once(pack, content_control):
    """Whatever their names and shapes promise, nothing is made of it."""
    content = pack.ridfr_core.content
    small = NANO | dict(widths=(32, 64), layers=1, context=64) | blocks(1)
    state = content.controlnet_to_ldm(diffusers_controlnet(**small).state_dict())
    for name, broken in damaged(state):
        start = time.process_time()
        with pytest.raises(pack.ridfr_core.checkpoints.CheckpointError, match="'x.pth' (lacks|holds|has|stores) ") as e:
            content_control(broken, content.ContentSpec(base="nano"), "x.pth")
        assert time.process_time() - start < 2, name
        assert str(e.value).endswith(".") and "\n" not in str(e.value), name


@torch.inference_mode()
def test_strange_files_are_loaded_or_refused_at_once(pack, content_control, tmp_path):
    """Seeded; a failure names its number."""
    core, good, loaded = pack.ridfr_core, content_file(), 0
    for number in range(200):
        path, start = tmp_path / "x.safetensors", time.process_time()
        path.write_bytes(made(good, random.Random(number)))
        try:
            content_control(*core.content.understand(*core.checkpoints.read(path), path.name), path.name)
            loaded += 1
        except core.errors.RidfrError as error:
            assert str(error).endswith(".") and "\n" not in str(error), number
        except Exception as error:
            raise AssertionError(f"file {number} is not refused with a sentence") from error
        assert time.process_time() - start < 2, number
    assert loaded > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@torch.inference_mode()
def test_coarser_files_are_loaded(pack, content_control, dtype):
    content = pack.ridfr_core.content
    small = NANO | dict(widths=(32, 32), layers=1, context=64) | blocks(1)
    net = diffusers_controlnet(**small)
    state = content.controlnet_to_ldm(net.state_dict())
    control = content_control({k: w.to(dtype) for k, w in state.items()}, content.ContentSpec(base="nano"), "x.pth")
    z, text, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 64), torch.tensor([500.0])
    lq = torch.rand(1, 3, 8, 8)
    network = control.control_model.to(torch.float32)
    got, (_, want) = network(x=z, hint=lq, timesteps=t, context=text), sample(net, z, lq, t, text, ContentSpec())
    assert relative_error(got["middle"][0], want) < (0.5 if dtype.itemsize == 1 else 0.05)


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

    net, spec = diffusers_controlnet(**NANO), ContentSpec(base="nano", kernel="area")
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
