import time

import pytest
import torch

from ridfr_core.checkpoints import CheckpointError
from ridfr_core.content import ContentSpec, check_layout, controlnet_to_ldm, prepare_lq, understand


def test_spec_survives_its_metadata():
    spec = ContentSpec(value_range="0..1", kernel="area", order="lq,z", base="nano")
    metadata = spec.to_metadata()
    assert all(isinstance(value, str) and key.startswith("ridfr.") for key, value in metadata.items())
    assert ContentSpec.from_metadata(metadata | {"format": "pt"}) == spec


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_files_that_say_nothing_are_the_papers(metadata):
    assert ContentSpec.from_metadata(metadata) == ContentSpec("-1..1", "bicubic", "z,lq", "sd15", "pixel")


def test_unknown_settings_are_refused():
    with pytest.raises(CheckpointError, match="ridfr.kernel = 'lanczos', but this version of the pack knows only"):
        ContentSpec.from_metadata({"ridfr.kernel": "lanczos"})


def test_lq_is_resized_then_put_in_range():
    image = torch.rand(2, 3, 64, 64)
    area = prepare_lq(image, (16, 16), ContentSpec(value_range="0..1", kernel="area"))
    torch.testing.assert_close(area, image.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5)))
    torch.testing.assert_close(prepare_lq(image, (16, 16), ContentSpec(kernel="area")), area * 2 - 1)


def test_bicubic_enlarges_without_antialiasing():
    """The paper's case: a small LQ image is enlarged to latent size; OpenCV's cubic has the same kernel (a = -0.75)."""
    import cv2

    image = torch.rand(1, 3, 20, 24)
    want = cv2.resize(image[0].permute(1, 2, 0).numpy(), (48, 64), interpolation=cv2.INTER_CUBIC)
    got = prepare_lq(image, (64, 48), ContentSpec(value_range="0..1"))
    torch.testing.assert_close(got[0].permute(1, 2, 0), torch.from_numpy(want), atol=1e-5, rtol=0)


def test_latent_comes_first():
    z, lq = torch.zeros(1, 4, 2, 2), torch.ones(1, 3, 2, 2)
    assert ContentSpec().concat(z, lq)[0, :, 0, 0].tolist() == [0] * 4 + [1] * 3
    assert ContentSpec(order="lq,z").concat(z, lq)[0, :, 0, 0].tolist() == [1] * 3 + [0] * 4


def test_controlnet_keys_are_those_of_the_ldm_layout():
    from diffusers import ControlNetModel

    with torch.device("meta"):
        net = ControlNetModel(
            in_channels=7,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=32,
        )
        net.controlnet_cond_embedding = torch.nn.Identity()
    converted = controlnet_to_ldm(net.state_dict())
    assert converted["input_blocks.0.0.weight"].shape == (32, 7, 3, 3)
    assert {key.split(".")[0] for key in converted} == {
        "input_blocks",
        "middle_block",
        "middle_block_out",
        "time_embed",
        "zero_convs",
    }
    assert {int(key.split(".")[1]) for key in converted if key.startswith("zero_convs.")} == set(range(9))
    prefixed = {f"control_model.{key}": weight for key, weight in converted.items()}
    assert controlnet_to_ldm(prefixed).keys() == converted.keys()


def file(channels=4, hint=False, linear=False, pooled=False, prefix=""):
    """The tensors by which a ControlNet is told, in ldm keys."""
    shapes = {
        "input_blocks.0.0.weight": (32, channels, 3, 3),
        "input_blocks.1.1.proj_in.weight": (32, 32) if linear else (32, 32, 1, 1),
        "zero_convs.0.0.weight": (32, 32, 1, 1),
        "input_hint_block.0.weight": (16, 3, 3, 3) if hint else None,
        "label_emb.0.0.weight": (128, 72) if pooled else None,
    }
    return {prefix + key: torch.zeros(shape, device="meta") for key, shape in shapes.items() if shape}


RIDFR, LATENT, DIFFBIR = file(7), file(8), file(8, linear=True)
OTHERS = {
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_encoder.conv_in.weight",
    "preprocess_model.conv_first.weight",
}
FULL_DIFFBIR = file(8, linear=True, prefix="control_model.") | dict.fromkeys(OTHERS, torch.zeros(1))
FACEME = file(hint=True, linear=True, pooled=True)
UNSAID = ("-1..1", "bicubic", "z,lq")


@pytest.mark.parametrize(
    ("state", "metadata", "choices", "spec"),
    [
        (RIDFR, {}, {}, ContentSpec(*UNSAID, "sd15", "pixel")),
        (LATENT, {}, {}, ContentSpec(*UNSAID, "sd15", "latent")),
        (DIFFBIR, {}, {}, ContentSpec(*UNSAID, "sd21", "latent")),
        (FULL_DIFFBIR, {}, {}, ContentSpec(*UNSAID, "sd21", "latent")),
        (file(7, linear=True, pooled=True), {}, {}, ContentSpec(*UNSAID, "sdxl", "pixel")),
        (FACEME, {}, {"value_range": "-1..1"}, ContentSpec(*UNSAID, "sdxl", "hint")),
        (FACEME, {"ridfr.value_range": "0..1"}, {}, ContentSpec("0..1", "bicubic", "z,lq", "sdxl", "hint")),
        (RIDFR, {"ridfr.base": "nano", "format": "pt"}, {}, ContentSpec(*UNSAID, "nano", "pixel")),
        (
            RIDFR,
            {"ridfr.kernel": "area", "ridfr.order": "lq,z", "ridfr.kind": "pixel"},
            {"kernel": "bilinear"},
            ContentSpec("-1..1", "bilinear", "lq,z", "sd15", "pixel"),
        ),
    ],
)
def test_files_are_understood(state, metadata, choices, spec):
    tensors, found = understand(state, metadata, "x", choices)
    assert found == spec
    assert tensors.keys() == {key.removeprefix("control_model.") for key in state} - OTHERS


@pytest.mark.parametrize(
    ("state", "metadata", "sentence"),
    [
        (FACEME, {}, "'x.pth' holds an ordinary ControlNet .* such as FaceMe's, set the value range here to -1..1"),
        (file(4), {}, "'x.pth' holds an ordinary ControlNet"),
        (RIDFR, {"ridfr.kind": "latent"}, "'x.pth' has 7 input channels, but its metadata says ridfr.kind = 'latent'"),
        ({"encoder.x": torch.zeros(1)}, {}, "'x.pth' holds nothing this pack knows, but this needs a content"),
        ({"zero_convs.0.0.weight": torch.zeros(1)}, {}, "'x.pth'"),
        (RIDFR, {"ridfr.kernel": "lanczos\n" * 10**6}, "ridfr.kernel = 'lanczos lanczos .*[.][.][.]', but"),
        (RIDFR, {"ridfr.kind": "latent\n" * 10**6}, "ridfr.kind = 'latent latent .*[.][.][.]': it was put"),
    ],
)
def test_other_files_are_refused(state, metadata, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        understand(state, metadata, "x.pth")


def test_hint_encoder_keys():
    """diffusers' eight hint convolutions are ldm's input_hint_block.0, 2, ..., 14."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        net = ControlNetModel(
            block_out_channels=(32, 64),
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        )
    converted = controlnet_to_ldm(net.state_dict())
    hints = {key: tuple(w.shape) for key, w in converted.items() if key.startswith("input_hint_block.")}
    channels = (3, 16, 16, 32, 32, 96, 96, 256, 32)
    assert hints == {
        f"input_hint_block.{2 * i}.{name}": shape
        for i in range(8)
        for name, shape in (("weight", (channels[i + 1], channels[i], 3, 3)), ("bias", (channels[i + 1],)))
    }


@pytest.mark.parametrize(
    ("conv_in", "sentence"),
    [
        (torch.zeros(4), r"'x' has input_blocks.0.0.weight of shape \[4\], but its input has 4, 7 or 8 channels"),
        (torch.tensor(1.0), r"of shape \[\], but its input has 4, 7 or 8 channels"),
        (torch.zeros(32, 5, 3, 3), r"of shape \[32, 5, 3, 3\], but its input has 4, 7 or 8 channels"),
    ],
)
def test_a_first_layer_of_another_shape(conv_in, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        understand(RIDFR | {"input_blocks.0.0.weight": conv_in}, {}, "x", {"value_range": "0..1"})


NUMBERS = ["100", "99999999", "9" * 5000, "-1", "\u0663", "1e9", ""]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.{}.0.in_layers.0.weight",
        "input_blocks.1.1.transformer_blocks.{}.norm1.weight",
        "middle_block.1.transformer_blocks.{}.attn2.to_k.weight",
        "zero_convs.{}.0.weight",
        "down_blocks.{}.resnets.0.norm1.weight",
        "down_blocks.0.resnets.{}.norm1.weight",
        "down_blocks.0.attentions.{}.proj_in.weight",
        "controlnet_cond_embedding.blocks.{}.weight",
        "controlnet_down_blocks.{}.weight",
        "controlnet_down_blocks.1.{}.weight",
        "controlnet_cond_embedding.blocks.",
        "blocks.{}.conv1.weight",
    ],
)
def test_no_number_in_a_name_is_counted_to(name, number):
    """The name stays, or is one of a ControlNet that lacks the others; either way it takes no time."""
    start = time.process_time()
    state, _ = understand(RIDFR | {name.format(number): torch.zeros(1)}, {}, "x", {"value_range": "-1..1"})
    with pytest.raises(CheckpointError, match="'x' holds 1 tensors, such as .* that do not belong to a content Contr"):
        check_layout(state, "x")
    assert time.process_time() - start < 0.5


def test_a_hundred_thousand_names():
    """A table of them, looked through for each, would take an hour."""
    start = time.process_time()
    names = ("controlnet_cond_embedding.blocks.{}.weight", "input_blocks.{}.0.op.weight", "down_blocks.{}.a.weight")
    many = {name.format(i): torch.zeros(1) for name in names for i in range(30_000)}
    state, _ = understand(RIDFR | many, {}, "x", {"value_range": "-1..1"})
    with pytest.raises(CheckpointError, match="tensors, such as"):
        check_layout(state, "x")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("key", "shape", "sentence"),
    [
        ("input_blocks.0.0.weight", (20, 7, 3, 3), "a ControlNet's widths are multiples of 32 and of its first"),
        ("input_blocks.0.0.weight", (0, 7, 3, 3), "it should have 4 dimensions, each of at least 1"),
        ("input_blocks.1.0.out_layers.3.weight", (48, 32, 3, 3), "multiples of 32"),
        ("input_blocks.1.0.out_layers.3.weight", (32,), "it should have 4 dimensions"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32,), "it should have 2 dimensions"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (), "it should have 2 dimensions"),
        ("label_emb.0.0.weight", (128,), "it should have 2 dimensions"),
        ("time_embed.0.weight", (32, 0), "each of at least 1"),
    ],
)
def test_sizes_that_no_network_has(key, shape, sentence):
    with pytest.raises(CheckpointError, match=rf"'x' has {key} of shape .*, but .*{sentence}"):
        check_layout(RIDFR | {key: torch.zeros(shape)}, "x")


def test_whole_numbers_are_quantised_weights():
    with pytest.raises(CheckpointError, match="'x' stores time_embed.0.weight as int8"):
        check_layout(RIDFR | {"time_embed.0.weight": torch.zeros(32, 32, dtype=torch.int8)}, "x")


@pytest.mark.parametrize("kind", ["pixel", "latent", "hint"])
def test_whole_networks_pass(kind):
    from diffusers import ControlNetModel

    with torch.device("meta"):
        net = ControlNetModel(
            in_channels={"hint": 4, "pixel": 7, "latent": 8}[kind],
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=64,
            transformer_layers_per_block=(1, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            use_linear_projection=kind == "latent",
        )
    if kind != "hint":
        net.controlnet_cond_embedding = torch.nn.Identity()
    check_layout(controlnet_to_ldm(net.state_dict()), "x")
