"""Every node's inputs are held to its schema, whatever comes over a wire."""

import math
import re

import numpy
import pytest
import torch

PHOTO = torch.rand(2, 64, 64, 3)
NUMBERS = ("INT", "FLOAT")
ONE_SENTENCE = re.compile(r"[A-Z][^\n]*: [^\n]*\.")


@pytest.fixture
def refused(nodes, inference_mode):
    """refused(node, inputs) -> the sentence with which it refuses them."""

    def sentence(name, **inputs):
        with pytest.raises(ValueError) as failure:
            nodes[name].execute(**inputs)
        assert type(failure.value).__name__ == "RidfrError" and ONE_SENTENCE.fullmatch(str(failure.value))
        return str(failure.value)

    return sentence


def fix(**changed):
    return {"image": PHOTO, "color_from": PHOTO, "method": "wavelet", "levels": 5} | changed


@pytest.mark.parametrize("value", [0, 9, 10**30, -(10**400), math.nan, math.inf, "5", None, [5], 2.5])
def test_a_number_outside_of_its_limits(refused, value):
    assert refused("RIDFR_ColorFix", **fix(levels=value)).startswith("Color Fix: levels ")


@pytest.mark.parametrize("value", ["Wavelet", "", None, 3, numpy.array(["wavelet", "adain"])])
def test_a_word_that_is_not_an_option(refused, value):
    said = refused("RIDFR_ColorFix", **fix(method=value))
    assert said.startswith("Color Fix: method is ") and "'wavelet', 'adain'" in said


@pytest.mark.parametrize(
    "image, says",
    [
        (None, "nothing arrived"),
        ("a photo", "another kind (str)"),
        ({"samples": PHOTO}, "another kind (dict)"),
        (PHOTO[:0], "is empty"),
        (PHOTO[0], "batch x height x width"),
        (PHOTO.movedim(-1, 1), "batch x height x width"),
        (PHOTO[..., :2], "colours"),
        ((PHOTO * 255).byte(), "torch.uint8"),
        (PHOTO * 255, "0 (black) to 1 (white)"),
        (PHOTO * 2 - 1, "0 (black) to 1 (white)"),
        (PHOTO.where(torch.arange(64)[:, None] > 0, torch.nan), "not numbers"),
        (PHOTO.to("meta"), "another kind"),
        (PHOTO.to_sparse(), "another kind"),
    ],
    ids=["none", "text", "latent", "empty", "one", "channels first", "two colours", "bytes", "255", "-1..1", "nan",
         "meta", "sparse"],
)
def test_what_is_not_an_image(refused, image, says):
    assert says in refused("RIDFR_ColorFix", **fix(image=image))


def test_the_picture_is_named(refused):
    bad = PHOTO.clone()
    bad[1, 3, 3] = torch.inf
    assert "colours from 2 has values" in refused("RIDFR_ColorFix", **fix(color_from=bad))


@pytest.mark.parametrize("image", [PHOTO.half(), PHOTO[..., :1], torch.cat([PHOTO, PHOTO], -1)[..., :4],
                                   PHOTO.clone().requires_grad_(), PHOTO * 1.2 - 0.1])
def test_what_is_an_image_passes(nodes, image):
    assert torch.isfinite(nodes["RIDFR_ColorFix"].execute(**fix(image=image))[0]).all()


def test_each_number_of_each_node_is_held(schemas):
    """So that no input can be without limits."""
    for name, schema in schemas.items():
        for slot in schema.inputs:
            if slot.get_io_type() in NUMBERS:
                assert slot.min is not None and slot.max is not None, f"{name}: {slot.id}"


def test_every_node_is_checked(nodes, shown):
    """A foreign object in each input alone; nothing else is looked at before."""
    for node in nodes.values():
        for slot in node.define_schema().inputs:
            with pytest.raises(ValueError, match=node.define_schema().display_name):
                node.execute(**{slot.id: object()})


def test_a_batch_is_not_copied(pack):
    """Images come from VAE Decode with the colours first in memory; a video of them fills it without a copy."""
    from torch.utils._python_dispatch import TorchDispatchMode

    frames, made = torch.rand(4, 3, 64, 64).movedim(1, -1), []
    memory = frames.untyped_storage().data_ptr()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != memory:
                made.append(out.numel())
            return out

    with Sizes():
        pack.nodes.checks.TENSORS["IMAGE"](frames, "x")
    assert made and max(made) < 64


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (1, 8, 8)])
def test_a_bad_number_of_one_thing_has_no_index(pack, shape):
    bad = torch.full(shape, torch.nan)
    kind = "SIGMAS" if len(shape) < 2 else "MASK"
    with pytest.raises(ValueError, match="^it has values that are not numbers"):
        pack.nodes.checks.TENSORS[kind](bad, "it")
