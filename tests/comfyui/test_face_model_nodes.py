"""Face models in ComfyUI's care: what is loaded, shown, moved, counted and stopped, on random nano weights."""

import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from tests.onnx_graphs import save

pytestmark = pytest.mark.usefixtures("inference_mode")
ONE = "all photos show one person"


@pytest.fixture
def load(nodes, pack, monkeypatch):
    """load(folder) -> Load Face Model's face model of any folder."""

    def run(folder):
        monkeypatch.setattr(pack.nodes.paths, "face_model_folder", lambda name: folder)
        return nodes["RIDFR_LoadFaceModel"].execute("nano")[0]

    return run


@pytest.fixture
def copy(weights, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(weights / "insightface" / "models" / "nano", folder)
    return folder


def portraits(nodes, count):
    return nodes["RIDFR_NanoPortraits"].execute(0, count, 5)[0]


def test_the_node_shows_what_it_loaded(nodes, load, copy, shown):
    nodes["RIDFR_LoadFaceModel"].execute("nano")
    assert shown["RIDFR_LoadFaceModel"].splitlines() == [
        "for drawn portraits, with the nano models",
        "detector: det_nano.onnx, pictures of any size, run by torch",
        "recogniser: 512 numbers, run by torch",
    ]
    load(copy)
    assert shown["RIDFR_LoadFaceModel"].splitlines()[0] == "for photos"


def test_a_changed_file_is_noticed(nodes, pack, copy, monkeypatch):
    monkeypatch.setattr(pack.nodes.paths, "face_model_folder", lambda name: copy)
    fingerprint = nodes["RIDFR_LoadFaceModel"].fingerprint_inputs
    before = fingerprint("own")
    assert fingerprint("own", "RGB (as insightface)") == before
    os.utime(copy / "rec_nano.onnx", ns=(1, 1))
    assert fingerprint("own") != before
    (copy / "rec_nano.onnx").unlink()
    assert fingerprint("own") != before


def test_without_insightface_onnx_and_onnxruntime(nodes, monkeypatch):
    for name in ("insightface", "onnx", "onnxruntime", "cv2", "skimage"):
        monkeypatch.setitem(sys.modules, name, None)
    model = nodes["RIDFR_LoadFaceModel"].execute("nano")[0]
    photos = portraits(nodes, 2)
    identity = nodes["RIDFR_ExtractIdentity"].execute(model, photos, ONE)[0]
    assert nodes["RIDFR_CompareIdentity"].execute(model, photos, photos)[0] == pytest.approx(1, abs=1e-5)
    nodes["RIDFR_IdentityReport"].execute(model, identity, photos)


def test_both_networks_are_in_one_patcher(face_model):
    """ComfyUI counts and moves them together."""
    cared_for = {id(weight) for weight in face_model.patcher.model.parameters()}
    for network in (face_model.model.recogniser, face_model.model.detector.network):
        assert {id(weight) for weight in network.parameters()} <= cared_for
    assert face_model.patcher.model_size() == sum(w.nbytes for w in face_model.patcher.model.parameters())


def test_they_are_loaded_whole(face_model, monkeypatch):
    """Their layers are not ComfyUI's, so with little memory none may be left behind."""
    import comfy.model_management as management

    asked = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **how: asked.append((models, how)))
    face_model.embed(torch.rand(1, 3, 112, 112))
    face_model.largest_faces(torch.rand(3, 3, 128, 128))
    assert asked == [([face_model.patcher], {"force_full_load": True})] * 2, "once for all photos"


@pytest.fixture
def bars(monkeypatch):
    """Steps of each progress bar."""
    import comfy.utils

    made = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            made.append(self)

        def update(self, value):
            self.done += value

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    return made


class Sizes(torch.nn.Module):
    """A recogniser that notes how many crops it gets at a time."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, crops):
        self.seen.append(len(crops))
        return crops.flatten(1)[:, :512]


def test_many_crops_go_in_chunks_with_a_bar(face_model, pack, bars):
    sizes = Sizes()
    model = replace(face_model, model=replace(face_model.model, recogniser=sizes))
    crops = torch.rand(70, 3, 112, 112)
    torch.testing.assert_close(model.features(crops), crops.flatten(1)[:, :512] * 2 - 1)
    assert sizes.seen == [32, 32, 6] and [(bar.total, bar.done) for bar in bars] == [(3, 3)]


def test_every_search_moves_the_bar(nodes, face_model, nano, bars):
    photos = portraits(nodes, 3)
    nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, ONE, nano.vision)
    assert [bar.total for bar in bars] == [3, 1, 1] and all(bar.done == bar.total for bar in bars)
    nodes["RIDFR_CompareIdentity"].execute(face_model, photos, photos[:1])
    assert [bar.total for bar in bars[3:]] == [3, 1, 1, 1]  # the single face is searched once


@pytest.mark.parametrize("name", ["RIDFR_ExtractIdentity", "RIDFR_CompareIdentity", "RIDFR_IdentityReport"])
def test_the_stop_button_works_between_photos(nodes, face_model, identity, name):
    import comfy.model_management as management

    photos = portraits(nodes, 2)
    second = {"RIDFR_ExtractIdentity": (photos, ONE), "RIDFR_CompareIdentity": (photos, photos),
              "RIDFR_IdentityReport": (identity, photos)}
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        nodes[name].execute(face_model, *second[name])
    nodes[name].execute(face_model, *second[name])


def test_the_zero_image_is_encoded_once(nodes, face_model, nano, monkeypatch):
    zeros = []
    forward = type(nano.vision.model).forward

    def counted(self, pixel_values, *args, **kw):
        zeros.append(not pixel_values.any())
        return forward(self, pixel_values, *args, **kw)

    vision = nodes["RIDFR_LoadNanoModels"].execute()[3]
    monkeypatch.setattr(type(nano.vision.model), "forward", counted)
    photos = portraits(nodes, 1)
    first, second = (nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, ONE, vision)[0] for _ in range(2))
    assert sum(zeros) == 1 and torch.equal(first.clip_uncond, second.clip_uncond)
    other = nodes["RIDFR_LoadNanoModels"].execute()[3]
    nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, ONE, other)
    assert sum(zeros) == 2


def test_what_is_kept_of_a_clip_goes_with_it(nodes, pack):
    import gc

    vision = nodes["RIDFR_LoadNanoModels"].execute()[3]
    pack.nodes.identity.zero_image_states(vision)
    before = len(pack.nodes.identity.ZERO_IMAGE)
    del vision
    gc.collect()
    assert len(pack.nodes.identity.ZERO_IMAGE) == before - 1


def test_nano_on_a_photograph_says_so(nodes, face_model, monkeypatch, shown):
    """Of a face too large for a portrait of 128 pixels, or, in a good photo, one that the detector is not sure of."""
    detector = type(face_model.model.detector)
    detect = detector.detect
    photos = portraits(nodes, 2)
    execute = nodes["RIDFR_ExtractIdentity"].execute
    identity, report = execute(face_model, photos, ONE).args
    assert "photographs" not in report

    def unsure(self, image):
        return [replace(face, score=0.6) for face in detect(self, image)]

    monkeypatch.setattr(detector, "detect", unsure)
    report = execute(face_model, photos, ONE)[1]
    assert report.splitlines()[2].endswith("this does not look like one: reference image 1, reference image 2; for "
                                           "photographs load buffalo_l or another insightface pack.")
    assert shown["RIDFR_ExtractIdentity"] == report
    assert "photographs" not in nodes["RIDFR_CompareIdentity"].execute(face_model, photos, photos[:1])[1]

    def large(self, image):
        return [replace(face, box=torch.tensor([0.0, 0.0, 128.0, 128.0])) for face in detect(self, image)]

    monkeypatch.setattr(detector, "detect", large)
    said = nodes["RIDFR_CompareIdentity"].execute(face_model, photos, photos[:1])[1]
    assert "image 1, image 2, image to compare with 1; for photographs" in said
    said = nodes["RIDFR_IdentityReport"].execute(face_model, identity, photos)[1]
    assert "restored image 1, restored image 2; for photographs" in said
    said = nodes["RIDFR_CombineReferences"].execute(identity, "best match", face_model, photos[:1])[1]
    assert "degraded image 1; for photographs" in said


def narrow(path):
    """A recogniser of 128 numbers for one crop at a time."""
    import numpy
    from onnx import helper

    nodes = [helper.make_node("AveragePool", ["x"], ["a"], kernel_shape=[8, 8], strides=[8, 8]),
             helper.make_node("Reshape", ["a", "row"], ["b"]), helper.make_node("MatMul", ["b", "w"], ["y"])]
    weights = numpy.random.default_rng(0).normal(size=(588, 128)).astype(numpy.float32)
    return save(path, nodes, {"row": numpy.array([1, -1]), "w": weights}, (1, 3, 112, 112))


def test_a_narrow_recogniser_matches_and_judges(nodes, load, copy, shown):
    narrow(copy / "rec_nano.onnx")
    model = load(copy)
    assert "identity adapters need 512" in shown["RIDFR_LoadFaceModel"]
    photos = portraits(nodes, 3)
    identity = nodes["RIDFR_ExtractIdentity"].execute(model, photos, ONE)[0]
    assert identity.people[0].embeddings.shape == (3, 128)
    assert nodes["RIDFR_CompareIdentity"].execute(model, photos, photos)[0] == pytest.approx(1, abs=1e-5)
    best = nodes["RIDFR_CombineReferences"].execute(identity, "best match", model, photos[1:2])[0]
    torch.testing.assert_close(best.people[0].embeddings[0], identity.people[0].embeddings[1])
    nodes["RIDFR_IdentityReport"].execute(model, identity, photos)


@pytest.mark.parametrize("name", ["det_nano.onnx", "rec_nano.onnx"])
@pytest.mark.parametrize("content", [b"", b"junk", "half"])
def test_broken_files_end_in_a_sentence(load, copy, name, content):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as ONNX") as failure:
        load(copy)
    assert type(failure.value).__name__ == "FaceModelError" and "\n" not in str(failure.value)


def test_a_recogniser_that_gives_nothing_is_refused(load, copy):
    """Of weights that are all 0 every face would be the same nobody."""
    import onnx
    from onnx import numpy_helper

    path = copy / "rec_nano.onnx"
    model = onnx.load(str(narrow(path)))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(torch.zeros(588, 128).numpy(), "w"))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="The face model own gives .* of crop 1"):
        load(copy).embed(torch.rand(2, 3, 112, 112))


def test_two_hundred_photos_make_a_table_of_megabytes(nodes, face_model, identity):
    person = replace(identity.people[0], embeddings=torch.eye(200, 512), weights=torch.ones(200))
    many = replace(identity, people=(person,), thumbnails=torch.rand(200, 3, 112, 112))
    table, text = nodes["RIDFR_IdentityReport"].execute(face_model, many).args
    assert table.nbytes < 200e6 and text.startswith("person 1: photos ")
