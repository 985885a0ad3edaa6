"""Nodes that load models. None of them runs a network."""

import re
from pathlib import Path

import comfy.ops
from comfy_api.latest import io
from server import PromptServer

from ..ridfr_core import checkpoints
from ..ridfr_core.adapter import IdentityAdapter
from ..ridfr_core.content import CHOICES, understand
from ..ridfr_core.face_model import digest_of, face_model_files, load_face_model
from ..ridfr_core.nano.config import CONTEXT
from . import nano, paths, types
from .adapter_lora import find_lora, lora_path
from .checks import checked
from .content_control import NAMES, content_control
from .managed import ManagedAdapter, ManagedFaceModel, eager, managed

AUTO = "auto"
PLUS_V2 = "plus v2"
RGB = "RGB (as insightface)"
BGR = "BGR (as FaceMe's code)"


class LoadNanoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LoadNanoModels",
            display_name="Load Nano Models",
            category=types.CATEGORY,
            description="Loads the small practice models that come with this pack: no download, no graphics card. They "
            "know drawn portraits of 128x128 pixels only, and text prompts mean nothing to them. For real "
            "photos use a checkpoint loader and the real models instead.",
            search_aliases=["nano checkpoint", "embedded models", "demo models", "tiny model"],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The network that removes noise; goes to the sampler."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder. Leave prompts empty with nano models."),
                io.Vae.Output(display_name="vae", tooltip="Turns pictures into latents and back."),
                io.ClipVision.Output(
                    display_name="clip_vision", tooltip="Describes a reference photo for Extract Identity."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*nano.load_checkpoint(), nano.load_clip_vision())


class LoadFaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LoadFaceModel",
            display_name="Load Face Model",
            category=types.CATEGORY,
            description="Loads the models that find a face and recognise whose it is: an insightface folder such as "
            "buffalo_l or antelopev2 in models/insightface/models. 'nano' comes with this pack and knows "
            "drawn portraits only. The node shows what was loaded and what it is for.",
            search_aliases=["insightface", "arcface", "face detection", "face recognition", "antelopev2", "buffalo_l"],
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=paths.face_models(),
                    default=paths.face_models()[0],
                    display_name="face model",
                    tooltip="The folder to load. Use the same one that the identity adapter was made for: "
                    "buffalo_l for FaceID adapters. 'nano' is for drawn portraits, and 'nano_judge' only judges them.",
                ),
                io.Combo.Input(
                    "colour_order",
                    options=[RGB, BGR],
                    default=RGB,
                    optional=True,
                    display_name="colour order",
                    tooltip="How the recogniser sees colours. RGB is right for FaceID adapters and for comparing "
                    "faces. FaceMe's published weights were trained with red and blue swapped, so they want BGR. "
                    "Identities made with different orders don't mix.",
                ),
            ],
            outputs=[
                types.FaceModel.Output(
                    display_name="face_model", tooltip="Goes to Extract Identity and Compare Identity."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, pack: str, colour_order: str = RGB) -> str:
        return paths.fingerprint(*face_model_files(paths.face_model_folder(pack)))

    @classmethod
    @checked
    def execute(cls, pack: str, colour_order: str = RGB) -> io.NodeOutput:
        model = load_face_model(paths.face_model_folder(pack), bgr=colour_order == BGR)
        PromptServer.instance.send_progress_text(model.describe(), cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(ManagedFaceModel.of(model))


class LoadIdentityAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LoadIdentityAdapter",
            display_name="Load Identity Adapter",
            category=types.CATEGORY,
            description="Loads an adapter from models/ipadapter: the network that tells the diffusion model whose face "
            "to draw. It may be a FaceID, FaceID Plus, FaceID PlusV2 or plus-face adapter. The LoRA of a FaceID "
            "adapter is taken from its file, or from the file of the same name with _lora.safetensors at its end, in "
            "the same folder or in models/loras.",
            search_aliases=["ip-adapter faceid", "ipadapter", "faceid plusv2", "plus-face", "identity model"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.model_files("ipadapter"),
                    display_name="adapter file",
                    tooltip="The adapter must be made for the same family as the model: SD1.5 or SDXL. "
                    "'nano' goes with the nano models.",
                ),
                io.Combo.Input(
                    "version",
                    options=[AUTO, PLUS_V2, "plus"],
                    default=AUTO,
                    tooltip="FaceID Plus and PlusV2 files look alike inside. 'auto' goes by the file's name "
                    "and takes PlusV2 in doubt; choose one if you know better. The node shows what was taken.",
                ),
            ],
            outputs=[types.IdentityAdapter.Output(display_name="adapter", tooltip="Goes to Apply Identity.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, version: str) -> str:
        path = paths.model_file("ipadapter", file)
        return paths.fingerprint(path, *filter(None, [lora_path(path)]))

    @classmethod
    @checked
    def execute(cls, file: str, version: str) -> io.NodeOutput:
        path = paths.model_file("ipadapter", file)
        state, metadata = checkpoints.read(path)
        checkpoints.expect(state, "identity-adapter", path.name)
        adapter = IdentityAdapter.from_state_dict(state, eager(comfy.ops.manual_cast), path.name, keep_dtype=True)
        lora, where = find_lora(path, state)
        loaded = ManagedAdapter(
            path.name,
            adapter,
            version == PLUS_V2 or version == AUTO and is_plus_v2(path, metadata),
            managed(adapter),
            lora,
            raw="unnorm" in path.stem.lower(),
            recogniser=metadata.get("ridfr.recogniser") or recogniser_of(adapter),
        )
        lacking = "none, and it needs none" if file == paths.NANO else where
        told = f"{describe(loaded)}; its LoRA: {where if lora else lacking}"
        PromptServer.instance.send_progress_text(told, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(loaded)


def recogniser_of(adapter: IdentityAdapter) -> str | None:
    """FaceModel.digest of nano's recogniser for an adapter of nano's width; of others, tensors don't tell it."""
    return digest_of(paths.own_recognisers()[0]) if adapter.dim == CONTEXT else None


def is_plus_v2(path: Path, metadata: dict[str, str]) -> bool:
    """Of a FaceID Plus adapter, by what `ridfr train` has written, else by the file's name: V1 is called that only."""
    if said := metadata.get("ridfr.shortcut"):
        return said == "True"
    name = re.sub(r"[^a-z0-9]", "", path.stem.lower())
    return "faceidplus" not in name or "v2" in name


def describe(loaded: ManagedAdapter) -> str:
    """What was understood of an adapter's file."""
    adapter = loaded.adapter
    version = "V2" if adapter.kind == "FaceID Plus" and loaded.shortcut else ""
    embeddings = ", for raw face embeddings" if loaded.raw else ""
    return f"{adapter.kind}{version} for {adapter.base} with prompts of width {adapter.dim}{embeddings}"


class LoadContentControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RIDFR_LoadContentControlNet",
            display_name="Load Content ControlNet",
            category=types.CATEGORY,
            description="Loads the ControlNet that keeps pose, expression and light of the degraded face: RIDFR's, "
            "DiffBIR's (version 1) or FaceMe's. Apply it with the stock 'Apply ControlNet' node; its image is the "
            "degraded face itself. One that reads latents, such as DiffBIR's, needs the VAE there, too.",
            search_aliases=["ridfr controlnet", "diffbir", "faceme", "lq controlnet", "face restore"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.model_files("controlnet"),
                    display_name="ControlNet file",
                    tooltip="A content ControlNet in models/controlnet. Others, such as canny or depth, are loaded by "
                    "the stock loader. 'nano' goes with the nano models.",
                ),
                spec_input(
                    "value_range",
                    "value range",
                    "The numbers for black and white that the ControlNet was trained with. 'auto' takes what the file "
                    "says, else -1..1. FaceMe's file says nothing: choose -1..1 for it. One that reads "
                    "latents, as DiffBIR's, takes them as they are.",
                ),
                spec_input(
                    "kernel",
                    "resizing",
                    "How the degraded face is resized for the ControlNet. 'auto' takes what the file says, else "
                    "bicubic.",
                ),
                spec_input(
                    "order",
                    "order",
                    "What comes first in the ControlNet's input: the noisy picture (z) or the degraded face (lq). "
                    "'auto' takes what the file says, else z first. FaceMe's has no order.",
                ),
                spec_input(
                    "base",
                    "made for",
                    "The family of the diffusion model. 'auto' takes what the file says, else what its tensors show; "
                    "nano's look like SD1.5's.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="control_net", tooltip="Goes to the stock Apply ControlNet node.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **choices: str) -> str:
        return paths.fingerprint(paths.model_file("controlnet", file))

    @classmethod
    @checked
    def execute(
        cls, file: str, value_range: str = AUTO, kernel: str = AUTO, order: str = AUTO, base: str = AUTO
    ) -> io.NodeOutput:
        path = paths.model_file("controlnet", file)
        state, metadata = checkpoints.read(path)
        chosen = {"value_range": value_range, "kernel": kernel, "order": order, "base": base}
        chosen = {name: value for name, value in chosen.items() if value != AUTO}
        state, spec = understand(state, metadata, path.name, chosen)
        known = (NAMES[spec.base], spec.kind, spec.value_range, spec.kernel, spec.order)
        text = f"for {', '.join(known)}; training: {checkpoints.brief(metadata.get('ridfr.stage', 'not said'))}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)  # shown on the node
        return io.NodeOutput(content_control(state, spec, path.name))


def spec_input(name: str, label: str, tooltip: str) -> io.Combo.Input:
    """A choice that a content ControlNet's file leaves open."""
    options = [AUTO, *CHOICES[name]]
    return io.Combo.Input(name, options=options, default=AUTO, optional=True, display_name=label, tooltip=tooltip)
