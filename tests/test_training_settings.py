"""The settings of a training run."""

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
        ("steps=[", r"'steps=\[' is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(TrainingError, match=message):
        read_settings("content", None, [*NEEDED, override])


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
