"""Training's photos, references and draws."""

import os
import pickle
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from ridfr_core.degradation import DegradationRange
from ridfr_core.faces import ARCFACE_TEMPLATE
from ridfr_core.files import PARTIAL
from ridfr_core.randomness import seed_of
from ridfr_core.training import clip_vision, material, photos, references
from ridfr_core.training.draws import Draws, draws_of_process
from ridfr_core.training.loop import Recipe
from ridfr_core.training.photos import Photos, find_photos, split_people
from ridfr_core.training.references import Features, References, compute_features, find_faces, other_photos, strangers
from ridfr_core.training.settings import TrainingError


def picture(path, seed=0, size=(64, 64), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), numpy.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for person, count in (("anna", 3), ("ben", 2), ("cleo", 1)):
        for i in range(count):
            picture(tmp_path / "photos" / person / f"{i}.png", seed=10 * len(person) + i)
    return tmp_path / "photos"


def quiet(batches, **_):
    return batches


def test_photos_that_cannot_be_used_are_left_out_and_named(folder, tmp_path):
    picture(folder / "grey.png", mode="L")
    picture(folder / "wide.JPG", size=(100, 64))
    picture(folder / "small.png", size=(64, 63))
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    whole = (folder / "wide.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    found, skipped = find_photos(folder, 64, tmp_path / "cache")
    assert found.names == ("anna/0.png", "anna/1.png", "anna/2.png", "ben/0.png", "ben/1.png", "cleo/0.png",
                           "grey.png", "wide.JPG")
    assert skipped["small.png"] == "64x63 pixels are less than 64"
    assert skipped["text.jpg"] == "it is not an image"
    assert skipped["cut.jpg"].startswith("it is damaged")
    assert len(skipped) == 3
    assert found.image(6).shape == found.image(7).shape == (3, 64, 64)


def test_photos_are_read_again_only_when_they_have_changed(folder, tmp_path, monkeypatch):
    first, _ = find_photos(folder, 64, tmp_path / "cache")
    read = []
    monkeypatch.setattr(photos, "load_photo", lambda path, resolution: read.append(path.name))
    assert find_photos(folder, 64, tmp_path / "cache")[0].digest == first.digest
    assert read == []
    picture(folder / "cleo" / "0.png", seed=99, size=(65, 65))
    os.utime(folder / "cleo" / "0.png", ns=(1, 1))
    assert find_photos(folder, 64, tmp_path / "cache")[0].digest != first.digest
    assert read == ["0.png"]


def test_a_folder_without_photos_says_so(tmp_path):
    with pytest.raises(TrainingError, match="There are no photos in '.*empty'"):
        find_photos(tmp_path / "empty", 64, tmp_path / "cache")
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(TrainingError, match=r"None of the 1 photos in .* can be used: bad.png: it is not an image"):
        find_photos(tmp_path, 64, tmp_path / "cache")


def test_people_are_split_by_the_seed():
    people = [f"{i:04d}" for i in range(1005)]
    train, apart = split_people(reversed(people), 100, seed=3)
    assert len(train) == 905 and len(apart) == 100 and sorted(train + apart) == people
    assert (train, apart) == split_people(people, 100, seed=3)
    assert apart != split_people(people, 100, seed=4)[1]
    with pytest.raises(TrainingError, match="Of 3 people 3 cannot be kept apart"):
        split_people(people[:3], 3, seed=0)


class Recogniser(nn.Module):
    """Embeddings that are mean colours, through random weights."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.randn(3, 512, generator=torch.Generator().manual_seed(0)))

    def forward(self, crops):
        self.calls += 1
        return crops.mean((2, 3)) @ self.weight


class Detector:
    """Finds the face in the middle of any picture that is not black."""

    def __init__(self, digest):
        self.digest = digest

    def detect(self, image):
        return [SimpleNamespace(landmarks=ARCFACE_TEMPLATE * (image.shape[-1] / 112))] if image.any() else []


def face_model(digest="one", detector="one"):
    return SimpleNamespace(detector=Detector(detector), recogniser=Recogniser(), digest=digest)


@pytest.fixture(scope="module")
def tower():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)
    return CLIPVisionModelWithProjection(config).eval()


def test_photos_without_a_face_are_left_out(folder, tmp_path):
    Image.new("RGB", (64, 64)).save(folder / "anna" / "1.png")
    found, _ = find_photos(folder, 64, tmp_path / "cache")
    seen, landmarks = find_faces(found, face_model(), tmp_path / "cache", quiet)
    assert set(found.names) - set(seen.names) == {"anna/1.png"}
    assert landmarks.shape == (5, 5, 2) and not landmarks.isnan().any()


def test_features_are_computed_once_for_a_recogniser(folder, tmp_path, tower):
    cache = tmp_path / "cache"
    found, _ = find_photos(folder, 64, cache)
    model = face_model()
    seen, landmarks = find_faces(found, model, cache, quiet)

    def compute(model):
        return compute_features(seen, landmarks, model, tower, (64, 32), cache, "cpu", quiet)

    features = compute(model)
    assert model.recogniser.calls == 2
    small, points = references.shrink(found.image(4)[None], landmarks[4:5], 32)
    with torch.no_grad():
        clip = clip_vision.features(tower, small, points)[0]
        pixels = torch.nn.functional.interpolate(found.image(4)[None], (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(small, pixels.clamp(0, 1))
    torch.testing.assert_close(features.clip(4, 32), clip, rtol=1e-2, atol=1e-2)
    assert features.embeddings(64).norm(dim=1).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(features.embedding(4, 64), features.embeddings(64)[4])
    assert compute(model).path("clip", 64) == features.path("clip", 64) and model.recogniser.calls == 2
    for other in (face_model("another"), face_model(detector="another")):
        assert compute(other).path("clip", 64) != features.path("clip", 64) and other.recogniser.calls == 2


def test_a_full_disk_while_features_are_written_is_a_sentence(folder, tmp_path, tower, monkeypatch):
    """Writing beyond a limit fails as on a full disk; in a memory-mapped file it would kill the process."""
    resource, cache = pytest.importorskip("resource"), tmp_path / "cache"
    found, _ = find_photos(folder, 64, cache)
    seen, landmarks = find_faces(found, face_model(), cache, quiet)
    fresh = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, fresh[1]))
    try:
        with pytest.raises(TrainingError, match=r"clip-.*-64.npy' cannot be written .*: is the disk full\?"):
            compute_features(seen, landmarks, face_model(), tower, (64,), cache, "cpu", quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, fresh)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {"photos", "faces"}  # no part of a file
    monkeypatch.setattr(numpy.lib.format, "open_memmap", lambda *_, **__: pytest.fail("a sparse file is mapped"))
    compute_features(seen, landmarks, face_model(), tower, (64,), cache, "cpu", quiet)


def test_two_runs_that_share_a_cache_do_not_spoil_each_others_features(folder, tmp_path, tower):
    """The second begins, and ends, while the first is at its second batch."""
    cache = tmp_path / "cache"
    found, _ = find_photos(folder, 64, cache)
    seen, landmarks = find_faces(found, face_model(), cache, quiet)

    def compute(progress, sizes=(64, 32)):
        return compute_features(seen, landmarks, face_model(), tower, sizes, cache, "cpu", progress)

    def interrupted(batches, **_):
        for number, batch in enumerate(batches):
            if number == 1:
                compute(quiet)
            yield batch

    references_batch = references.BATCH
    try:
        references.BATCH = 2
        features = compute(interrupted)
    finally:
        references.BATCH = references_batch
    alone = compute_features(seen, landmarks, face_model(), tower, (64, 32), tmp_path / "alone", "cpu", quiet)
    for size in (64, 32):
        torch.testing.assert_close(features.embeddings(size), alone.embeddings(size))
        for row in range(len(seen)):
            assert features.clip(row, size).any()
            torch.testing.assert_close(features.clip(row, size), alone.clip(row, size), rtol=1e-2, atol=1e-2)
    assert not list(cache.glob(PARTIAL.format("*")))


@pytest.mark.parametrize("damage", [b"", b"no array", pickle.dumps({"a": 1})])
def test_damaged_features_are_computed_again(folder, tmp_path, tower, damage):
    cache, model = tmp_path / "cache", face_model()
    found, _ = find_photos(folder, 64, cache)
    find_faces(found, model, cache, quiet)
    (faces,) = cache.glob("faces-*.npy")
    faces.write_bytes(damage)
    seen, landmarks = find_faces(found, model, cache, quiet)
    features = compute_features(seen, landmarks, model, tower, (64,), cache, "cpu", quiet)
    whole = features.clip(3, 64).clone()
    for name in ("clip", "embeddings"):
        features.path(name, 64).write_bytes(damage)
        again = compute_features(seen, landmarks, model, tower, (64,), cache, "cpu", quiet)
        torch.testing.assert_close(again.clip(3, 64), whole)
        assert again.embeddings(64).shape == (len(seen), 512)
    (index,) = cache.glob("photos-*.json")
    index.write_bytes(b"[" * 10_000)
    assert find_photos(folder, 64, cache)[0].digest == found.digest


def test_features_of_other_code_are_stale(folder, tmp_path, tower, monkeypatch):
    cache, model = tmp_path / "cache", face_model()
    found, _ = find_photos(folder, 64, cache)

    def paths():
        seen, landmarks = find_faces(found, model, cache, quiet)
        features = compute_features(seen, landmarks, model, tower, (64,), cache, "cpu", quiet)
        return {features.path("clip", 64), *cache.glob("faces-*")}

    before = paths()
    monkeypatch.setattr(references, "VERSION", -1)
    assert features_of(paths() - before) == {"clip", "faces"}


def features_of(paths):
    return {path.name.partition("-")[0] for path in paths}


def test_networks_that_make_nan_are_refused(folder, tmp_path, tower):
    found, _ = find_photos(folder, 64, tmp_path / "cache")
    model = face_model()
    seen, landmarks = find_faces(found, model, tmp_path / "cache", quiet)
    model.recogniser.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="makes NaN of 'anna/0.png' or of a photo after it"):
        compute_features(seen, landmarks, model, tower, (64,), tmp_path / "cache", "cpu", quiet)
    assert not list((tmp_path / "cache").glob("clip-*"))


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="their file names are Unicode")
def test_a_photos_name_need_not_be_unicode(folder, tmp_path):
    picture(folder / os.fsdecode(b"\xff.png"))
    found, skipped = find_photos(folder, 64, tmp_path / "cache")
    assert len(found) == 7 and not skipped and len(found.digest) == 64


def test_landmarks_follow_the_shrunk_photo():
    """A bright spot at (41, 25) of 64 lies, centre on centre, at (20.25, 12.25) of 32."""
    image = torch.full((1, 3, 64, 64), 0.5)
    image[..., 24:27, 40:43] += 0.3
    small, points = references.shrink(image, torch.tensor([[[41.0, 25.0]]]), 32)
    axis, mass = torch.arange(32.0), small[0, 0] - 0.5
    centre = torch.stack([(mass.sum(0) * axis).sum(), (mass.sum(1) * axis).sum()]) / mass.sum()
    torch.testing.assert_close(points[0, 0], centre, rtol=0, atol=0.02)


class Numbered(Features):
    """Features that say which photo at which size they are of."""

    def __init__(self, sizes):
        super().__init__(None, "", sizes)

    def embedding(self, row, size):
        return torch.full((512,), float(row))

    def clip(self, row, size):
        return torch.full((5, 4), float(size))


def drawn(others, row, sizes=(64, 32, 16), count=2, drop=0.0, times=50):
    chooser = References(Numbered(sizes), others, count, drop, torch.full((5, 4), -1.0))
    draws = [chooser.draw(row, torch.Generator().manual_seed(seed)) for seed in range(times)]
    return [tuple(d["embedding"][:, 0].tolist()) for d in draws], [tuple(d["clip"][:, 0, 0].tolist()) for d in draws]


def test_references_are_two_other_photos_of_the_person_at_random_sizes():
    rows, sizes = drawn(other_photos({"anna": [0, 1, 2, 5], "ben": [3, 4]}), 1)
    assert {row for pair in rows for row in pair} == {0, 2, 5}
    assert all(a != b for a, b in rows)
    assert {size for pair in sizes for size in pair} == {64, 32, 16}


def test_who_has_too_few_photos_is_their_own_reference():
    others = other_photos({"ben": [3, 4], "cleo": [7]})
    assert set(drawn(others, 3)[0]) == {(4, 3)}
    rows, sizes = drawn(others, 7)
    assert set(rows) == {(7, 7)}
    assert all(a != b for a, b in sizes)


def test_references_are_dropped_together():
    rows, sizes = drawn(other_photos({"anna": [1, 2, 3]}), 1, drop=0.5, times=200)
    dropped = [pair == (0, 0) for pair in rows]
    assert [pair == (-1, -1) for pair in sizes] == dropped
    assert 70 < sum(dropped) < 130


def test_a_stranger_among_the_photos_of_a_person_is_found(folder, tmp_path):
    found, _ = find_photos(folder, 64, tmp_path / "cache")
    anna, ben = torch.eye(512)[:2]
    alike = torch.nn.functional.normalize(anna + 0.3 * torch.eye(512)[2], dim=0)
    embeddings = torch.stack([anna, alike, ben, ben, ben, anna])
    assert [name for name, _ in strangers(found, embeddings)] == ["anna/2.png"]
    said = []
    material._check_people(found, embeddings, said.append)
    assert said[0].startswith("Warning: 1 photos look like another person") and "anna/2.png (0.00)" in said[0]
    assert said[1] == "1 people have one photo only (cleo): it is both references, at different sizes."


@pytest.mark.parametrize("first, second, found", [(4, 4, 8), (5, 3, 3)])
def test_two_people_in_one_folder_are_found(tmp_path, first, second, found):
    names = tuple(f"both/{i}.png" for i in range(first + second))
    embeddings = torch.eye(512)[[0] * first + [1] * second]
    doubtful = strangers(Photos(tmp_path, names, ("",) * len(names), 64), embeddings)
    assert [name for name, _ in doubtful] == list(names[-found:])


def draws(folder, tmp_path, seed=0):
    found, _ = find_photos(folder, 64, tmp_path / "cache")
    degradation = DegradationRange(sigma=(0.5, 1), ratio=(2, 4), noise=(5, 10), quality=(40, 80))
    return Draws(found, [0, 2, 3, 5], seed, degradation, None)


def test_a_draw_depends_on_its_number_and_the_seed_alone(folder, tmp_path):
    one, again, other = draws(folder, tmp_path), draws(folder, tmp_path), draws(folder, tmp_path, seed=1)
    later = one[7]
    [again[n] for n in range(3)]
    assert all(torch.equal(value, again[7][name]) for name, value in later.items())
    assert not torch.equal(later["noise"], other[7]["noise"])
    assert not torch.equal(later["noise"], one[6]["noise"])
    assert later["lq"].shape == (3, 64, 64) and (later["lq"] - later["hq"]).abs().mean() > 0.05


def test_a_photo_that_goes_bad_in_mid_run_is_named_and_the_next_takes_its_place(folder, tmp_path):
    one = draws(folder, tmp_path)
    name = one.photos.names[one.row(4)]
    (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=f"'{name}' can no longer be used: it is not an image. The next photo takes"):
        draw = one[4]
    assert torch.equal(draw["hq"], one[5]["hq"]) and not torch.equal(draw["noise"], one[5]["noise"])
    shutil.rmtree(folder)
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match="is the folder still there"):
        one[4]


def test_seeds_and_numbers_do_not_meet(folder, tmp_path):
    """Draw 1,000,003 of seed 0 would be draw 0 of seed 1 if they were added up."""
    later, other = draws(folder, tmp_path, seed=0)[1_000_003], draws(folder, tmp_path, seed=1)[0]
    assert not torch.equal(later["noise"], other["noise"])
    starts = {seed_of(*purpose) for seed in range(3) for n in range(100)
              for purpose in (("draw", seed, n), ("order", seed, n))}
    assert len(starts) == 600 and all(0 <= start < 2**63 for start in starts)
    assert draws(folder, tmp_path, seed=2**63 - 1)[2**40]["noise"].isfinite().all()
    first, second = (Recipe(steps=1, batch=1, lr=1, seed=seed).generator(n) for seed, n in ((0, 1_000_003), (1, 0)))
    assert first.initial_seed() != second.initial_seed()


def test_each_epoch_has_every_photo_once_in_another_order(folder, tmp_path):
    one = draws(folder, tmp_path)
    epochs = [[one.row(4 * epoch + i) for i in range(4)] for epoch in range(6)]
    assert all(sorted(epoch) == [0, 2, 3, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("accumulate, processes", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_all_processes_together_draw_each_batch(accumulate, processes):
    parts = [list(draws_of_process(range(5, 8), 8, accumulate, p, processes)) for p in range(processes)]
    for step in range(3):
        drawn = [n for part in parts for turn in part[step * accumulate : (step + 1) * accumulate] for n in turn]
        assert sorted(drawn) == list(range(8 * (step + 5), 8 * (step + 6)))


def test_photos_know_whose_they_are(tmp_path):
    names = ("anna/1.png", "anna/sub/2.png", "ben/1.png")
    assert Photos(tmp_path, names, ("",) * 3, 64).people == {"anna": [0, 1], "ben": [2]}


def test_photos_in_no_folder_are_left_out_where_people_matter(tmp_path):
    said, flat = [], ("1.png", "2.png")
    both = material._of_people(Photos(tmp_path, (*flat, "anna/1.png"), ("",) * 3, 64), said.append)
    assert both.people == {"anna": [0]}
    assert said == ["2 photos are left out, since they are not in a person's folder: 1.png, 2.png."]
    with pytest.raises(TrainingError, match="put each person's photos into a folder of their own"):
        material._of_people(Photos(tmp_path, flat, ("",) * 2, 64), print)
