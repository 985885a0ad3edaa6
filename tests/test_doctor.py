"""`ridfr doctor`: what it finds in a ComfyUI folder made of tiny files."""

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core import checkpoints, cli, doctor, host, known_models
from ridfr_core.commands.doctor import where
from ridfr_core.nano import WEIGHTS

KEYS = {  # a tensor name or two that make a file one of checkpoints.KINDS
    "sd-checkpoint": ("model.diffusion_model.input_blocks.0.0.weight",),
    "controlnet": ("zero_convs.0.0.weight", "input_hint_block.0.weight"),
    "identity-adapter": ("ip_adapter.1.to_k_ip.weight", "image_proj.perceiver_resampler.proj_in.weight"),
}


@pytest.fixture
def comfyui(tmp_path):
    """ComfyUI's folder with every model of the tile graph, tiny, and CLIP vision in a folder of extra_model_paths."""
    (tmp_path / "output").mkdir()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    extra = "other:\n  base_path: shared\n  clip_vision: |\n    a\n    vision\n"
    (tmp_path / "extra_model_paths.yaml").write_text(extra)
    for model in known_models.WORKFLOWS["ridfr_sd15_tile"]:
        root = tmp_path / "shared" / "vision" if model.folder == "clip_vision" else tmp_path / "models" / model.folder
        write(root / model.path, model)
    return tmp_path


def write(path, model):
    path.parent.mkdir(parents=True, exist_ok=True)
    if model.folder == "insightface":
        bundled = {"detector": "det_nano.onnx", "recogniser": "rec_nano.onnx"}[model.kind]
        path.write_bytes((WEIGHTS / "insightface" / "models" / "nano" / bundled).read_bytes())
        return
    weights = {name: torch.zeros(1) for name in KEYS.get(model.kind, ("vision_model.x",))}
    torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)


def run(comfyui, *arguments, capsys=None):
    """(exit code, printed lines) of the command."""
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--comfyui", str(comfyui), *arguments])
    return int(end.value.code), capsys.readouterr().out.splitlines()


def line_of(lines, name):
    (line,) = [line for line in lines if name in line]
    return line


def test_all_is_there(comfyui, capsys):
    code, lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)
    assert code == 0 and lines[-1] == "ridfr_sd15_tile: ready"
    assert "ok      ComfyUI 0.30.0" in lines
    for model in known_models.WORKFLOWS["ridfr_sd15_tile"]:
        line = line_of(lines, model.name)
        assert line.startswith("ok") and "another file than the published one" in line
    assert str(comfyui / "shared" / "vision") in line_of(lines, known_models.CLIP_VISION.name)
    assert line_of(lines, known_models.RECOGNISER.name).endswith(", a face recogniser")
    assert line_of(lines, known_models.SWINIR.name).startswith("note"), "optional"


@pytest.mark.parametrize("model", known_models.WORKFLOWS["ridfr_sd15_tile"], ids=lambda model: model.name)
def test_a_missing_file_is_named_with_its_place_and_source(comfyui, capsys, model):
    next(comfyui.rglob(model.name)).unlink()
    code, lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)
    line = line_of(lines, model.name)
    assert code == 1 and lines[-1] == "ridfr_sd15_tile: obstacles: 1"
    assert line.startswith("missing") and model.page in line and model.licence in line
    assert str(comfyui / "models" / model.folder / model.path) in line


def test_a_damaged_file(comfyui, capsys):
    path = comfyui / "models" / "controlnet" / known_models.TILE.path
    path.write_bytes(path.read_bytes()[:-1])
    code, lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)
    assert code == 1 and "download it again" in line_of(lines, path.name)


def test_a_file_of_another_kind(comfyui, capsys):
    path = comfyui / "models" / "controlnet" / known_models.TILE.path
    save_file({"lora_down.weight": torch.zeros(1)}, path)
    code, lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)
    assert code == 1 and "holds a LoRA" in line_of(lines, path.name)


def test_an_unpublished_model_is_known_by_what_it_holds(comfyui):
    path = comfyui / "models" / "controlnet" / "mine" / "trained.safetensors"
    path.parent.mkdir()
    folders = host.model_folders(comfyui)
    assert doctor.model_file(known_models.CONTENT, folders, False).state == "missing"
    save_file({"zero_convs.0.0.weight": torch.zeros(1), "input_blocks.0.0.weight": torch.zeros(4, 7, 3, 3)}, path)
    finding = doctor.model_file(known_models.CONTENT, folders, False)
    assert finding.state == "ok" and str(path) in finding.text


def test_face_models_one_folder_too_deep_are_found(comfyui):
    place = comfyui / "models" / "insightface" / "models" / "buffalo_l"
    (place / "buffalo_l").mkdir()
    for path in list(place.glob("*.onnx")):
        path.rename(place / "buffalo_l" / path.name)
    folders = host.model_folders(comfyui)
    assert doctor.model_file(known_models.RECOGNISER, folders, False).state == "ok"


def test_models_lie_in_the_base_directory(comfyui, tmp_path_factory, capsys):
    base = tmp_path_factory.mktemp("base")
    (comfyui / "models").rename(base / "models")
    (base / "output").mkdir()
    assert run(comfyui, "ridfr_sd15_tile", capsys=capsys)[0] == 1
    assert run(comfyui, "--base-directory", str(base), "ridfr_sd15_tile", capsys=capsys)[0] == 0


def test_a_converted_recogniser_will_do(comfyui):
    path = comfyui / "models" / "insightface" / known_models.RECOGNISER.path
    cli.main(["convert", str(path)])
    path.unlink()
    folders = host.model_folders(comfyui)
    finding = doctor.model_file(known_models.RECOGNISER, folders, False)
    assert finding.state == "ok" and "converted from another file" in finding.text


def test_hashes_are_compared_only_when_asked(comfyui):
    path = comfyui / "models" / "ipadapter" / known_models.ADAPTER.path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = replace(known_models.ADAPTER, size=path.stat().st_size, sha256=digest)
    folders = host.model_folders(comfyui)
    assert "not compared" in doctor.model_file(model, folders, False).text
    assert "known good" in doctor.model_file(model, folders, True).text
    assert "sha256 unknown" in doctor.model_file(replace(model, sha256="0" * 64), folders, True).text


def test_a_gpu_build_of_onnxruntime_is_enough(monkeypatch):
    """Told to install onnxruntime beside it, the user would hide it."""
    there = {*doctor.PACKAGES, "onnxruntime-gpu"} - {"onnxruntime"}
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0" if name in there else None)
    assert all(finding.state == "ok" for finding in doctor.packages())


def test_a_cpu_onnxruntime_that_hides_the_gpu_build():
    builds = {"onnxruntime": "1.20", "onnxruntime-gpu": "1.19"}
    finding = doctor.shadowed(builds, ["AzureExecutionProvider", "CPUExecutionProvider"])
    assert finding.state == "note" and "pip uninstall onnxruntime" in finding.text and "onnxruntime-gpu" in finding.text
    assert doctor.shadowed(builds, ["CUDAExecutionProvider", "CPUExecutionProvider"]) is None
    assert doctor.shadowed({"onnxruntime": "1.20"}, ["CPUExecutionProvider"]) is None


@pytest.mark.parametrize("version, state", [("0.18.0", "ok"), ("0.17.9", "wrong"), ("1.0.0", "ok"), ("", "note")])
def test_comfyuis_version(version, state):
    assert doctor.comfyui_version(version).state == state


def test_oldest_comfyui_is_the_same_for_the_tools():
    from tools.comfyui import MINIMUM

    assert doctor.OLDEST_COMFYUI == MINIMUM


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "output"
    blocked.write_text("a file where a folder should be")
    assert doctor.writable("output", [blocked]).state == "wrong"
    assert doctor.writable("checkpoints", [blocked]).state == "note", "a shared, read-only store of models is fine"
    assert doctor.writable("output", [tmp_path]).state == "ok" and list(tmp_path.iterdir()) == [blocked]


def test_the_bundled_models_alone_need_nothing(tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "main.py").touch()
    assert run(tmp_path, "ridfr_nano", capsys=capsys)[0] == 0


WRONG = [(["ridfr_x"], "no graph ridfr_x"), (["--comfyui", "/none"], "no ComfyUI in")]


@pytest.mark.parametrize("arguments, words", WRONG)
def test_wrong_arguments(tmp_path, capsys, arguments, words):
    code, lines = run(tmp_path, *arguments, capsys=capsys)
    assert code == 2 and words in lines[0]


def test_broken_yaml_is_named(tmp_path, capsys):
    (tmp_path / "main.py").touch()
    (tmp_path / "extra_model_paths.yaml").write_text("a: [")
    code, lines = run(tmp_path, capsys=capsys)
    assert code == 2 and "extra_model_paths.yaml" in lines[0]


def test_comfyuis_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert where() == tmp_path


def test_the_readmes_table_is_the_known_models(checkout):
    assert known_models.table() in (checkout / "README.md").read_text(encoding="utf-8")


def test_kinds_exist_and_the_bundle_is_whole():
    assert {model.kind for model in known_models.MODELS} - {""} <= checkpoints.KINDS.keys() | doctor.ROLES.keys()
    assert all((WEIGHTS / name).is_file() for name in known_models.BUNDLED)
    for model in known_models.MODELS:
        assert model.url.startswith("https://") == bool(model.page) == bool(model.size) == (len(model.sha256) == 64)


def test_each_graph_has_its_verdict(comfyui, capsys):
    code, lines = run(comfyui, capsys=capsys)
    assert code == 1 and lines[-4:] == [
        "ridfr_nano: ready", "ridfr_nano_guided: ready", "ridfr_sd15: obstacles: 1", "ridfr_sd15_tile: ready"]
