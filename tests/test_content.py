import pytest
import torch

from ridfr_core.checkpoints import CheckpointError
from ridfr_core.content import ContentSpec, controlnet_to_ldm, prepare_lq


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
        net = ControlNetModel(in_channels=7, block_out_channels=(32, 64, 64), down_block_types=(
            "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32)
        net.controlnet_cond_embedding = torch.nn.Identity()
    converted = controlnet_to_ldm(net.state_dict())
    assert converted["input_blocks.0.0.weight"].shape == (32, 7, 3, 3)
    assert {key.split(".")[0] for key in converted} == {
        "input_blocks", "middle_block", "middle_block_out", "time_embed", "zero_convs"
    }
    assert {int(key.split(".")[1]) for key in converted if key.startswith("zero_convs.")} == set(range(9))
    prefixed = {f"control_model.{key}": weight for key, weight in converted.items()}
    assert controlnet_to_ldm(prefixed).keys() == converted.keys()
