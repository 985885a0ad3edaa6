"""Nano weight files with random weights: the layout of the shipped ones, for tests that need no trained network."""

import json
import sys
from pathlib import Path

import numpy
import onnx
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ridfr_core.adapter import IdentityAdapter
from ridfr_core.content import ContentSpec, controlnet_to_ldm
from ridfr_core.faces import ARCFACE_TEMPLATE
from ridfr_core.layouts import unet_to_ldm, vae_to_ldm
from ridfr_core.nano import config
from ridfr_core.training import recogniser


def write(folder: Path, seed: int = 0) -> None:
    """All files of ridfr_core/nano/weights; its detectors find one face in the middle of any 128-pixel picture."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save(checkpoint(), folder / "checkpoint.safetensors")
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.CLIP_VISION))
    save(vision.state_dict(), folder / "clip_vision.safetensors")
    (folder / "clip_vision.json").write_text(json.dumps({"model_type": "clip_vision_model", **config.CLIP_VISION}))
    save(
        IdentityAdapter(channels(), config.CONTEXT, config.CLIP_VISION["hidden_size"]).state_dict(),
        folder / "identity_adapter.safetensors",
    )
    save(content_controlnet(), folder / "content_controlnet.safetensors", ContentSpec(base="nano").to_metadata())
    for name, recogniser_file in (("nano", "rec_nano.onnx"), ("nano_judge", "rec_judge.onnx")):
        pack = folder / "insightface" / "models" / name
        recogniser.export_onnx(recogniser.iresnet((1, 1, 1, 1), (8, 8, 8, 8)), pack / recogniser_file)
        onnx.save(centred_face(), str(pack / "det_nano.onnx"))


def centred_face() -> onnx.ModelProto:
    """SCRFD's nine outputs as constants for a 128-pixel input: one face of 80 pixels at (64, 64)."""
    outputs = []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            values = numpy.zeros((2 * (128 // stride) ** 2, width), numpy.float32)
            if stride == 16:  # the first of the two anchors in row 4, column 4 lies at (64, 64)
                landmarks = (ARCFACE_TEMPLATE - 56) / 112 * 80 / stride
                values[2 * (4 * 8 + 4)] = {"score": 0.9, "bbox": 40 / stride, "kps": landmarks.flatten()}[kind]
            outputs.append((f"{kind}_{stride}", values))
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(values))
        for name, values in outputs
    ]
    image = onnx.helper.make_tensor_value_info("input.1", onnx.TensorProto.FLOAT, [1, 3, "H", "W"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, v.shape) for name, v in outputs]
    graph = onnx.helper.make_graph(nodes, "centred_face", [image], values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8)


def checkpoint() -> dict:
    parts = {
        "model.diffusion_model.": unet_to_ldm(UNet2DConditionModel(**config.UNET).state_dict()),
        "first_stage_model.": vae_to_ldm(AutoencoderKL(**config.VAE).state_dict()),
        "cond_stage_model.transformer.text_model.final_layer_norm.": {
            "weight": torch.zeros(config.CONTEXT),
            "bias": torch.randn(config.CONTEXT),
        },
    }
    return {prefix + key: weight for prefix, state in parts.items() for key, weight in state.items()}


def content_controlnet() -> dict:
    unet = UNet2DConditionModel(**config.UNET)
    net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    net.conv_in = torch.nn.Conv2d(7, net.conv_in.out_channels, 3, padding=1)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            torch.nn.init.normal_(parameter, std=0.05)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("controlnet_cond_embedding")}
    return controlnet_to_ldm(state)


def channels() -> tuple[int, ...]:
    """Widths of SD1.5's 16 cross-attention layers at nano width, in checkpoint order: down, up, mid."""
    one, two, three, four = config.UNET["block_out_channels"]
    return (one, one, two, two, three, three) + (three,) * 3 + (two,) * 3 + (one,) * 3 + (four,)


def save(state: dict, path: Path, metadata: dict | None = None) -> None:
    save_file({key: weight.detach().contiguous().clone() for key, weight in state.items()}, path, metadata)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
