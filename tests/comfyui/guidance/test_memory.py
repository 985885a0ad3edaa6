"""What ComfyUI is told of guidance's memory where it plans a run."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def planned(nano, sample, monkeypatch):
    """planned(model) -> the bytes that ComfyUI keeps free beside the models: wanted, and at least."""
    import comfy.model_management as management

    load, asked = management.load_models_gpu, []

    def watched(models, memory_required=0, minimum_memory_required=None, **kw):
        if models[0].model is nano.model.model:
            asked.append((memory_required, minimum_memory_required))
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **kw)

    monkeypatch.setattr(management, "load_models_gpu", watched)

    def planned(model):
        asked.clear()
        sample(model, nano.prompt, steps=1, sampler="euler")
        (figures,) = asked
        return figures

    return planned


def bytes_of(network, but=()):
    return sum(p.numel() * 4 for name, p in network.named_parameters() if not name.startswith(but))


def test_the_run_is_planned_with_guidance(planned, guided, nano, face_model):
    """Its copies of the decoder and the recogniser, and the gradient of a face, are asked for before anything loads."""
    plain = planned(nano.model)
    extra = [after - before for after, before in zip(planned(guided()[0]), plain, strict=True)]
    copies = bytes_of(nano.vae.first_stage_model, "encoder.") + bytes_of(face_model.model.recogniser)
    face = nano.vae.memory_used_decode((1, 4, 8, 8), torch.float32)  # of 16 x 16
    everything = nano.vae.memory_used_decode((1, 4, 16, 16), torch.float32)
    assert extra[0] == pytest.approx(extra[1]) and copies + face < extra[0] < copies + 4 * everything
    whole, checkpointed = (
        planned(guided(decode=decode)[0])[0] - plain[0] for decode in ("whole picture", "face, checkpointed")
    )
    assert copies < checkpointed < extra[0] < whole
    assert planned(nano.model) == plain, "nothing stays behind"


def test_two_guidances_have_room_for_both(planned, guided, nano):
    plain, one = planned(nano.model)[0], planned(guided()[0])[0]
    assert planned(guided(model=guided()[0])[0])[0] - plain > 1.5 * (one - plain)


def test_what_is_not_guided_asks_for_nothing(planned, guided, nano, face_model, monkeypatch):
    monkeypatch.setattr(type(face_model.model.detector), "detect", lambda self, image: [])
    assert planned(guided(no_face="leave the picture alone")[0]) == planned(nano.model)


def test_the_copies_are_made_after_the_model_is_loaded(guided, nano, sample, pack, monkeypatch):
    import comfy.model_management as management

    order, load, networks = [], management.load_models_gpu, pack.nodes.guided_networks.Networks
    copy = networks.load
    monkeypatch.setattr(management, "load_models_gpu", lambda *a, **k: order.append("model") or load(*a, **k))
    monkeypatch.setattr(networks, "load", lambda self, device: order.append("copies") or copy(self, device))
    model = guided()[0]
    order.clear()
    sample(model, nano.prompt, steps=1, sampler="euler")
    assert order == ["model", "copies"]


def test_no_memory_for_the_copies_is_no_memory_for_the_mode(guided, nano, sample, pack, monkeypatch):
    networks, left = pack.nodes.guided_networks.Networks, [1]
    copy = networks.load

    def scarce(self, device):
        if left:
            left.pop()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        copy(self, device)

    monkeypatch.setattr(networks, "load", scarce)
    model, record = guided(decode="whole picture")
    assert record.of(sample(model, nano.prompt)).notes == [
        "Out of memory with the decode mode 'whole picture': going on with 'face'."
    ]
