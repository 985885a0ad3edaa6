"""RIDFR Doctor in a real server, and the model folders as ComfyUI itself sees them."""

import importlib.util

import pytest

from ridfr_core import host, known_models
from tools.server import Client, PromptError

EXTRA = """
plain:
  checkpoints: here/checkpoints
  controlnet: |
    here/one
    here/two
based:
  base_path: store
  is_default: true
  clip_vision: vision
  ipadapter: adapters
empty:
"""


@pytest.fixture(params=["server", "oldest_server"])
def any_server(request):
    return request.getfixturevalue(request.param)


def test_the_node_reports_what_is_missing(any_server):
    doctor = {"class_type": "RIDFR_Doctor", "inputs": {"graph": "ridfr_sd15_tile", "hashes": True}}
    with Client(any_server.url) as client:
        text = client.run({"1": doctor})["outputs"]["1"]["text"][0]
        missing = any_server.base / "models" / "insightface" / known_models.RECOGNISER.path
        assert f"missing {missing}" in text and "non-commercial research only" in text
        assert text.endswith("ridfr_sd15_tile: obstacles: 6")
        missing.parent.mkdir(parents=True)
        missing.write_bytes(b"not a model")
        again = client.run({"1": doctor})["outputs"]["1"]["text"][0]  # the same prompt: the answer must not be cached
        assert f"wrong   {missing}" in again and "download it again" in again
        missing.unlink()


def test_a_graph_that_is_not_shipped_is_refused(client):
    with pytest.raises(PromptError, match="not in list"):
        client.run({"1": {"class_type": "RIDFR_Doctor", "inputs": {"graph": "x", "hashes": False}}})


ODD = [
    EXTRA, "", "[]", "''", "- a", "5", "text", "a: 5", "a: text", "a: ''", "a: []", "a: {}", "a: [b]",
    "a: {checkpoints: }",
    "a: {checkpoints: 5}", "a: {checkpoints: [b]}", "a: {base_path: 5}", "a: {base_path: , checkpoints: b}",
    "a: {base_path: '', checkpoints: b}", "a: {base_path: ~, checkpoints: b}", "a: {base_path: '~/x', checkpoints: b}",
    "a: {base_path: /x, checkpoints: ../b}", "a: {base_path: $HOME, checkpoints: /b}", "a: {checkpoints: '~/b'}",
    "a: {checkpoints: b, is_default: 'no'}", "a: {checkpoints: b}\nc: {checkpoints: b, is_default: true}",
    "a: {checkpoints: b}\nc: {checkpoints: b}", "a: {checkpoints: ' b '}", "a:\n\tcheckpoints: b",
    "\ufeffa: {checkpoints: b}",
    "a: {clip_vision: b, 5: c, odd: d}", "a: [", "a: *b", "a: 2001-99-99", "a: &a {checkpoints: *a}", "[" * 20000,
    "a: &a {checkpoints: b}\nc: {<<: *a, clip_vision: d}",
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:30])
def test_extra_model_paths_are_read_as_comfyui_reads_them(comfy, tmp_path, monkeypatch, text):
    import comfy.cli_args  # noqa: F401
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    for name in known_models.FOLDERS:
        folder_paths.add_model_folder_path(name, str(tmp_path / "models" / name))
    folder_paths.add_model_folder_path("controlnet", str(tmp_path / "models" / "t2i_adapter"))
    file = tmp_path / "extra_model_paths.yaml"
    file.write_text(text, encoding="utf-8")
    loader = f"{folder_paths.__file__.rpartition('/')[0]}/utils/extra_config.py"
    spec = importlib.util.spec_from_file_location("extra_config", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.load_extra_path_config(str(file))
    except Exception:
        with pytest.raises(host.HostError):
            host.model_folders(tmp_path)
        return
    ours = host.model_folders(tmp_path)
    del ours["output"]
    assert {name: [str(path) for path in paths] for name, paths in ours.items()} == {
        name: folder_paths.get_folder_paths(name) for name in ours
    }
