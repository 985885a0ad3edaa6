"""`ridfr evaluate folder`, on the shipped nano weights."""

import csv
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from ridfr_core.cli import main
from ridfr_core.evaluation.folder import EvaluationError, export_portraits, find_tasks, only_square
from ridfr_core.evaluation.measure import Row, averages, intervals, summary, variance
from ridfr_core.face_model import face_model_of
from ridfr_core.restorer import Restorer

PEOPLE, REFERENCES = 2, 2
EVERYWHERE = SimpleNamespace(detect=lambda image: ["a face"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    export_portraits(folder, PEOPLE, REFERENCES)
    return folder


@pytest.fixture
def data(exported, tmp_path):
    """A copy to spoil."""
    for path in exported.rglob("*.png"):
        copy = tmp_path / "data" / path.relative_to(exported)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "data"


def restore_by_hand(data, out):
    """As if by another program: with the first reference the truth, with the second the LQ face as it is."""
    for task in find_tasks(data, REFERENCES, EVERYWHERE)[0]:
        path = task.restored(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((task.truth if task.reference.stem == "1" else task.lq).read_bytes())


def rows_of(out):
    with (out / "images.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_restored_by_another_program(data, tmp_path, capsys):
    out = tmp_path / "out"
    restore_by_hand(data, out)
    (data / "0001" / "ref" / "broken.png").write_bytes(b"PNG?")
    main(["evaluate", "folder", str(data), "--out", str(out), "--references", "2", "--measure-only"])
    rows = rows_of(out)
    assert [(row["person"], row["image"], row["reference"]) for row in rows] == [
        ("0000", "0", "1"), ("0000", "0", "2"), ("0001", "0", "1"), ("0001", "0", "2")]
    for perfect, spoilt in zip(rows[::2], rows[1::2]):
        assert float(perfect["IDS-HQ"]) == pytest.approx(1, abs=1e-4) and float(perfect["LMD"]) == 0
        assert perfect["PSNR"] == "inf" and float(perfect["SSIM"]) == pytest.approx(1)
        assert 10 < float(spoilt["PSNR"]) < 35 and float(spoilt["SSIM"]) < 0.95
        assert -1 <= float(perfect["IDS-REF"]) <= 1
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert text.startswith("| method | IDS-HQ ↑ | PSNR ↑ | SSIM ↑ | LMD ↓ | IDS-REF ↑ | I.V. ↓ |")
    assert "Restorations: 4, of faces: 2, of people: 2. Judge: nano_judge" in text
    assert "How: restored elsewhere." in text
    assert "Absent: LPIPS" in text and "Left out: 0001/ref/broken.png" in text
    assert Image.open(out / "sheet.png").width > 4 * 192


def test_restored_here_by_the_shipped_networks(data, tmp_path):
    out = tmp_path / "out"
    main(["evaluate", "folder", str(data), "--out", str(out), "--steps", "1", "--guidance", "2"])
    assert len(rows_of(out)) == PEOPLE
    restored = [Image.open(task.restored(out)) for task in find_tasks(data, 1, EVERYWHERE)[0]]
    assert [image.size for image in restored] == [(128, 128)] * PEOPLE
    main(["evaluate", "folder", str(data), "--out", str(out), "--steps", "1", "--references", "0",
          "--color-fix", "adain"])
    blind = find_tasks(data, 0, EVERYWHERE)[0][0].restored(out)
    assert blind.name == "0.png" and Image.open(blind).tobytes() != restored[0].tobytes()
    lq, fixed = (numpy.array(Image.open(path)).mean((0, 1)) for path in (data / "0000" / "lq" / "0.png", blind))
    assert abs(lq - fixed).max() < 4
    assert "restored blindly" in (out / "summary.md").read_text(encoding="utf-8")


def test_id_preserving_sampling_moves_the_face_towards_the_reference(data, tmp_path):
    def similarity(*arguments):
        out = tmp_path / "out"
        main(["evaluate", "folder", str(data), "--out", str(out), "--steps", "6", *arguments])
        assert "steps 6" in (out / "summary.md").read_text(encoding="utf-8")
        return numpy.mean([float(row["IDS-REF"]) for row in rows_of(out)])

    assert similarity("--id-preserving", "0.2", "--guidance", "2") > similarity("--guidance", "2") + 0.05


def test_two_processes_measure_what_one_does(data, tmp_path, checkout):
    arguments = ["evaluate", "folder", str(data), "--references", "2", "--measure-only", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        restore_by_hand(data, out)
    main([*arguments, str(one)])
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0", "-m"]
    done = subprocess.run([sys.executable, "-m", *launch, "ridfr_core.cli", *arguments, str(two)], cwd=checkout,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("images.csv", "summary.md"):
        assert (one / name).read_text(encoding="utf-8") == (two / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, message", [
    (["--judge", "nano"], "The judge nano has the same recogniser file as nano, which conditions"),
    (["--content", "nowhere.safetensors"], "nowhere.safetensors.* does not exist"),
    (["--id-preserving", "0.1", "--references", "0"], "--id-preserving needs references"),
    (["--measure-only"], "2 of 2 restored faces are not there, the first of them '.*0000/0--1.png': restore them"),
])
def test_refused(data, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"ridfr evaluate folder: .*{message}"):
        main(["evaluate", "folder", str(data), "--out", str(tmp_path / "out"), *arguments])


def test_nothing_to_restore(tmp_path):
    with pytest.raises(EvaluationError, match=r"nothing to restore: it needs PERSON/lq/NAME.png and PERSON/ref/"):
        find_tasks(tmp_path, 1, EVERYWHERE)
    with pytest.raises(EvaluationError, match=r"nowhere' is not a folder: give the one that holds a folder for"):
        find_tasks(tmp_path / "nowhere", 1, EVERYWHERE)


def test_a_person_without_a_degraded_face_is_named(data):
    (data / "0001" / "lq").rename(data / "0001" / "scan")
    tasks, unusable = find_tasks(data, 1, EVERYWHERE)
    assert {task.person for task in tasks} == {"0000"}
    assert unusable == {data / "0001" / "lq": "there is no degraded face, so the person is left out"}


@pytest.mark.parametrize("setting", [["--steps", "0"], ["--id-preserving", "-1"], ["--references", "-1"]])
def test_a_setting_that_is_too_small_is_refused(data, tmp_path, setting, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "folder", str(data), "--out", str(tmp_path / "out"), *setting])
    assert "is too little: at least" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_reference_without_a_face_and_a_person_without_a_reference_are_named(data):
    Image.new("RGB", (128, 128), "white").save(data / "0000" / "ref" / "1.png")
    for photo in (data / "0001" / "ref").iterdir():
        photo.unlink()
    tasks, unusable = find_tasks(data, 1, face_model_of("nano").detector)
    assert [task.reference for task in tasks] == [data / "0000" / "ref" / "2.png"]
    assert unusable == {data / "0000" / "ref" / "1.png": "no face was found in it",
                        data / "0001" / "ref": "there is no reference, so the person is left out"}


def test_references_of_one_stem_do_not_overwrite_each_others_results(data):
    photo = Image.open(data / "0000" / "ref" / "1.png")
    photo.save(data / "0000" / "ref" / "1.jpg")
    photo.save(data / "0000" / "ref" / "1.webp")
    Image.open(data / "0000" / "gt" / "0.png").save(data / "0000" / "gt" / "0.bmp")
    tasks, unusable = find_tasks(data, 3, EVERYWHERE)
    names = [task.restored(data) for task in tasks]
    assert len(set(names)) == len(names) == 4
    first = data / "0000" / "ref" / "1.jpg"
    assert {path.name for path in unusable} == {"1.png", "1.webp", "0.png"}
    assert unusable[first.with_suffix(".png")] == "its results would be called as those of 1.jpg, so rename it"


def test_names_that_meet_in_another_way_are_refused(data):
    folder = data / "0000"
    for name in ("lq/0--1.png", "ref/1--2.png"):
        (folder / name).write_bytes((folder / "lq" / "0.png").read_bytes())
    with pytest.raises(EvaluationError, match="The results of '0--1.png' and '0.png' of 0000 would have one name, "
                                              "0--1--2.png: rename the faces or the references"):
        find_tasks(data, 3, EVERYWHERE)


def test_odd_pictures_are_left_out_and_named(data):
    folder = data / "0000"
    Image.fromarray(numpy.zeros((128, 128), "float32") * numpy.nan).save(folder / "ref" / "0.tif")
    (folder / "ref" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("RGB", (1, 1)).save(folder / "ref" / "b.png")
    Image.new("RGB", (16, 3200)).save(folder / "lq" / "long.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "lq" / "pipe.png")
    tasks, unusable = find_tasks(data, 1, EVERYWHERE)
    assert {task.person for task in tasks} == {"0000", "0001"} and len(tasks) == 2
    reasons = {path.name: reason for path, reason in unusable.items()}
    assert reasons["0.tif"].startswith("its values go from nan") and reasons["a.png"] == "it is not an image"
    assert "at least 16" in reasons["b.png"] and "more than 16 times as long" in reasons["long.png"]
    assert reasons.get("pipe.png", "it is not a file") == "it is not a file"


def test_only_squares_are_restored_and_only_like_shapes_compared(data, tmp_path):
    wide = Image.new("RGB", (128, 100), "gray")
    wide.save(data / "0000" / "gt" / "0.png")
    wide.save(data / "0001" / "lq" / "1.png")
    tasks, unusable = find_tasks(data, 1, EVERYWHERE)
    assert [task.truth and task.truth.name for task in tasks] == [None, "0.png", None]
    assert unusable == {data / "0000" / "gt" / "0.png":
                        "its shape is not that of the degraded face, so it is not compared"}
    assert [task.lq.name for task in only_square(tasks, unusable)] == ["0.png", "0.png"]
    assert unusable[data / "0001" / "lq" / "1.png"] == "it has 128x100 pixels, but must be a square"
    with pytest.raises(EvaluationError, match="No degraded face is a square"):
        only_square(tasks[2:], {})


def test_seeds_give_each_face_noise_of_its_own(data, tmp_path):
    out = tmp_path / "out"
    main(["evaluate", "folder", str(data), "--out", str(out), "--steps", "1", "--seeds", "2", "--references", "2"])
    rows, tasks = rows_of(out), find_tasks(data, 2, EVERYWHERE, seeds=2)[0]
    assert [(row["person"], row["reference"], row["seed"]) for row in rows] == [
        (person, reference, seed) for person in ("0000", "0001") for reference in "12" for seed in "01"]
    assert [task.name for task in tasks[:4]] == ["0--1", "0--1--seed1", "0--2", "0--2--seed1"]
    noises = {(task.person, task.seed): task.noise for task in tasks}
    assert len(set(noises.values())) == 4
    assert all(task.noise == noises[task.person, task.seed] for task in tasks)  # whatever the reference
    images = [Image.open(task.restored(out)).tobytes() for task in tasks[:2]]
    assert images[0] != images[1]
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "In brackets: 95 % bootstrap intervals over people." in text
    found = dict(zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (text.splitlines()[0],
                                                                             text.splitlines()[3]))))
    mean, low, high = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", found["PSNR ↑"]).groups())
    assert mean == pytest.approx(numpy.mean([float(row["PSNR"]) for row in rows]), rel=1e-3) and low <= mean <= high


def test_intervals_are_over_people():
    rows = [Row(person, "0", str(i), {"PSNR": value}, None)
            for person, values in {"a": (10.0, 20.0), "b": (30.0,), "c": (40.0,)}.items()
            for i, value in enumerate(values)]
    assert intervals(rows)["PSNR"].value == pytest.approx(25) == averages(rows)["PSNR"]
    assert 15 <= intervals(rows)["PSNR"].low < 25 < intervals(rows)["PSNR"].high <= 40
    assert intervals(rows[:2]) == {}  # of one person
    assert intervals([*rows, Row("d", "0", "1", {"PSNR": math.inf}, None)]) == {}


def test_the_variance_is_between_references_of_one_seed():
    one, other = torch.eye(512)[:2]
    rows = [Row("a", "0", reference, {}, embedding, seed)
            for seed, embedding in enumerate((one, other)) for reference in "12"]
    assert variance(rows) == 0


def test_a_result_that_is_not_finite_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Restorer, "restore", lambda self, lq, *_: lq * math.nan)
    with pytest.raises(SystemExit, match="The restoration of '.*0000/lq/0.png' has NaN or infinite values"):
        main(["evaluate", "folder", str(data), "--out", str(tmp_path / "out"), "--steps", "1"])


def test_a_judge_that_makes_nan_is_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    restore_by_hand(data, out)
    nan = torch.full((1, 512), math.nan)
    monkeypatch.setattr("ridfr_core.evaluation.measure.embed", lambda recogniser, crops: nan)
    with pytest.raises(SystemExit, match="The judge nano_judge makes NaN of '.*png': its recogniser is damaged"):
        main(["evaluate", "folder", str(data), "--out", str(out), "--measure-only"])


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="their file names are Unicode")
def test_names_need_not_be_unicode(data, tmp_path):
    out, odd = tmp_path / "out", os.fsdecode(b"\xff.png")
    (data / "0000" / "lq" / "0.png").rename(data / "0000" / "lq" / odd)
    (data / "0001" / "ref" / odd).write_bytes(b"PNG?")
    main(["evaluate", "folder", str(data), "--out", str(out), "--steps", "1"])
    assert rows_of(out)[0]["image"] == "\\udcff"
    assert "Left out: 0001/ref/\\udcff.png" in (out / "summary.md").read_text(encoding="utf-8")


def test_a_restored_picture_that_cannot_be_read_is_named(data, tmp_path):
    out = tmp_path / "out"
    restore_by_hand(data, out)
    (out / "restored" / "0000" / "0--1.png").write_bytes(b"PNG?")
    with pytest.raises(SystemExit, match="The picture '.*0000/0--1.png' cannot be used: it is not an image"):
        main(["evaluate", "folder", str(data), "--out", str(out), "--measure-only"])


def test_what_could_not_be_measured_is_left_out_of_means():
    rows = [Row("a", "0", "1", {"PSNR": 20.0, "IDS-HQ": 0.5}, None), Row("a", "0", "2", {"PSNR": 30.0}, None)]
    assert averages(rows) == {"IDS-HQ": 0.5, "PSNR": 25.0} and variance(rows) is None
    table = summary({"degraded": {"PSNR": 20.0}, "restored": averages(rows)}, ["A note."]).splitlines()
    assert table[2:] == ["| degraded | – | 20 |", "| restored | 0.5 | 25 |", "", "A note."]
