"""ID-Preserving Sampling: memory, interrupts and errors."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_everything_is_given_back(guided, nano, sample, alive):
    sample(guided()[0], nano.prompt)
    assert alive() == 0


def test_interrupt_in_the_loop(guided, nano, sample, pack, alive, monkeypatch):
    import comfy.model_management as management

    ascend, calls = pack.nodes.guided_run.Run._ascend, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return ascend(self, *args)

    model = guided()[0]
    before = sample(model, nano.prompt)
    monkeypatch.setattr(pack.nodes.guided_run.Run, "_ascend", interrupted)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, nano.prompt)
    assert len(calls) == 2 and alive() == 0
    assert torch.equal(sample(model, nano.prompt), before)


def test_out_of_memory_goes_on_with_less(guided, nano, sample, pack, alive, monkeypatch):
    """Two failures: the two next cheaper modes, each said once; the picture is that of the mode it ends with."""
    real, left = pack.nodes.guided_run.guide, [2]

    def scarce(*args):
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    model, record = guided(decode="whole picture")
    monkeypatch.setattr(pack.nodes.guided_run, "guide", scarce)
    moved = sample(model, nano.prompt)
    assert torch.equal(moved, sample(guided(decode="face, checkpointed")[0], nano.prompt))
    assert record.of(moved).notes == [
        "Out of memory with the decode mode 'whole picture': going on with 'face'.",
        "Out of memory with the decode mode 'face': going on with 'face, checkpointed'.",
    ]
    assert record.of(sample(model, nano.prompt)).notes == [], "of an earlier run"
    left[0] = 99
    with pytest.raises(ValueError, match="not enough memory to guide, even with .*bf16.*: close other programs"):
        sample(model, nano.prompt)
    assert alive() == 0


def test_out_of_memory_in_the_search_leaves_the_faces_where_they_are(guided, nano, sample, pack, monkeypatch):
    def scarce(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pack.nodes.guided_run, "look_again", scarce)
    model, record = guided(find_every=1)
    moved = sample(model, nano.prompt, steps=4)
    assert torch.equal(moved, sample(guided()[0], nano.prompt, steps=4))
    assert record.of(moved).notes == [
        "Out of memory while the face was looked for again: it is guided where it was seen last."
    ]


def test_nan_from_the_model(guided, nano, sample, alive):
    broken = nano.model.clone()

    def function(apply_model, args):
        out = apply_model(args["input"], args["timestep"], **args["c"])
        out[1] = float("nan")
        return out

    broken.set_model_unet_function_wrapper(function)
    with pytest.raises(ValueError, match=r"prediction for picture 2 is not a number \(NaN\) at step 1: lower CFG"):
        sample(guided(model=broken)[0], nano.prompt)
    assert alive() == 0


def test_flow_models_and_foreign_vaes(guided, nano):
    import comfy.model_sampling as kinds

    class Flow(kinds.ModelSamplingDiscreteFlow, kinds.CONST):
        pass

    flow = nano.model.clone()
    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="moves the predicted noise, and this model .*: use one that does, such as"):
        guided(model=flow)
    with pytest.raises(ValueError, match="The VAE has 16 latent channels for pictures but the model has 4"):
        guided(vae=SimpleNamespace(latent_channels=16, latent_dim=2, first_stage_model=None))


def test_epsilon_models(guided, nano, sample):
    import comfy.model_sampling as kinds

    class Epsilon(kinds.ModelSamplingDiscrete, kinds.EPS):
        pass

    model = nano.model.clone()
    model.add_object_patch("model_sampling", Epsilon())
    assert not torch.equal(sample(guided(model=model)[0], nano.prompt), sample(model, nano.prompt))


def test_a_recogniser_without_gradients_is_refused_by_the_node(guided, pack, face_model, weights):
    core = pack.ridfr_core.face_model
    onnx = core.OnnxRecogniser(weights / "insightface" / "models" / "nano" / "rec_nano.onnx")
    blind = replace(face_model, model=replace(face_model.model, recogniser=onnx))
    with pytest.raises(ValueError, match="recogniser of the face model nano passes no gradient.*: use a face model"):
        guided(face=blind)


def test_an_identity_of_another_recogniser(guided, identity):
    with pytest.raises(ValueError, match="use the same face model for both"):
        guided(who=replace(identity, digest="another"))


def test_pictures_that_do_not_go_together(guided, nano, sample):
    with pytest.raises(ValueError, match="The identity has 2 people and there are 3 LQ images"):
        guided(lq=torch.rand(3, 128, 128, 3))
    with pytest.raises(ValueError, match="has 2 faces but the latent batch has 3 images: give as many"):
        sample(guided()[0], nano.prompt, batch=3)
    with pytest.raises(ValueError, match="LQ image is 128x64 but the latent is for 128x128: connect the picture"):
        sample(guided(lq=torch.rand(1, 64, 128, 3))[0], nano.prompt)


def test_no_face_in_the_lq_image(guided, nano, sample, face_model, monkeypatch, shown):
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: detect(self, image) if image.mean() > 0.3 else [])
    lq = torch.rand(2, 128, 128, 3) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    plain = sample(nano.model, nano.prompt)
    model, record = guided(lq=lq)
    assert record.notes == ["No face was found in LQ image 2: its usual place is taken."]
    assert record.notes[0] in shown.values()
    assert all(not torch.equal(a, b) for a, b in zip(sample(model, nano.prompt), plain, strict=True))
    model, record = guided(lq=lq, no_face="leave the picture alone")
    moved = sample(model, nano.prompt)
    assert record.notes == ["No face was found in LQ image 2: it is not guided."]
    assert record.of(moved).faces == [1]
    assert torch.equal(moved[1], plain[1]) and not torch.equal(moved[0], plain[0])
    model, record = guided(lq=lq * 0.1, no_face="leave the picture alone")
    assert torch.equal(sample(model, nano.prompt), plain) and not record.of(plain).similarity


def test_no_face_means_the_average_of_the_references(guided, nano, sample, people, face_model, monkeypatch):
    """What lies in the usual place of a picture without a face says nothing of the photos."""
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: detect(self, image) if image.mean() > 0.3 else [])
    noise = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    lq = noise * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    photos = F.normalize(torch.randn(3, 512, generator=torch.Generator().manual_seed(4)), dim=1)
    person = replace(people.people[0], embeddings=photos, weights=torch.ones(3))
    who = replace(people, people=(person, person))
    auto, mean, best = (
        sample(guided(who=who, lq=lq, references=references)[0], nano.prompt)
        for references in ("auto", "mean", "best")
    )
    assert torch.equal(auto[1], mean[1]) and not torch.equal(auto[0], mean[0]) and not torch.equal(auto[1], best[1])


def test_a_picture_that_is_left_alone_is_not_searched_again(guided, nano, sample, face_model, monkeypatch):
    detector = type(face_model.model.detector)
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda self, image: [] if image.mean() < 0.1 else detect(self, image))
    lq = torch.rand(2, 128, 128, 3) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1)
    model, record = guided(lq=lq, no_face="leave the picture alone", find_every=1)
    monkeypatch.setattr(detector, "detect", detect)
    moved = sample(model, nano.prompt, steps=3)
    assert torch.equal(moved[1], sample(nano.model, nano.prompt, steps=3)[1])
    assert [len(values) for values in record.of(moved).similarity.values()] == [1, 1, 1]
