"""Identities from pictures: Extract Identity and Compare Identity, on random nano weights."""

import pytest
import torch

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
