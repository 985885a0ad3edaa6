"""Identities from pictures: Extract Identity and Compare Identity, on random nano weights."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("batch, people", [("all photos show one person", 1), ("each photo is another person", 3)])
def test_extract_identity(nodes, nano, face_model, pack, batch, people):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 3, 5)[0]
    identity = nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, batch, nano.vision)[0]
    assert len(identity.people) == people and identity.digest == face_model.model.digest
    embeddings = torch.cat([person.embeddings for person in identity.people])
    clip = torch.cat([person.clip for person in identity.people])
    assert embeddings.shape == (3, 512) and clip.shape == (3, 65, 128)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))

    core = pack.ridfr_core
    images = photos.movedim(-1, 1)
    landmarks = torch.stack([face.landmarks for face in core.identity.reference_faces(face_model.model, images)])
    crops = core.faces.align(images, landmarks, 224).movedim(1, -1)
    torch.testing.assert_close(clip, nano.vision.encode_image(crops).penultimate_hidden_states)
    assert not torch.allclose(clip[0], clip[1])


def test_extract_identity_weighs_and_judges_the_photos(nodes, face_model, shown):
    """Without a CLIP, too. A blurred photo is less sharp; the report has a line for each."""
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0].clone()
    small = photos[1:].movedim(-1, 1)[..., ::8, ::8]
    photos[1] = F.interpolate(small, scale_factor=8, mode="bilinear").movedim(1, -1)[0]
    execute = nodes["RIDFR_ExtractIdentity"].execute
    identity, report = execute(face_model, photos, "all photos show one person", weights="1, 0.5").args
    (person,) = identity.people
    assert person.weights.tolist() == [1, 0.5] and person.clip is None and identity.clip_uncond is None
    sharp, blurred = person.quality
    assert sharp.height == blurred.height == pytest.approx(80, abs=1) and sharp.score == pytest.approx(0.9)
    assert sharp.sharpness > blurred.sharpness + 0.3 and sharp.norm > 0
    assert report == shown["RIDFR_ExtractIdentity"] and len(report.splitlines()) == 2
    apart = execute(face_model, photos, "each photo is another person", weights="1, 0.5")[0]
    assert [person.quality for person in apart.people] == [(sharp,), (blurred,)]


def test_the_reference_like_the_degraded_face(nodes, face_model, shown):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 3, 5)[0]
    identity = nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, "all photos show one person")[0]
    combine = nodes["RIDFR_CombineReferences"].execute
    for i in range(3):
        best, report = combine(identity, "best match", face_model, photos[[i]]).args
        torch.testing.assert_close(best.people[0].embeddings[0], identity.people[0].embeddings[i])
        assert f"photo {i + 1}, most like the degraded face" in report
    assert "most like the average" in combine(identity, "best match")[1]
    assert combine(identity, "all photos, side by side")[0] is identity
    with pytest.raises(ValueError, match="There are 3 degraded images for 1 people: connect one for each"):
        combine(identity, "best match", face_model, photos)


def test_adaptive_strength(nodes, shown):
    """Between the least for an untouched picture and the most for a ruin, a line for each."""
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0].clone()
    small = photos[1:].movedim(-1, 1)[..., ::16, ::16]
    photos[1] = F.interpolate(small, scale_factor=16, mode="bicubic").movedim(1, -1)[0].clamp(0, 1)
    strengths, mean, report = nodes["RIDFR_AdaptiveStrength"].execute(photos, 0.25, 0.75).args
    assert strengths[0].item() == 0.25 and 0.65 < strengths[1].item() <= 0.75
    assert mean == pytest.approx((strengths.mean().item() - 0.25) / 0.5, abs=1e-6)
    assert len(report.splitlines()) == 2 and report == shown["RIDFR_AdaptiveStrength"]


def test_zero_image_is_zero_after_normalisation(nano, pack, weights):
    """As transformers' CLIP has it for zero pixel values."""
    from safetensors.torch import load_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**pack.ridfr_core.nano.config.CLIP_VISION)).eval()
    clip.load_state_dict(load_file(weights / "clip_vision.safetensors"))
    expected = clip(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2][0]
    states = pack.nodes.identity.zero_image_states(nano.vision)
    torch.testing.assert_close(states, expected, rtol=0, atol=5e-3)  # weights in half precision
    black = nano.vision.encode_image(torch.zeros(1, 64, 64, 3)).penultimate_hidden_states[0]
    assert (states - black).abs().max() > 0.1


@pytest.fixture
def compare(nodes, face_model):
    """Compare Identity of two batches."""
    return lambda a, b: nodes["RIDFR_CompareIdentity"].execute(face_model, a, b)


def test_compare_identity(nodes, compare, shown):
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0]
    out = compare(photos, photos)
    assert out[0] == pytest.approx(1.0, abs=1e-5) and len(out[1].splitlines()) == 3
    assert out.ui["similarity"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert shown["RIDFR_CompareIdentity"] == out[1]
    assert len(compare(photos, photos[:1]).ui["similarity"]) == 2
    with pytest.raises(ValueError, match="The first input has 2 images and the second has 3"):
        compare(photos, photos[[0, 1, 0]])


def test_compare_identity_reports_a_missing_face(nodes, compare, face_model, monkeypatch):
    """The random detector finds a face in every picture: here it is made to miss the black one."""
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: detect(self, image) if image.any() else [])
    photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 5)[0].clone()
    photos[1] = 0
    out = compare(photos, photos[:1])
    assert out.ui["similarity"] == [pytest.approx(1.0, abs=1e-5), None]
    assert out[0] == pytest.approx(1.0, abs=1e-5) and out[1].splitlines()[2] == "image 2: no face found"
    assert compare(photos[:1], photos[1:]).ui["similarity"] == [None]
