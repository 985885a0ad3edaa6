"""`ridfr doctor`: what it finds in a ComfyUI folder made of tiny files."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core import checkpoints, cli, doctor, host, known_models, model_search, packages
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


def test_onnxruntime_is_not_needed_and_a_broken_one_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert not list(doctor.runtimes())
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0" if name == "onnxruntime-gpu" else None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert [finding.state for finding in doctor.runtimes()] == ["note"]


def test_what_the_nodes_import_is_imported(monkeypatch, tmp_path, comfyui, capsys):
    """A package that is there and breaks when it is imported, as OpenCV does where libGL is missing."""
    (tmp_path / "kornia.py").write_text("raise OSError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    code, lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)
    assert code == 1 and lines[-1] == "ridfr_sd15_tile: obstacles: 1"
    assert line_of(lines, "libGL.so.1").startswith("wrong   kornia is installed, but it cannot be imported")


def test_a_missing_package_is_a_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (finding,) = [finding for finding in doctor.packages() if not finding.healthy]
    assert finding.text == f"pyyaml is not installed: run `{sys.executable} -m pip install pyyaml`."
    with pytest.raises(packages.PackageError, match="pip install pyyaml"):
        packages.need("yaml")


def test_a_cpu_onnxruntime_that_hides_the_gpu_build():
    builds = {"onnxruntime": "1.20", "onnxruntime-gpu": "1.19"}
    finding = doctor.shadowed(builds, ["AzureExecutionProvider", "CPUExecutionProvider"])
    assert finding.state == "note" and "pip uninstall onnxruntime" in finding.text and "onnxruntime-gpu" in finding.text
    assert doctor.shadowed(builds, ["CUDAExecutionProvider", "CPUExecutionProvider"]) is None
    assert doctor.shadowed({"onnxruntime": "1.20"}, ["CPUExecutionProvider"]) is None


VERSIONS = {
    "0.18.0": "ok", "0.17.9": "wrong", "1.0.0": "ok", "": "note", "0.30.0rc1": "ok", "v0.30": "ok", "0.30": "ok",
    "1": "ok", "v0.3.64": "wrong", "0.30.0+cu128": "ok", "nightly": "note", "0." + "9" * 9000: "ok", "9" * 9000: "ok",
    "٣.1": "note",
}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version[:12])
def test_comfyuis_version(version):
    finding = doctor.comfyui_version(version)
    assert finding.state == VERSIONS[version] and len(finding.text) < 120


@pytest.mark.parametrize("line, version", [
    ('__version__ = "0.30.0"', "0.30.0"), ("__version__='v0.30'  # pinned", "v0.30"), ('__version__: str = "1"', "1"),
    ("__version__ = read()", ""), ("", ""), ("version = '1'", ""), ('__version__ = "', ""),
])
def test_the_version_is_read_from_its_file(tmp_path, line, version):
    assert host.version_of(tmp_path) == ""
    (tmp_path / "comfyui_version.py").write_text(f"# generated\n{line}\n")
    assert host.version_of(tmp_path) == version
    (tmp_path / "comfyui_version.py").write_bytes(b"\xff\xfe\x00")
    assert host.version_of(tmp_path) == ""


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


def test_broken_yaml_is_named_and_the_verdict_comes(comfyui, capsys):
    (comfyui / "extra_model_paths.yaml").write_text("a: [")
    code, lines = run(comfyui, "ridfr_nano", "ridfr_sd15_tile", capsys=capsys)
    assert code == 1 and "extra_model_paths.yaml" in lines[0]
    assert lines[-2:] == ["ridfr_nano: obstacles: 1", "ridfr_sd15_tile: obstacles: 2"], "CLIP vision is in that YAML"


BOMB = "a: &a {k: 1}\n" + "\n".join(f"{new}: &{new} {{<<: [{', '.join(f'*{old}' for _ in range(9))}], {new}: 1}}"
                                  for old, new in zip("abcdefghijk", "bcdefghijkl"))
MERGES = "a: &a {" + ", ".join(f"k{i}: x" for i in range(2000)) + "}\nb: [" + "{<<: *a}, " * 9000 + "]"
ODD_YAML = [
    "", "- a", "5", "text", "a: 5", "a: text", "a: [b]", "a: {checkpoints: }", "a: {checkpoints: 5}",
    "a: {checkpoints: [b, c]}", "a: {checkpoints: {b: c}}", "a: {base_path: 5}", "a: {base_path: }",
    "a: {base_path: [b]}", "a:\n\tcheckpoints: b", "a: *b", "? [a]\n: b", "a: 2001-99-99", "a: !!int ''",
    "a: !!timestamp x", "a: !!python/name:os.system x", "a: " + "9" * 5000, "[" * 20000, "a: " * 5000,
    "a: {b: " * 20000, "x" * 200_000, BOMB, MERGES, "a: &a {checkpoints: *a}",
]


@pytest.mark.parametrize("text", ODD_YAML, ids=lambda text: text[:20])
def test_odd_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(host.HostError, match=r"extra_model_paths\.yaml can") as refusal:
        host.model_folders(tmp_path)
    assert len(str(refusal.value)) < 600 and "\n" not in str(refusal.value) and time.monotonic() - began < 20


def test_yaml_in_another_encoding_is_one_sentence(tmp_path):
    (tmp_path / "extra_model_paths.yaml").write_bytes("a: {checkpoints: Übung}".encode("latin-1"))
    with pytest.raises(host.HostError, match="cannot be read as YAML"):
        host.model_folders(tmp_path)


@pytest.mark.parametrize("text", ["\ufeffa:\n  checkpoints: extra\n", "a:\n  checkpoints: extra\n  is_default: 'no'\n",
                                  "b:\na:\n  base_path: ''\n  checkpoints: |\n    extra\n\n  5: x\n"])
def test_odd_yaml_that_comfyui_takes(tmp_path, text):
    (tmp_path / "extra_model_paths.yaml").write_text(text, encoding="utf-8")
    assert tmp_path / "extra" in host.model_folders(tmp_path)["checkpoints"]


def test_further_files_of_model_paths(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("a: {checkpoints: one, is_default: yes}\nb: {checkpoints: two}")
    folders = host.model_folders(tmp_path / "none", more=[more])["checkpoints"]
    assert folders == [tmp_path / "one", tmp_path / "none" / "models" / "checkpoints", tmp_path / "two"]


def test_the_readmes_table_is_the_known_models(checkout):
    assert known_models.table() in (checkout / "README.md").read_text(encoding="utf-8")


def test_kinds_exist_and_the_bundle_is_whole():
    assert {model.kind for model in known_models.MODELS} - {""} <= model_search.HOLDS.keys()
    assert model_search.HOMES.keys() <= checkpoints.KINDS.keys()
    assert set(model_search.HOMES.values()) <= set(doctor.SEARCHED)
    assert all((WEIGHTS / name).is_file() for name in known_models.BUNDLED)
    for model in known_models.MODELS:
        assert model.url.startswith("https://") == bool(model.page) == bool(model.size) == (len(model.sha256) == 64)


def test_each_graph_has_its_verdict(comfyui, capsys):
    code, lines = run(comfyui, capsys=capsys)
    assert code == 1 and lines[-4:] == [
        "ridfr_nano: ready", "ridfr_nano_guided: ready", "ridfr_sd15: obstacles: 1", "ridfr_sd15_tile: ready"]


# Files that are not in their place, or not what their name says


def tile(comfyui, capsys):
    """The lines of `ridfr doctor ridfr_sd15_tile`; its verdict is the same as among all graphs."""
    lines = run(comfyui, "ridfr_sd15_tile", capsys=capsys)[1]
    assert lines[-1] == run(comfyui, capsys=capsys)[1][-1]
    return lines


def shaped(*shapes, **named):
    """Tensors by name; keyword: names with __ for dots."""
    return {key: torch.zeros(shape) for key, shape in [*shapes, *((k.replace("__", "."), v) for k, v in named.items())]}


def vision(width, layers):
    blocks = [(f"vision_model.encoder.layers.{i}.layer_norm1.weight", (width,)) for i in range(layers)]
    return shaped(("vision_model.embeddings.class_embedding", (width,)), *blocks)


def checkpoint(width):
    return shaped(("model.diffusion_model.input_blocks.0.0.weight", (1,)),
                  ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (2, width)))


FLUX = shaped(("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (2, 2)))
CONTROLNET = shaped(("control_model.zero_convs.0.0.weight", (1,)), ("input_hint_block.0.weight", (1,)))
LORA = shaped(("lora_unet_x.lora_down.weight", (1,)))


@pytest.mark.parametrize("weights, words", [
    (vision(1024, 24), "CLIP Vision): ViT-L, but ViT-H is needed"), (vision(1664, 48), "ViT-bigG, but ViT-H is needed"),
    (vision(1152, 27), "1152 wide, with 27 layers, but ViT-H is needed"), (vision(1280, 31), "with 31 layers"),
    (checkpoint(768), "holds a Stable Diffusion checkpoint"), (shaped(("text_model.x", (1,))), "nothing this pack"),
])
def test_a_wrong_clip_vision_file(comfyui, capsys, weights, words):
    path = comfyui / "shared" / "vision" / known_models.CLIP_VISION.path
    save_file(weights, path)
    line = line_of(lines := tile(comfyui, capsys), path.name)
    assert line.startswith("wrong") and words in line and lines[-1].endswith("obstacles: 1")
    save_file(vision(1280, 32), path)
    assert line_of(tile(comfyui, capsys), path.name).startswith("ok")


@pytest.mark.parametrize("model, weights, name", [
    (known_models.SD15, checkpoint(768), "mine/realistic.safetensors"),
    (known_models.CLIP_VISION, vision(1280, 32), "model.safetensors"),
    (known_models.TILE, CONTROLNET, "control_v11f1e_sd15_tile.pth"),
    (known_models.ADAPTER, {name: torch.zeros(1) for name in KEYS["identity-adapter"]}, "a.safetensors"),
    (known_models.SWINIR, shaped(("conv_first.weight", (1,))), "4x_other.pth"),
])
def test_another_file_that_will_do_is_found(comfyui, capsys, model, weights, name):
    for path in comfyui.rglob(model.name):
        path.unlink()
    path = comfyui / "models" / model.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)
    lines = tile(comfyui, capsys)
    line = line_of(lines, str(path))
    assert line.startswith(f"ok      {path}, choose {name} in the graph") and lines[-1] == "ridfr_sd15_tile: ready"


@pytest.mark.parametrize("model, weights, name", [
    (known_models.SD15, checkpoint(2048), "sdxl.safetensors"), (known_models.SD15, FLUX, "flux.safetensors"),
    (known_models.CLIP_VISION, vision(1024, 24), "model.safetensors"),
    (known_models.TILE, CONTROLNET, "canny.safetensors"),
    (known_models.ADAPTER, shaped(("ip_adapter.1.to_k_ip.weight", (2, 2048)), ("image_proj.latents", (1,))), "x.bin"),
])
def test_another_file_that_will_not_do_is_not_taken(comfyui, capsys, model, weights, name):
    for path in comfyui.rglob(model.name):
        path.unlink()
    save_file(weights, comfyui / "models" / model.folder / name) if model.folder != "clip_vision" else None
    lines = tile(comfyui, capsys)
    assert line_of(lines, model.name).startswith("missing") and lines[-1].endswith("obstacles: 1")


def test_a_converted_adapter_will_do(comfyui, capsys):
    path = comfyui / "models" / "ipadapter" / known_models.ADAPTER.path
    cli.main(["convert", str(path)])
    capsys.readouterr()
    path.unlink()
    assert line_of(tile(comfyui, capsys), path.stem).startswith("ok")


@pytest.mark.parametrize("model, place", [
    (known_models.ADAPTER, "loras/adapter.bin"), (known_models.ADAPTER, "controlnet/" + known_models.ADAPTER.name),
    (known_models.SD15, "loras/realistic.safetensors"), (known_models.TILE, "checkpoints/tile.safetensors"),
    (known_models.DETECTOR, "insightface/buffalo_l/det_10g.onnx"),
    (known_models.RECOGNISER, "insightface/w600k_r50.onnx"),
])
def test_a_misplaced_file_is_found_and_where_it_belongs_is_said(comfyui, capsys, model, place):
    right, wrong = comfyui / "models" / model.folder / model.path, comfyui / "models" / place
    wrong.parent.mkdir(parents=True, exist_ok=True)
    right.rename(wrong)
    lines = tile(comfyui, capsys)
    assert lines[-1].endswith("obstacles: 1") and not [line for line in lines if line.startswith("missing")]
    line = line_of(lines, f"{wrong} ")
    assert line == f"wrong   {wrong} lies in the wrong folder ({model.purpose}): move it to {right.parent}"


def test_a_face_model_of_another_folder_will_do(comfyui, capsys):
    packs = comfyui / "models" / "insightface" / "models"
    (packs / "buffalo_l").rename(packs / "mine")
    lines = tile(comfyui, capsys)
    assert lines[-1].endswith("ready") and "choose mine in the graph" in line_of(lines, "w600k_r50.onnx")


def test_a_pack_is_known_by_what_its_files_hold(comfyui, capsys):
    pack = comfyui / "models" / "insightface" / "models" / "buffalo_l"
    (pack / "det_10g.onnx").rename(pack / "d.onnx")
    (pack / "w600k_r50.onnx").rename(pack / "r.onnx")
    assert tile(comfyui, capsys)[-1].endswith("ready"), "the loader goes by what they hold, too"


def test_a_lora_among_the_adapters(comfyui, capsys):
    folder = comfyui / "models" / "ipadapter"
    beside = folder / "ip-adapter-faceid-plusv2_sd15_lora.safetensors"
    save_file(LORA, beside)
    assert str(beside) not in "\n".join(tile(comfyui, capsys)), "its loader looks for it there"
    (folder / known_models.ADAPTER.path).unlink()
    lines = tile(comfyui, capsys)
    assert line_of(lines, str(beside)) == f"note    {beside} holds a LoRA (for the node Load LoRA): move it to " \
                                          f"{comfyui / 'models' / 'loras'}"
    assert line_of(lines, known_models.ADAPTER.name).startswith("missing")


def test_an_empty_file_is_damaged(comfyui, capsys):
    models = comfyui / "models"
    paths = [models / model.folder / model.path for model in (known_models.DETECTOR, known_models.SD15)]
    for path in paths:
        path.write_bytes(b"")
    lines = tile(comfyui, capsys)
    assert lines[-1].endswith("obstacles: 2")
    assert all(line_of(lines, f"{path}: ").endswith("is empty (0 bytes): download it again.") for path in paths)


def test_a_broken_optional_file_keeps_no_graph_from_running(comfyui, capsys):
    path = comfyui / "models" / "upscale_models" / known_models.SWINIR.path
    path.parent.mkdir(parents=True)
    for content in (b"", b"PK broken", b"<html>"):
        path.write_bytes(content)
        lines = tile(comfyui, capsys)
        assert line_of(lines, str(path)).startswith("note") and lines[-1] == "ridfr_sd15_tile: ready"
        assert run(comfyui, capsys=capsys)[1][-4] == "ridfr_nano: ready"


@pytest.mark.parametrize("content", [None, [], {"state_dict": None}, {"state_dict": [1]}, torch.zeros(1), {"a": {}}],
                         ids=str)
@pytest.mark.parametrize("model", [known_models.ADAPTER, known_models.SD15], ids=lambda model: model.folder)
def test_strange_content_is_a_finding(comfyui, capsys, model, content):
    path = comfyui / "models" / model.folder / model.path
    torch.save(content, path)
    lines = tile(comfyui, capsys)
    assert line_of(lines, str(path)).startswith("wrong") and lines[-1].endswith("obstacles: 1")


def test_code_in_a_pickle_does_not_run(comfyui, capsys, tmp_path):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = comfyui / "models" / "ipadapter" / known_models.ADAPTER.path
    path.unlink()
    path.with_name("evil.bin").write_bytes(pickle.dumps(Code()))
    assert tile(comfyui, capsys)[-1].endswith("obstacles: 1") and not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there, and there are no pipes in folders")
def test_links_in_a_circle_and_what_is_not_a_file(comfyui, capsys):
    folder = comfyui / "models" / "checkpoints"
    for name in ("one", "two"):
        (folder / name).symlink_to(folder, target_is_directory=True)
    (folder / known_models.SD15.path).unlink()
    os.mkfifo(folder / known_models.SD15.path)
    (folder / "folder.safetensors").mkdir()
    began = time.monotonic()
    assert line_of(tile(comfyui, capsys), known_models.SD15.name).startswith("missing")
    assert time.monotonic() - began < 20


@pytest.mark.skipif(sys.platform != "linux", reason="only there a file's name may be any bytes")
def test_a_file_name_that_is_no_text(comfyui, checkout):
    folder = comfyui / "models" / "checkpoints"
    odd = os.path.join(os.fsencode(folder), b"\xff \xe2\x86\x91")
    os.mkdir(odd)
    os.rename(folder / known_models.SD15.path, os.path.join(odd, os.fsencode(known_models.SD15.path)))
    done = subprocess.run([sys.executable, "-m", "ridfr_core.cli", "doctor", "--comfyui", comfyui, "ridfr_sd15_tile"],
                          cwd=checkout, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    lines = done.stdout.decode().splitlines()
    assert lines[-1].startswith("ridfr_sd15_tile: ") and "\\udcff ↑" in line_of(lines, known_models.SD15.name)


def test_a_graphics_card_that_fails_is_a_finding(monkeypatch):
    def fail():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    (finding,) = [finding for finding in doctor.packages() if not finding.healthy]
    assert "cannot use the graphics card (CUDA driver" in finding.text


@pytest.mark.skipif(sys.platform == "win32", reason="limits of memory are POSIX's")
def test_gigabytes_are_not_read(comfyui, checkout):
    """Four files of 4 GB, with holes, in a process of a few hundred megabytes more than it needs for torch."""
    folder = comfyui / "models" / "checkpoints"
    (folder / known_models.SD15.path).unlink()
    header = json.dumps({"model.diffusion_model.input_blocks.0.0.weight":
                         {"dtype": "F16", "shape": [2 * 10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    starts = {"a.safetensors": struct.pack("<Q", len(header)) + header, "old.ckpt": pickle.dumps({"a": 1}),
              "page.ckpt": b"<html>", "cut.ckpt": b"PK\x03\x04"}
    for name, start in starts.items():
        with open(folder / name, "wb") as file:
            file.write(start)
            file.truncate(4 * 10**9 + (len(start) if name == "a.safetensors" else 0))
    program = """
import resource, sys
from ridfr_core import doctor, host, known_models
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(doctor.model_file(known_models.SD15, host.model_folders(host.Path(sys.argv[1])), False))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (1024 if sys.platform == "linux" else 1024**2))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, comfyui], cwd=checkout, capture_output=True, text=True)
    finding, megabytes = done.stdout.splitlines()
    assert finding.startswith("ok") and "a.safetensors" in finding
    assert int(megabytes) < 200 and time.monotonic() - began < 60
