"""An adapter's LoRA in ComfyUI's model, in this process."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ridfr_core.layouts import unet_to_ldm
from tests.test_adapter import meta_unet, published

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize(("base", "layers"), [("SD1.5", 128), ("SDXL", 560)])
def test_inside_the_bin_is_as_in_the_published_lora_file(pack, comfy, base, layers):
    """ComfyUI finds every layer of both, and the same for both."""
    from comfy.lora import load_lora, model_lora_keys_unet
    from comfy.model_detection import detect_unet_config

    unet = meta_unet(base)
    inside = published(unet, lora=True)
    file = {
        f"unet.{name}.to_{key}_lora.{side}.weight": inside[f"ip_adapter.{n}.to_{key}_lora.{side}.weight"]
        for n, name in enumerate(unet.attn_processors)
        for key in ("q", "k", "v", "out")
        for side in ("down", "up")
    }
    weights = unet_to_ldm(unet.state_dict())
    model = SimpleNamespace(
        model_config=SimpleNamespace(unet_config=detect_unet_config(weights, "")),
        state_dict=lambda: {f"diffusion_model.{key}": weight for key, weight in weights.items()},
    )
    places = model_lora_keys_unet(model, {})
    theirs, ours = load_lora(file, places), load_lora(pack.ridfr_core.adapter.lora_of(inside), places)
    assert len(theirs) == layers and ours.keys() == theirs.keys()
    for place, patch in theirs.items():
        assert all(a is b for a, b in zip(ours[place].weights[:2], patch.weights[:2], strict=True)), place


@pytest.fixture
def lora(nano):
    """A LoRA for all attention of the nano model: place -> (down, up)."""
    g = torch.Generator().manual_seed(0)
    kinds = tuple(f".attn{i}.to_{name}.weight" for i in (1, 2) for name in ("q", "k", "v", "out.0"))
    state = {key: weight for key, weight in nano.model.model.state_dict().items() if key.endswith(kinds)}
    return {
        key: (torch.randn(3, weight.shape[1], generator=g), torch.randn(weight.shape[0], 3, generator=g))
        for key, weight in state.items()
    }


def flat(lora):
    """Under ComfyUI's names."""
    named = {}
    for key, (down, up) in lora.items():
        module = key.removesuffix(".weight")
        named |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return named


@pytest.fixture
def with_lora(pack, adapter):
    def with_lora(model, lora, strength):
        return pack.nodes.adapter_lora.with_lora(model, replace(adapter, lora=lora), strength)

    return with_lora


def test_weights_change_by_strength_times_up_times_down(nano, with_lora, lora):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    before = {key: weight.clone() for key, weight in nano.model.model.state_dict().items() if key in lora}
    model = with_lora(nano.model, flat(lora), 0.5)
    model = with_lora(model, flat(lora), 0.9)  # the second time is none
    comfy.model_management.load_models_gpu([model])
    after = model.model.state_dict()
    for key, (down, up) in lora.items():
        torch.testing.assert_close(after[key].float(), before[key].float() + 0.5 * up @ down, rtol=1e-3, atol=1e-3)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(nano.model.model.state_dict()[key], before[key]) for key in before)


def test_what_a_lora_loader_has_added_is_not_added_again(nano, with_lora, lora, pack, adapter):
    """From the same file in half precision; another LoRA of the same name is added."""
    from comfy.sd import load_lora_for_models

    half = {key: weight.half() for key, weight in flat(lora).items()}
    loaded, _ = load_lora_for_models(nano.model, None, half, 0.6, 0.0)
    notes = []
    ours = replace(adapter, lora=flat(lora))
    assert pack.nodes.adapter_lora.with_lora(loaded, ours, 1.0, notes) is loaded
    assert "is in the model already, with strength 0.6: it is not added again" in notes[0]
    other = {key: weight + 0.5 for key, weight in flat(lora).items()}
    both = with_lora(loaded, other, 0.9)
    assert {len(patches) for patches in both.patches.values()} == {2}
    again = with_lora(both, flat(lora), 1.0)
    assert again is both and with_lora(both, other, 1.0) is both


@pytest.mark.parametrize("change", ["half", "rank", "shape", "flat"])
def test_a_lora_that_does_not_fit_is_refused(nano, with_lora, lora, change):
    key, (down, up) = next(iter(lora.items()))
    wrong = {"rank": (down[:2], up), "shape": (down[:, 1:], up), "flat": (down.flatten(), up)}
    odd = flat(lora | ({key: wrong[change]} if change in wrong else {}))
    if change == "half":
        del odd[f"{key.removesuffix('.weight')}.lora_down.weight"]
    sentence = "lacks .*lora_down" if change == "half" else "128 layers but only 127 of them"
    with pytest.raises(ValueError, match=sentence):
        with_lora(nano.model, odd, 1.0)


def test_no_lora_or_no_strength_is_the_model_itself(nano, with_lora, lora):
    assert with_lora(nano.model, {}, 1.0) is nano.model
    assert with_lora(nano.model, flat(lora), 0.0) is nano.model
    assert with_lora(nano.model, flat(lora), 1.0) is not nano.model


def test_a_lora_for_another_model_is_refused(nano, with_lora, lora):
    foreign = {f"unet.down_blocks.7.{key}": weight for key, weight in flat(lora).items()}
    with pytest.raises(ValueError, match=r"The LoRA of .* changes 128 layers but only 0 of them are in this model"):
        with_lora(nano.model, foreign, 1.0)


@pytest.mark.parametrize("place", ["inside", "beside", "loras", "nowhere"])
def test_where_the_lora_is_found(nodes, pack, weights, tmp_path, monkeypatch, shown, place):
    import folder_paths

    state = load_file(weights / "identity_adapter.safetensors")
    own = {f"ip_adapter.{n}.to_q_lora.{side}.weight": torch.zeros(1, 1) for n in range(32) for side in ("down", "up")}
    torch.save(state | (own if place == "inside" else {}), tmp_path / f"{place}.bin")
    (tmp_path / "loras" / "ipadapter").mkdir(parents=True)
    folder_paths.add_model_folder_path("loras", str(tmp_path / "loras"))
    folders = {"beside": tmp_path, "loras": tmp_path / "loras" / "ipadapter"}
    if place in folders:
        lora = {"unet.mid_block.attn1.processor.to_q_lora.down.weight": torch.ones(2, 2)}
        save_file(lora, folders[place] / f"{place}_lora.safetensors")
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)
    found = nodes["RIDFR_LoadIdentityAdapter"].execute(f"{place}.bin", "auto")[0].lora
    assert len(found) == {"inside": 64, "nowhere": 0}.get(place, 1)
    where = {"inside": "in the file", "nowhere": "none found"}.get(place, f"{place}_lora.safetensors")
    assert shown["RIDFR_LoadIdentityAdapter"].endswith(f"its LoRA: {where}")


def test_another_file_in_the_loras_place_is_refused(nodes, pack, weights, tmp_path, monkeypatch):
    torch.save(load_file(weights / "identity_adapter.safetensors"), tmp_path / "face.bin")
    save_file({"something": torch.zeros(1)}, tmp_path / "face_lora.safetensors")
    monkeypatch.setattr(pack.nodes.paths, "model_file", lambda kind, name: tmp_path / name)
    with pytest.raises(ValueError, match="'face_lora.safetensors' holds nothing this pack knows, .* needs a LoRA"):
        nodes["RIDFR_LoadIdentityAdapter"].execute("face.bin", "auto")
