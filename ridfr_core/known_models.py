"""The model files that the shipped graphs use: the one table behind `ridfr doctor`, README's and the graphs' links.

Sizes and SHA-256 are those of the files as published (Hugging Face's LFS metadata, insightface's release), as several
public projects that verify them record them.
"""

from dataclasses import dataclass

HUGGING_FACE = "https://huggingface.co/"
INSIGHTFACE = "https://github.com/deepinsight/insightface/releases/tag/v0.7"
BUFFALO = HUGGING_FACE + "public-data/insightface/resolve/main/models/buffalo_l/"  # the release's archive, unpacked
RESEARCH_ONLY = "non-commercial research only"


@dataclass(frozen=True)
class KnownModel:
    """A file below one of ComfyUI's model folders.

    folder: ComfyUI's name of the folder; path: the file's place in it.
    kind: what it holds, a key of checkpoints.KINDS, "detector" or "recogniser", or "" where only size and hash tell.
    page: where it is published, url: the file itself; both "" for one that nobody has published.
    size: bytes; sha256: of the published file.
    family: what it is made for or how large it is, as model_search tells it; "" where that does not matter.
    word: what the name of another file must contain to be taken for it, where its tensors do not tell.
    """

    folder: str
    path: str
    purpose: str
    licence: str
    kind: str = ""
    page: str = ""
    url: str = ""
    size: int = 0
    sha256: str = ""
    family: str = ""
    word: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def pack(self) -> str:
        """Name of the face model that it is a part of, which is chosen in place of the file; else ""."""
        return self.path.split("/")[-2] if self.folder == "insightface" else ""


SD15 = KnownModel(
    "checkpoints",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "the diffusion model; any SD1.5 checkpoint does",
    "CreativeML OpenRAIL-M",
    "sd-checkpoint",
    HUGGING_FACE + "Comfy-Org/stable-diffusion-v1-5-archive",
    HUGGING_FACE + "Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    2132696762,
    "e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916",
    family="SD1.5",
)
CONTENT = KnownModel(
    "controlnet",
    "ridfr_content_sd15.safetensors",
    "RIDFR's content ControlNet: keeps pose, expression and light; nobody has published it, so train one",
    "yours",
    "content-controlnet",
    family="SD1.5",
)
TILE = KnownModel(
    "controlnet",
    "control_v11f1e_sd15_tile_fp16.safetensors",
    "ControlNet 1.1 Tile: stands in for RIDFR's content ControlNet",
    "OpenRAIL",
    "controlnet",
    HUGGING_FACE + "comfyanonymous/ControlNet-v1-1_fp16_safetensors",
    HUGGING_FACE
    + "comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/control_v11f1e_sd15_tile_fp16.safetensors",
    722601104,
    "2f31868eedb243a77932e3c63907a6ba0a2058b6d65b5c27b89ee1b7f618ea33",
    family="SD1.5",
    word="tile",
)
ADAPTER = KnownModel(
    "ipadapter",
    "ip-adapter-faceid-plusv2_sd15.bin",
    "FaceID-PlusV2: the identity adapter, with its LoRA",
    RESEARCH_ONLY,
    "identity-adapter",
    HUGGING_FACE + "h94/IP-Adapter-FaceID",
    HUGGING_FACE + "h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid-plusv2_sd15.bin",
    156558509,
    "26d0d86a1d60d6cc811d3b8862178b461e1eeb651e6fe2b72ba17aa95411e313",
    family="SD1.5",
)
CLIP_VISION = KnownModel(
    "clip_vision",
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "describes the reference photo for the identity adapter; `model.safetensors` there, rename it",
    "Apache-2.0",
    "clip-vision",
    HUGGING_FACE + "h94/IP-Adapter/tree/main/models/image_encoder",
    HUGGING_FACE + "h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
    2528373448,
    "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    family="ViT-H",
)
DETECTOR = KnownModel(
    "insightface",
    "models/buffalo_l/det_10g.onnx",
    "buffalo_l's detector: finds the face",
    RESEARCH_ONLY,
    "detector",
    INSIGHTFACE,
    BUFFALO + "det_10g.onnx",
    16923827,
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
)
RECOGNISER = KnownModel(
    "insightface",
    "models/buffalo_l/w600k_r50.onnx",
    "buffalo_l's recogniser: says whose face it is",
    RESEARCH_ONLY,
    "recogniser",
    INSIGHTFACE,
    BUFFALO + "w600k_r50.onnx",
    174383860,
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
)
SWINIR = KnownModel(
    "upscale_models",
    "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth",
    "optional first step: SwinIR cleans the degraded photo; any upscale model does",
    "Apache-2.0",
    "",
    "https://github.com/JingyunLiang/SwinIR",
    "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth",
    142473939,
    "99adfa91350a84c99e946c1eb3d8fce34bc28f57d807b09dc8fe40a316328c0a",
)

IDENTITY = (ADAPTER, CLIP_VISION, DETECTOR, RECOGNISER)
WORKFLOWS = {
    "ridfr_nano": (),
    "ridfr_nano_guided": (),
    "ridfr_sd15": (SD15, CONTENT, *IDENTITY),
    "ridfr_sd15_tile": (SD15, TILE, *IDENTITY),
}
OPTIONAL = {"ridfr_sd15": (SWINIR,), "ridfr_sd15_tile": (SWINIR,)}
MODELS = (SD15, TILE, CONTENT, *IDENTITY, SWINIR)
FOLDERS = tuple(sorted({model.folder for model in MODELS}))

# What comes with the pack, below ridfr_core.nano.WEIGHTS; ridfr_nano needs nothing else.
BUNDLED = (
    "checkpoint.safetensors",
    "clip_vision.safetensors",
    "identity_adapter.safetensors",
    "content_controlnet.safetensors",
    "insightface/models/nano/det_nano.onnx",
    "insightface/models/nano/rec_nano.onnx",
    "insightface/models/nano_judge/det_nano.onnx",
    "insightface/models/nano_judge/rec_judge.onnx",
)


def table() -> str:
    """The README's table of MODELS in Markdown."""
    rows = ["| file | what for | from | licence | folder |", "|---|---|---|---|---|"]
    for model in MODELS:
        source = f"[{source_name(model.page)}]({model.page})" if model.page else "-"
        folder = "/".join(["models", model.folder, *model.path.split("/")[:-1]])
        rows.append(f"| `{model.name}` | {model.purpose} | {source} | {model.licence} | `{folder}/` |")
    return "\n".join(rows)


def source_name(page: str) -> str:
    """"https://host/owner/repository/..." -> "owner/repository"."""
    return "/".join(page.split("/")[3:5])
