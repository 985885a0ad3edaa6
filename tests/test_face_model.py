"""Packs as insightface has them: read by us and by insightface itself."""

import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from insightface.app import FaceAnalysis

from ridfr_core import cli
from ridfr_core.face_model import digest_of, load_face_model, role_of
from ridfr_core.faces import align
from ridfr_core.nano import WEIGHTS
from ridfr_core.nano.portraits import SPLITS, render
from ridfr_core.recognition import FaceModelError, GraphRecogniser, IResNet, OnnxRecogniser, embed, load_recogniser
from ridfr_core.training import detector, recogniser
from tests.real_faces import photos, real

NANO, JUDGE = (WEIGHTS / "insightface" / "models" / name for name in ("nano", "nano_judge"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Untrained networks in the layout of a published pack."""
    folder = tmp_path_factory.mktemp("models") / "random"
    detector.export_onnx(detector.DetectorNet(), folder / "det.onnx")
    recogniser.export_onnx(recogniser.iresnet((1, 1, 1, 1), (8, 8, 8, 8)), folder / "rec.onnx")
    return folder


def test_untrained_pack_loads_in_both(pack):
    model = load_face_model(pack)
    assert isinstance(model.recogniser, IResNet)
    assert (model.name, len(model.digest)) == ("random", 64)
    analysis = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"])
    assert sorted(analysis.models) == ["detection", "recognition"]
    analysis.prepare(ctx_id=-1)
    analysis.get(np.zeros((90, 128, 3), np.uint8))


def test_folder_in_folder(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "antelopev2" / "antelopev2")
    assert load_face_model(tmp_path / "antelopev2").digest == load_face_model(pack).digest


def test_a_converted_recogniser_is_the_same(pack, tmp_path):
    """`ridfr convert`, then the copy in the place of the ONNX file: same embeddings, same digest."""
    shutil.copytree(pack, tmp_path / "copy")
    cli.main(["convert", str(tmp_path / "copy" / "rec.onnx")])
    (tmp_path / "copy" / "rec.onnx").unlink()
    ours, theirs = load_face_model(tmp_path / "copy"), load_face_model(pack)
    assert ours.digest == theirs.digest
    crops = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.equal(embed(ours.recogniser, crops), embed(theirs.recogniser, crops))


@pytest.mark.parametrize("net", ["iresnet", "plain"])
def test_bgr_swaps_the_channels(pack, tmp_path, net):
    """As handing the network a picture whose red and blue are swapped; such identities don't mix with others."""
    shutil.copytree(pack, tmp_path / "pack")
    if net == "plain":
        recogniser.export_onnx(recogniser.plain_net(), tmp_path / "pack" / "rec.onnx")
    rgb, bgr = load_face_model(tmp_path / "pack"), load_face_model(tmp_path / "pack", bgr=True)
    reddish = torch.tensor([1, 0.5, 0]).view(3, 1, 1)
    crops = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * reddish
    with torch.no_grad():
        want = embed(rgb.recogniser, crops.flip(1))
        error = (embed(bgr.recogniser, crops) - want).abs().max()
        assert error < 1e-5 and (embed(rgb.recogniser, crops) - want).abs().max() > 50 * error
    assert rgb.digest[:8] != bgr.digest[:8]


@pytest.mark.parametrize("missing", ["det", "rec"])
def test_missing_network(pack, tmp_path, missing):
    shutil.copytree(pack, tmp_path / "half")
    (tmp_path / "half" / f"{missing}.onnx").unlink()
    with pytest.raises(FaceModelError, match="has no .*half|half.* has no"):
        load_face_model(tmp_path / "half")


def test_damaged_file_is_named(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "cut")
    data = (tmp_path / "cut" / "rec.onnx").read_bytes()
    (tmp_path / "cut" / "rec.onnx").write_bytes(data[:len(data) // 2])
    with pytest.raises(FaceModelError, match="rec.onnx"):
        load_face_model(tmp_path / "cut")


def test_another_architecture_runs_in_torch(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "plain")
    net = recogniser.plain_net()
    recogniser.export_onnx(net, tmp_path / "plain" / "rec.onnx")
    model = load_face_model(tmp_path / "plain")
    assert isinstance(model.recogniser, GraphRecogniser) and not isinstance(model.recogniser, OnnxRecogniser)
    crops = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(embed(model.recogniser, crops), embed(net.eval(), crops), atol=1e-4, rtol=1e-3)


def test_an_operator_that_only_onnxruntime_knows(pack, tmp_path, monkeypatch):
    shutil.copytree(pack, tmp_path / "odd")
    path = tmp_path / "odd" / "rec.onnx"
    recogniser.export_onnx(recogniser.plain_net(), path)
    expected = load_recogniser(path)
    model = onnx.load(str(path))
    last = model.graph.node[-1]
    output, last.output[0] = last.output[0], "raw"
    model.graph.node.append(onnx.helper.make_node("Sinh", ["raw"], ["s"]))
    model.graph.node.append(onnx.helper.make_node("Asinh", ["s"], [output]))
    onnx.save(model, str(path))
    found = load_face_model(tmp_path / "odd")
    assert isinstance(found.recogniser, OnnxRecogniser) and "run by onnxruntime" in found.describe().splitlines()[2]
    crops = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(embed(found.recogniser, crops), embed(expected, crops), atol=1e-4, rtol=0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FaceModelError, match="rec.onnx has the operator Sinh, .* install onnxruntime"):
        load_face_model(tmp_path / "odd")


def test_the_real_pack(tmp_path):
    """A detector and a narrow recogniser: they match and judge, and say what they are not fit for."""
    for name in ("scrfd_2.5g_bnkps.onnx", "mobilefacenet.onnx"):
        (tmp_path / name).symlink_to(real(name))
    model = load_face_model(tmp_path)
    assert model.recogniser.width == 128 and not model.drawn
    assert model.describe().splitlines() == [
        "for photos, to match and to judge; identity adapters need 512 numbers",
        "detector: scrfd_2.5g_bnkps.onnx, pictures of any size, run by torch",
        "recogniser: 128 numbers, run by torch",
    ]
    people = photos()["people"]
    faces = model.detector.detect(people)
    points = torch.stack([face.landmarks for face in faces])
    with torch.no_grad():
        table = embed(model.recogniser, align(people.expand(6, -1, -1, -1), points))
        again = embed(model.recogniser, align(people.flip(2)[None], mirrored(points[:1], people.shape[2])))
    others = (table @ table.T).fill_diagonal_(-1)
    assert table.shape == (6, 128) and others.max() < 0.5
    assert (again @ table.T).argmax() == 0 and (again @ table.T).max() > 0.6


def mirrored(points, width):
    points = points[:, [1, 0, 2, 4, 3]].clone()
    points[..., 0] = width - 1 - points[..., 0]
    return points


def test_what_a_model_is_for(pack, tmp_path):
    assert "drawn portraits" in load_face_model(NANO).purpose and "judges" in load_face_model(JUDGE).purpose
    assert load_face_model(pack).purpose == "for photos"


def test_nano_doubts_photographs():
    model, people = load_face_model(NANO), torch.arange(12) + SPLITS["test"].start
    drawn = {f"portrait {i}": model.detector.detect(image)[0]
             for i, image in enumerate(render(people, torch.zeros(12, dtype=torch.long)).image)}
    assert model.doubts(drawn, clean=True) == []
    found = {name: faces[0] for name, photo in photos().items() if (faces := model.detector.detect(photo))}
    assert found.keys() == {"people", "astronaut"}  # wrongly: that is the danger
    (doubt,) = model.doubts(drawn | found, clean=True)
    assert "people, astronaut" in doubt and "portrait" not in doubt.partition(": ")[2] and "buffalo_l" in doubt


def test_files_are_told_by_their_shapes(tmp_path):
    """As insightface does: a genderage.onnx or a landmark model beside the two is neither of them."""
    def network(name, size, width):
        net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, width))
        torch.onnx.export(net.eval(), (torch.zeros(1, 3, size, size),), str(tmp_path / name), dynamo=False)
        return role_of(tmp_path / name)

    assert network("genderage.onnx", 96, 3) == network("landmarks.onnx", 192, 212) == "other"
    assert network("emotion.onnx", 112, 7) == "other" and network("narrow.onnx", 112, 128) == "recogniser"
    assert role_of(NANO / "det_nano.onnx") == "detector" and role_of(NANO / "rec_nano.onnx") == "recogniser"


def test_a_files_ending_may_be_in_capitals(tmp_path):
    """Windows finds X.ONNX where *.onnx is looked for."""
    path = tmp_path / "REC.ONNX"
    shutil.copy(NANO / "rec_nano.onnx", path)
    assert role_of(path) == "recogniser" and digest_of(path) == digest_of(NANO / "rec_nano.onnx")
    assert load_recogniser(path).state_dict().keys() == load_recogniser(NANO / "rec_nano.onnx").state_dict().keys()


def test_an_output_of_unknown_width_is_tried_out(tmp_path):
    def tweak(model):
        model.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = "width"

    path = tmp_path / "rec.onnx"
    recogniser.export_onnx(recogniser.plain_net(), path)
    model = onnx.load(str(path))
    tweak(model)
    onnx.save(model, str(path))
    assert role_of(path) == "recogniser"


@pytest.mark.parametrize("folder", [NANO, JUDGE])
def test_nano_embeds_as_insightface_does(folder):
    """The same portrait through FaceAnalysis (8-bit, OpenCV, onnxruntime) and through our code."""
    portraits = render(torch.arange(4) + SPLITS["test"].start, torch.ones(4, dtype=torch.long))
    model = load_face_model(folder)
    analysis = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_size=(128, 128))
    for image in portraits.image:
        bgr = (image * 255).round().byte().numpy()[::-1].transpose(1, 2, 0).copy()
        theirs = analysis.get(bgr)[0]
        ours = model.detector.detect(image)[0]
        np.testing.assert_allclose(ours.landmarks, theirs.kps, atol=1e-3)
        embedding = embed(model.recogniser, align(image[None], ours.landmarks[None]))
        assert F.cosine_similarity(embedding, torch.from_numpy(theirs.embedding)[None]) > 0.99


@pytest.mark.parametrize("folder", [NANO, JUDGE])
def test_nano_tells_people_apart(folder):
    people, views = 24, 4
    rows = torch.arange(people * views)
    portraits = render(SPLITS["test"].start + 100 + rows // views, rows % views)
    model = load_face_model(folder)
    points = torch.stack([model.detector.detect(image)[0].landmarks for image in portraits.image])
    with torch.no_grad():
        embeddings = embed(model.recogniser, align(portraits.image, points))
    assert recogniser.verification(embeddings, rows // views)["tar"] > 0.85
