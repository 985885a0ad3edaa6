"""Graphs of the identity nodes in real servers, on the shipped nano weights."""

import io

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tools.server import Client

PORTRAITS, FACE = ["portraits", 0], ["face", 0]
KNOBS = {"blur": 3.0, "scale": 6.0, "noise": 5.0, "quality": 80.0}


def node(class_name, **inputs):
    return {"class_type": class_name, "inputs": inputs}


@pytest.fixture(params=["server", "oldest_server"])
def any_server(request):
    return request.getfixturevalue(request.param)


def restore(identity, people, name, **nodes):
    """A short run for so many people; the identity comes from the node "identity" or from one given. Saves a latent."""
    apply = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **nodes.pop("options", {})}
    return {
        "portraits": node("RIDFR_NanoPortraits", first_person=0, people=people, view=1),
        "nano": node("RIDFR_LoadNanoModels"),
        "face": node("RIDFR_LoadFaceModel", pack="nano"),
        "identity": extract(PORTRAITS),
        "adapter": node("RIDFR_LoadIdentityAdapter", file="nano", version="auto"),
        "apply": node("RIDFR_ApplyIdentity", model=["nano", 0], adapter=["adapter", 0], identity=identity, **apply),
        "prompt": node("CLIPTextEncode", text="", clip=["nano", 1]),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=people),
        "sampler": node(
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
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix=f"identity/{name}"),
        **nodes,
    }


def extract(images):
    return node(
        "RIDFR_ExtractIdentity",
        face_model=FACE,
        clip_vision=["nano", 3],
        images=images,
        batch="each photo is another person",
    )


def latent(server, entry) -> torch.Tensor:
    (file,) = entry["outputs"]["save"]["latents"]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def test_saved_and_loaded_is_the_same_person(any_server):
    keep = node("RIDFR_SaveIdentity", identity=["identity", 0], name="Ann / Müller", overwrite=True)
    with Client(any_server.url) as client:
        directly = client.run(restore(["identity", 0], 1, "direct", keep=keep))
        file = any_server.base / "models" / "identities" / "Ann _ Müller.safetensors"
        assert directly["outputs"]["keep"]["text"] == [str(file)] and file.is_file()
        load = node("RIDFR_LoadIdentity", file=file.name, face_model=FACE)
        loaded = client.run(restore(["load", 0], 1, "loaded", load=load))
    assert torch.equal(latent(any_server, directly), latent(any_server, loaded))


def test_all_the_nodes_together(any_server):
    """Two people with two photos each, one weighted mean, strengths that follow the degradation, a mask, a report."""
    degraded = {f"{knob}_{end}": value for knob, value in KNOBS.items() for end in ("min", "max")}
    graph = restore(
        ["combined", 0],
        2,
        "together",
        options={"mask": ["mask", 0], "strengths": ["adaptive", 0]},
        others=node("RIDFR_NanoPortraits", first_person=0, people=2, view=5),
        second=extract(["others", 0]),
        joined=node(
            "RIDFR_JoinIdentities",
            identity_1=["identity", 0],
            identity_2=["second", 0],
            others="more photos of the same person",
        ),
        combined=node("RIDFR_CombineReferences", identity=["joined", 0], method="weighted mean"),
        degraded=node("RIDFR_DegradeFace", image=PORTRAITS, seed=1, **degraded),
        adaptive=node("RIDFR_AdaptiveStrength", degraded=["degraded", 0], least=0.0, most=1.0),
        mask=node("SolidMask", value=1.0, width=64, height=64),
        table=node("RIDFR_IdentityReport", face_model=FACE, identity=["joined", 0], images=PORTRAITS),
        text=node("PreviewAny", source=["table", 1]),
        levels=node("PreviewAny", source=["adaptive", 2]),
    )
    with Client(any_server.url) as client:
        outputs = client.run(graph)["outputs"]
        (picture,) = outputs["table"]["images"]
        sheet = Image.open(io.BytesIO(client.get("/view", **picture)))
    assert min(sheet.size) > 400
    lines = outputs["text"]["text"][0].splitlines()
    assert len(lines) == 4 and lines[0].startswith("result 1:") and lines[3].startswith("person 2: photos ")
    assert len(outputs["levels"]["text"][0].splitlines()) == 2
