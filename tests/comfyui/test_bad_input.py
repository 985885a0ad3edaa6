"""What a user can get wrong: one clear sentence each, and the server goes on."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ridfr_core.adapter import IdentityAdapter
from tools.server import PromptError


def node(class_name, **inputs):
    return {"class_type": class_name, "inputs": inputs}


def graph(**nodes):
    """Nodes by name; PORTRAITS, the nano models and the face model are there for all to use."""
    return {
        "portraits": node("RIDFR_NanoPortraits", first_person=0, people=2, view=1),
        "nano": node("RIDFR_LoadNanoModels"),
        "face": node("RIDFR_LoadFaceModel", pack="nano"),
        **nodes,
    }


PORTRAITS, MODEL, CLIP, CLIP_VISION, FACE = ["portraits", 0], ["nano", 0], ["nano", 1], ["nano", 3], ["face", 0]
MANY, ONE = "each photo is another person", "all photos show one person"


def extract(images, **nodes):
    """Extract Identity from `images`, the output of one of the further nodes or PORTRAITS."""
    extractor = node("RIDFR_ExtractIdentity", face_model=FACE, clip_vision=CLIP_VISION, images=images, batch=MANY)
    return graph(identity=extractor, end=node("PreviewAny", source=["identity", 0]), **nodes)


def colour(size, color):
    return node("EmptyImage", width=size, height=size, batch_size=1, color=color)


def probe(kind):
    return node("ProbeImage", image=PORTRAITS, kind=kind)


def fails(client, graph, sentence):
    """The graph fails with this sentence, alone; the next one runs."""
    with pytest.raises(PromptError, match=sentence) as failure:
        client.run(graph)
    message = failure.value.details["exception_message"].strip()
    assert "\n" not in message and message.endswith("."), message
    client.run({"1": colour(8, hash(sentence) % 2**24), "2": node("PreviewImage", images=["1", 0])})


# Pictures


@pytest.mark.parametrize(
    "image, sentence",
    [
        (colour(128, 0x808080), r"No face was found in reference image 1 \(nano finds only drawn faces\): use"),
        (probe("pair"), "2 faces were found in reference image 1: crop it to the one person"),
        (colour(16, 0x808080), "Reference image 1 has only 16x16 pixels"),
        (colour(128, 0), "Reference image 1 is completely black"),
        (probe("nan"), "Extract Identity: images 2 has values that are not numbers"),
        (probe("empty"), r"Extract Identity: images is empty \(its size is 0x128x128x3\), but an image is expected"),
    ],
    ids=["no face", "two faces", "16x16", "black", "nan", "empty"],
)
def test_reference_photos(client, image, sentence):
    fails(client, extract(["photo", 0], photo=image), sentence)


@pytest.mark.parametrize("kind", ["grey", "rgba"])
def test_grey_and_rgba_are_taken(client, kind):
    client.run(extract(["photo", 0], photo=probe(kind)))


def test_nan_in_an_image_to_fix(client):
    fix = node("RIDFR_ColorFix", image=["photo", 0], color_from=PORTRAITS, method="wavelet", levels=5)
    bad = graph(photo=probe("nan"), fix=fix, end=node("PreviewImage", images=["fix", 0]))
    fails(client, bad, "Color Fix: image 2 has values that are not numbers")


def test_colours_of_another_shape(client):
    wide = node("EmptyImage", width=128, height=96, batch_size=1, color=0x808080)
    fix = node("RIDFR_ColorFix", image=PORTRAITS, color_from=["wide", 0], method="wavelet", levels=5)
    bad = graph(wide=wide, fix=fix, end=node("PreviewImage", images=["fix", 0]))
    fails(client, bad, "The image with the colours has 128x96 pixels and the restored one 128x128, which is another")


def test_images_of_different_number(client):
    three = node("RIDFR_NanoPortraits", first_person=0, people=3, view=1)
    compare = node("RIDFR_CompareIdentity", face_model=FACE, image_a=PORTRAITS, image_b=["three", 0])
    fails(client, graph(three=three, compare=compare), "The first input has 2 images and the second has 3")


def test_people_and_latents_of_different_number(client):
    bad = extract(
        PORTRAITS,
        adapter=node("RIDFR_LoadIdentityAdapter", file="nano", version="auto"),
        apply=apply_identity(),
        prompt=node("CLIPTextEncode", text="", clip=CLIP),
        latent=node("EmptyLatentImage", width=128, height=128, batch_size=3),
        sampler=node(
            "KSampler",
            model=["apply", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="uni_pc_bh2",
            scheduler="normal",
            denoise=1.0,
        ),
        image=node("SaveLatent", samples=["sampler", 0], filename_prefix="bad"),
    )
    fails(client, bad, "The identity has 2 people but the latent batch has 3 images")


def apply_identity(**options):
    return node(
        "RIDFR_ApplyIdentity",
        model=MODEL,
        adapter=["adapter", 0],
        identity=["identity", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        **options,
    )


# Identities


@pytest.mark.parametrize(
    "weights, sentence",
    [("1, 2, 3", "Weights: 3, photos: 2"), ("1, much", "are not numbers"), ("0 0", "have weight 0")],
)
def test_weights_of_references(client, weights, sentence):
    bad = extract(PORTRAITS)
    bad["identity"]["inputs"].update(weights=weights, batch="all photos show one person")
    fails(client, bad, sentence)


def test_people_in_one_picture_need_masks(client):
    shared = {
        "adapter": node("RIDFR_LoadIdentityAdapter", file="nano", version="auto"),
        "apply": apply_identity(people="all in every picture, each in their mask"),
        "model": node("PreviewAny", source=["apply", 0]),
    }
    fails(client, extract(PORTRAITS, **shared), "2 people who are all to be in every picture, but there are 0 masks")


def test_another_number_of_photos_cannot_be_joined(client):
    one = node("RIDFR_ExtractIdentity", face_model=FACE, clip_vision=CLIP_VISION, images=PORTRAITS, batch=ONE)
    joined = node(
        "RIDFR_JoinIdentities",
        identity_1=["identity", 0],
        identity_2=["one", 0],
        others="more photos of the same person",
    )
    bad = extract(PORTRAITS, one=one, joined=joined, last=node("PreviewAny", source=["joined", 0]))
    fails(client, bad, "The identities have 2, 1 people")


@pytest.mark.parametrize(
    "model, sentence",
    [
        ({}, "connect that, too"),
        ({"face_model": ["judge", 0]}, "made with the face model nano .* and this is nano_judge"),
    ],
)
def test_best_match_needs_the_face_model(client, model, sentence):
    judge = node("RIDFR_LoadFaceModel", pack="nano_judge")
    best = node(
        "RIDFR_CombineReferences", identity=["identity", 0], method="best match", degraded=PORTRAITS, **model
    )
    fails(client, extract(PORTRAITS, judge=judge, best=best, last=node("PreviewAny", source=["best", 0])), sentence)


def test_saved_identities(client, server):
    """The second of a name is counted; not saved without a name, not loaded for another face model or if it is none."""
    save = node("RIDFR_SaveIdentity", identity=["identity", 0], name="bad input", overwrite=False)
    folder = server.base / "models" / "identities"

    def saved(view, **inputs):
        graph = extract(PORTRAITS, save={**save, "inputs": {**save["inputs"], **inputs}})
        graph["portraits"]["inputs"].update(view=view)
        (text,) = client.run(graph)["outputs"]["save"]["text"]
        files = [Path(line) for line in text.splitlines()]
        assert all(file.parent == folder and file.is_file() for file in files)
        return [file.name for file in files]

    assert saved(1) == ["bad input 1.safetensors", "bad input 2.safetensors"]
    assert saved(7) == ["bad input 1_00002.safetensors", "bad input 2_00002.safetensors"]
    assert saved(8, overwrite=True) == ["bad input 1.safetensors", "bad input 2.safetensors"]
    fails(client, extract(PORTRAITS, save={**save, "inputs": {**save["inputs"], "name": " / "}}), "no name for a file")

    def load(file, **model):
        return graph(load=node("RIDFR_LoadIdentity", file=file, **model), end=node("PreviewAny", source=["load", 0]))

    client.run(load("bad input 1.safetensors", face_model=FACE))
    judged = load("bad input 1.safetensors", face_model=["judge", 0])
    judged["judge"] = node("RIDFR_LoadFaceModel", pack="nano_judge")
    fails(client, judged, "'bad input 1.safetensors' was made with the face model nano .* and this is nano_judge")
    lora(folder / "lora.safetensors")
    fails(client, load("lora.safetensors"), "'lora.safetensors' is not a saved identity")
    truncated(folder / "cut.safetensors")
    fails(client, load("cut.safetensors"), "'cut.safetensors' is damaged or cut short")


# Files


class Code:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def truncated(path):
    save_file({"image_proj.norm.weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-50])


def not_a_number(path):
    save_file({"image_proj.norm.weight": torch.full((64,), float("nan"))}, path)


def with_code(path):
    path.write_bytes(pickle.dumps({"image_proj": Code(path.with_suffix(".ran"))}))


def lora(path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, path)


def ordinary_controlnet(path):
    names = ("control_model.zero_convs.0.0.weight", "control_model.input_hint_block.0.weight")
    save_file({name: torch.zeros(4, 4, 1, 1) for name in names}, path)


LOADERS = {"ipadapter": "RIDFR_LoadIdentityAdapter", "controlnet": "RIDFR_LoadContentControlNet"}


@pytest.mark.parametrize("folder", LOADERS)
@pytest.mark.parametrize(
    "make, name, sentence",
    [
        (truncated, "cut.safetensors", "'cut.safetensors' is damaged or cut short: download it again"),
        (with_code, "code.pt", "'code.pt' holds more than weights, and code in it could run .* refused"),
        (lora, "lora.safetensors", "'lora.safetensors' holds a LoRA .*but this needs"),
        (ordinary_controlnet, "canny.safetensors", "'canny.safetensors' holds an ordinary ControlNet .*but this needs"),
        (not_a_number, "nan.safetensors", "'nan.safetensors' holds NaN or infinite numbers in image_proj.norm.weight"),
    ],
    ids=["truncated", "pickle with code", "lora", "ordinary controlnet", "nan"],
)
def test_weight_files(client, server, folder, make, name, sentence):
    path = server.base / "models" / folder / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    version = {"version": "auto"} if folder == "ipadapter" else {}
    loader = node(LOADERS[folder], file=name, **version)
    fails(client, {"loader": loader, "end": node("PreviewAny", source=["loader", 0])}, sentence)
    assert not path.with_suffix(".ran").exists(), "code in the pickle was run"


def test_sdxl_adapter_on_an_sd15_model(client, server):
    path = server.base / "models" / "ipadapter" / "sdxl.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(IdentityAdapter((64,) * 70, dim=64, clip_dim=128, depth=1).state_dict(), path)
    adapter = node("RIDFR_LoadIdentityAdapter", file=path.name, version="auto")
    bad = extract(PORTRAITS, adapter=adapter, apply=apply_identity(), model=node("PreviewAny", source=["apply", 0]))
    fails(client, bad, r"The adapter sdxl.safetensors is for SDXL .* but the model is for SD1.5")
