"""Pairs of the same model in diffusers and in ComfyUI."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core.layouts import unet_to_ldm

from .reference import SCHEDULE, SD15, SDXL, Pair, Photos, Size, comfy_model, diffusers_unet, faceid_plus


@pytest.fixture(scope="module")
def pair(nodes, tmp_path_factory) -> Callable[[Size], Pair]:
    """pair(size) -> a Pair; the adapter goes through a file into both."""
    import folder_paths
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler

    folder = tmp_path_factory.mktemp("ipadapter")
    folder_paths.add_model_folder_path("ipadapter", str(folder))

    def pair(size: Size) -> Pair:
        unet = diffusers_unet(size)
        weights = unet_to_ldm(unet.state_dict())
        name = f"ip-adapter-faceid-plusv2_{size.base.lower()}.bin"
        torch.save(faceid_plus(unet, size), folder / name)
        adapter = replace(nodes["RIDFR_LoadIdentityAdapter"].execute(name, "auto")[0], recogniser=None)  # not nano's
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor"))
        scheduler = UniPCMultistepScheduler(**SCHEDULE)
        if size.base == "SDXL":
            more = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
            pipe = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **parts, **more)
        else:
            pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler, **parts, safety_checker=None)
        pipe.load_ip_adapter(str(folder), subfolder="", weight_name=name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(1.0)
        pipe.set_progress_bar_config(disable=True)
        return Pair(size, weights, Photos.random(size), pipe, comfy_model(weights, size), adapter)

    return pair


@pytest.fixture(scope="module")
def sd15(pair) -> Pair:
    return pair(SD15)


@pytest.fixture(scope="module")
def sdxl(pair) -> Pair:
    return pair(SDXL)


@pytest.fixture(scope="module")
def apply(pack) -> Callable:
    """apply(pair, model) -> MODEL with the pair's people, as Apply Identity gives it."""

    def apply(pair: Pair, model=None, strength=1.0, lora_strength=1.0):
        identity = pair.photos.identity(pack.ridfr_core.identity)
        node = pack.nodes.apply_identity.ApplyIdentity
        return node.execute(
            model or pair.model, pair.adapter, identity, strength, 0.0, 1.0, lora_strength=lora_strength
        )[0]

    return apply


@pytest.fixture(scope="module")
def load_content(nodes, tmp_path_factory) -> Callable:
    """load_content(net) -> CONTROL_NET of a diffusers ControlNetModel, through a file."""
    import folder_paths

    folder = tmp_path_factory.mktemp("controlnet")
    folder_paths.add_model_folder_path("controlnet", str(folder))

    def load(net):
        save_file(net.state_dict(), folder / "content.safetensors")
        return nodes["RIDFR_LoadContentControlNet"].execute("content.safetensors")[0]

    return load
