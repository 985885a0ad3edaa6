"""The settings of a training run."""

import os
from dataclasses import fields

import pytest
import yaml

from ridfr_core import cli
from ridfr_core.training.settings import (
    LEAST,
    RECIPES,
    STAGES,
    AlignSettings,
    Degradation,
    TrainingError,
    as_yaml,
    changed,
    read_settings,
)

NEEDED = ["data=photos", "base=sd15", "out=run"]
REFERENCES = ["adapter=a", "content=c", "face_model=buffalo_l", "clip_vision=h"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_has_the_keys_of_its_stage(stage):
    recipe = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
    assert set(recipe) == {field.name for field in fields(STAGES[stage])}


def test_least_values_are_of_keys_that_there_are():
    assert set(LEAST) <= {field.name for field in fields(AlignSettings)}


def test_the_papers_numbers_are_the_defaults():
    content = read_settings("content", None, NEEDED)
    align = read_settings("align", None, NEEDED + REFERENCES)
    naive = read_settings("naive", None, NEEDED + REFERENCES)
    assert (content.steps, content.batch, content.resolution, content.kernel) == (87500, 8, 512, "bicubic")
    assert (align.steps, align.batch, align.strength, align.validation_people) == (45000, 8, 1.0, 100)
    assert (max(align.reference_sizes), min(align.reference_sizes)) == (512, 64)
    assert changed(naive, as_yaml(align)) == ["strength: 1.0 -> 0.0"]


def test_a_file_overrides_the_recipe_and_the_command_line_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 3e-5\nsteps: 10\ndegradation:\n  sigma: [1, 2]\n")
    settings = read_settings("content", file, [*NEEDED, "steps=20", "degradation.quality=[5, 6.5]"])
    assert (settings.lr, settings.steps, settings.batch) == (3e-5, 20, 8)
    assert settings.degradation == Degradation((1.0, 2.0), (1.0, 16.0), (0.0, 15.0), (5.0, 6.5))


@pytest.mark.parametrize(
    "override, message",
    [
        ("stesp=3", r"'stesp=3' has the unknown key 'stesp'; did you mean 'steps'\?"),
        ("degradation.sgima=[1, 2]", r"unknown key 'sgima'; did you mean 'sigma'\?"),
        ("steps=many", "'steps' is 'many', but must be a whole number"),
        ("steps=1.5", "'steps' is 1.5, but must be a whole number"),
        ("gradient_checkpointing=1", "'gradient_checkpointing' is 1, but must be true or false"),
        ("degradation.sigma=[1]", r"'sigma' is \[1\], but must be a list of numbers such as \[1, 2\]"),
        ("degradation=3", "'degradation' is a group of keys: sigma, ratio, noise, quality"),
        ("schedule=linear", "'schedule' is 'linear', but must be one of constant, cosine"),
        ("kind=both", "'kind' is 'both', but must be one of pixel, latent"),
        ("save_every=0", "'save_every' is 0, but must be at least 1"),
        ("lr=-1e-4", "'lr' is -0.0001, but must be at least 0"),
        ("data=", "'data' is not set"),
        ("steps", "'steps' is not a setting: write it as key=value"),
        ("lr=.nan", "'lr' is nan, but must be a finite number"),
        ("lr=1e400", "'lr' is inf, but must be a finite number"),
        ("clip=.inf", "'clip' is inf, but must be a finite number"),
        ("ema=2", "'ema' is 2, but must be at most 0.999999"),
        ("ema=.nan", "'ema' is nan, but must be a finite number"),
        ("degradation.noise=[.nan, .nan]", "'noise' is nan, but must be a finite number"),
        ("degradation.ratio=[16, 1]", r"'ratio' is \[16, 1\], but must go from a smaller number to a larger one"),
        ("degradation.ratio=[0.5, 1]", "'ratio' is 0.5, but must be at least 1"),
        ("degradation.quality=[0, 300]", "'quality' is 0, but must be at least 1"),
        ("degradation.quality=[30, 300]", "'quality' is 300, but must be at most 100"),
        ("degradation.sigma=[-1, 2]", "'sigma' is -1, but must be at least 0"),
        ("resolution=130", "'resolution' is 130, but must be a multiple of 8"),
        ("resolution=1000000000", "'resolution' is 1000000000, but must be at most 4096"),
        ("steps=99999999999999999999999", "'steps' is 9+, but must be at most"),
        ("seed=-1", "'seed' is -1, but must be at least 0"),
        ("steps=12:30", "'steps' is '12:30', but must be a whole number"),
        ("steps=010", "'steps' is '010', but must be a whole number"),
        ("steps=!!int x", "'steps=!!int x' is not valid YAML"),
        ("gradient_checkpointing=yes", "'gradient_checkpointing' is 'yes', but must be true or false"),
        ("data=a\0b", "'data' is .* but no path has a zero byte"),
        ("data=a\udcff", "'data' is .* which has characters that are not Unicode"),
        ("steps=[", r"'steps=\[' is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(TrainingError, match=message):
        read_settings("content", None, [*NEEDED, override])


@pytest.mark.parametrize("text", ["/mnt/photos #1", "2024-01-01", "a: b", "1e5", "on", "[a", "'a'", "x=y", "*a", "12"])
def test_a_path_on_the_command_line_is_taken_as_it_stands(text):
    assert read_settings("content", None, [*NEEDED, f"out={text}"]).out == text


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert read_settings("content", None, [*NEEDED, "out=~/runs"]).out == os.path.join(tmp_path, "runs")


def test_a_path_in_a_file_may_look_like_a_date(tmp_path):
    (tmp_path / "mine.yaml").write_text("out: 2024-01-01\ndata: on\nlr: 1e-3\n")
    settings = read_settings("content", tmp_path / "mine.yaml", ["base=x"])
    assert (settings.out, settings.data, settings.lr) == ("2024-01-01", "on", 1e-3)


@pytest.mark.parametrize("text, message", [
    ("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi")), "references"),
    ("data: " + "[" * 5000, "nested too deeply"),
    ("data: " + "{a: " * 50 + "}" * 50, "nested too deeply"),
    ("lr: 1\nlr: 2", "a key is given twice"),
    ("- lr", "must consist of lines 'key: value'"),
    ("cache: 7", r"'cache' is 7, but must be text \(in a file, put it in quotes\)"),
    ("#" * 2**21, "has more than 1,048,576 bytes"),
    ("data: a: b", "is not valid YAML"),
    ("data: !!python/object/apply:os.system [true]", "is not valid YAML"),
    ("? [a]\n: b", "is not valid YAML"),
    ("1: 2", "has the unknown key '1'"),
    (b"data: \xff", "is not UTF-8 text"),
    (b"data: \0", "is not valid YAML"),
])
def test_a_file_that_is_wrong_is_named(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TrainingError, match=message) as refused:
        read_settings("content", file, NEEDED)
    assert "mine.yaml" in str(refused.value) or "'cache'" in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(TrainingError, match="pipe.yaml' is not a file"):
        read_settings("content", tmp_path / "pipe.yaml", NEEDED)


def test_what_must_be_given_is_asked_for():
    with pytest.raises(TrainingError, match="'adapter' is not set: give adapter="):
        read_settings("align", None, [*NEEDED, *REFERENCES[1:]])
    assert read_settings("adapter", None, [*NEEDED, *REFERENCES[2:]]).adapter is None


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"none.yaml' cannot be read \(No such file or directory\)"):
        read_settings("content", tmp_path / "none.yaml", NEEDED)


def test_the_command_prints_its_settings_and_one_sentence_for_a_wrong_one(capsys):
    cli.main(["train", "naive", "--show"])
    assert yaml.safe_load(capsys.readouterr().out)["strength"] == 0.0
    with pytest.raises(SystemExit, match="^ridfr train content: 'stesp=3' has the unknown key 'stesp'"):
        cli.main(["train", "content", "stesp=3"])
