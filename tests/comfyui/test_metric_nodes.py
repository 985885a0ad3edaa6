"""The nodes that measure."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def photos(nodes):
    return nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]


def test_image_quality_is_the_cores(nodes, photos, pack, face_model):
    core, spoilt = pack.ridfr_core.metrics, (photos + 0.1 * torch.rand(photos.shape)).clamp(0, 1)
    a, b = (x.movedim(-1, 1) for x in (spoilt, photos))
    psnr, ssim, report = nodes["RIDFR_ImageQuality"].execute(spoilt, photos, False, face_model)
    assert psnr == pytest.approx(core.psnr(a, b).mean().item())
    assert ssim == pytest.approx(core.ssim(a, b).mean().item())
    assert [line.split(":")[0] for line in report.splitlines()] == ["PSNR", "SSIM", "LMD"]
    assert "LMD: 0 (0, 0)" in report  # the detector of the random weights sees a face in the middle of all


def test_image_quality_scales_one_truth_to_all(nodes, photos):
    small = torch.nn.functional.interpolate(photos[:1].movedim(-1, 1), size=(64, 64), mode="area").movedim(1, -1)
    psnr, _, report = nodes["RIDFR_ImageQuality"].execute(photos[:1].repeat(3, 1, 1, 1), small)
    assert 15 < psnr < 50 and report.splitlines()[0].count(",") == 2
    with pytest.raises(ValueError, match="has 2 images and the truth has 3"):
        nodes["RIDFR_ImageQuality"].execute(photos, photos[:1].repeat(3, 1, 1, 1))


def test_each_picture_is_searched_once(nodes, photos, face_model, monkeypatch):
    """A truth that is for all, too."""
    detector, searched = type(face_model.model.detector), []
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: searched.append(1) or detect(self, image))
    report = nodes["RIDFR_ImageQuality"].execute(photos, photos[:1], False, face_model)[2]
    assert len(searched) == 3 and report.splitlines()[2].count(",") == 1


def test_image_quality_says_which_networks_are_absent(nodes, photos, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = nodes["RIDFR_ImageQuality"].execute(photos, photos, True)[2]
    for name in ("LPIPS", "MUSIQ", "MANIQA", "CLIP-IQA", "HyperIQA", "PI"):
        assert f"{name}: absent, pyiqa is not installed: `pip install -e '.[evaluate]'` in the pack's folder" in report


def test_identity_variance(nodes, photos, pack, face_model):
    variance, report = nodes["RIDFR_IdentityVariance"].execute(face_model, photos)
    likeness = nodes["RIDFR_CompareIdentity"].execute(face_model, photos[:1], photos[1:])[0]
    assert variance == pytest.approx(1 - likeness, abs=1e-5)  # of two, it is 1 minus their cosine
    assert report == f"identity variance {variance:.4f} over 2 of 2"
    with pytest.raises(ValueError, match="A face was found in 1 of 1 images: connect at least two"):
        nodes["RIDFR_IdentityVariance"].execute(face_model, photos[:1])


def test_equal_pictures_in_a_batch(nodes, photos):
    """PSNR is infinite there; the mean of the batch is not."""
    psnr, ssim, report = nodes["RIDFR_ImageQuality"].execute(photos, torch.cat([photos[:1], photos[:1]])).args
    assert report.splitlines()[0].split("(")[1].startswith("100, ")
    assert 50 < psnr < 70 and ssim < 1
    assert nodes["RIDFR_ImageQuality"].execute(photos, photos)[:2] == (100, pytest.approx(1))


@pytest.mark.parametrize(
    "image, truth, says",
    [
        ((1, 8, 8, 3), (1, 8, 8, 3), "8x8 pixels, too few for SSIM: use one of at least 11x11"),
        ((1, 1, 200, 3), (1, 1, 200, 3), "200x1 pixels, too few for SSIM"),
        ((1, 128, 128, 3), (1, 128, 96, 3), "The truth has 96x128 pixels and the picture to judge 128x128"),
    ],
)
def test_pictures_that_cannot_be_compared(nodes, image, truth, says):
    with pytest.raises(ValueError, match=says) as failure:
        nodes["RIDFR_ImageQuality"].execute(torch.rand(image), torch.rand(truth))
    assert type(failure.value).__name__ == "RidfrError"


def test_variance_of_tiny_pictures(nodes, face_model):
    with pytest.raises(ValueError, match="Image 1 has only 300x1 pixels, and a face needs at least 32"):
        nodes["RIDFR_IdentityVariance"].execute(face_model, torch.rand(2, 1, 300, 3))
