"""Odd values for every input of every node: each call works, with finite results, or is refused in one sentence.

A failure names its case; RIDFR_FUZZ=NODE:NUMBER runs that one alone, RIDFR_FUZZ_SEED another series, RIDFR_FUZZ_CASES
more of each node.
"""

import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

SEED = os.environ.get("RIDFR_FUZZ_SEED", "12")
CASES = int(os.environ.get("RIDFR_FUZZ_CASES", 50))  # of each node
SECONDS, GIBIBYTES = 8, 2.5  # processor time of a call, growth of the process in all
NODES = json.loads((Path(__file__).parents[1] / "schemas.json").read_text(encoding="utf-8"))
ONE_SENTENCE = re.compile(r"['A-Z0-9][^\n]{8,398}\.")
TRACEBACK = re.compile(r"Traceback|Error:|object has no attribute|<class |expected .* but got|tensor\(")

pytestmark = pytest.mark.usefixtures("inference_mode")


# Odd values, by the type of an input. Each is made anew, by a random generator of the case.

FOREIGN = [None, "text", 7, 0.5, [], {}, (1, 2), object(), b"bytes", torch.zeros(3), {"samples": None}]
FLOATS = [-1e308, -1.0, -1e-9, -0.0, 1e-45, 1e-9, 0.3, 1.0, 1 + 1e-7, 2.5, 99.5, 1e6, 1e308,
          math.nan, math.inf, -math.inf]
INTS = [-(2**63), -1, 0, 1, 2, 3, 8, 9, 100, 2**31, 2**63, 2**64 - 1, 2**64, 10**30]
TEXTS = ["", " ", ".", "..", "../up", "/", "a/b", "a\\b", "C:\\x", "\x00", "a\nb", "名前", "🙂" * 90, "x" * 300,
         "x" * 9000, "\ud800", "con", "nul.txt", "a\x1b[31m", "$HOME", "%s", "{}", "1", "1 1", "1,1", "0 0", "nan 1",
         "inf,1", "1e400 1", "3e38 3e38", "1e-300 1e-300", "one two", "1 2 3", "-1 2", "1," * 3000, "½ 1"]


def images(random: Random):
    size = random.choice([*[(128, 128)] * 4, (96, 128), (127, 101), (1, 1), (0, 64), (1, 300), (31, 31), (32, 32),
                          (32, 2000)])
    batch, channels = random.choice([0, *[1, 2] * 5, 3]), random.choice([1, 2, *[3] * 9, 4, 5])
    return tensor(random, batch, *size, channels)


def tensor(random: Random, *shape):
    """Of these sizes, most often in [0,1]."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(random.randrange(2**31)))
    spoil = random.choice([
        *[lambda x: x] * 25, lambda x: x * 0, lambda x: x * 0 + 1, lambda x: x * 255, lambda x: x * 2 - 1,
        lambda x: x * 1e30, lambda x: x * 1e-30, lambda x: x - 2, lambda x: x.half(), lambda x: x.bfloat16(),
        lambda x: x.double(), lambda x: (x * 255).byte(), lambda x: x > 0.5, lambda x: x.to(torch.complex64),
        lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x[0] if len(x) else x, lambda x: x[None],
        lambda x: x.flatten(), lambda x: x.movedim(-1, 0), lambda x: x.numpy(), lambda x: list(x),
        *[lambda x, v=v: x.masked_fill(x > 0.99, v) for v in (math.nan, math.inf, -math.inf)],
    ])
    return spoil(values)


def masks(random: Random):
    shape = random.choice([(1, 128, 128), (2, 64, 64), (3, 16, 16), (1, 1, 1), (1, 0, 9), (0, 9, 9), (64, 64),
                           (1, 1, 64, 64), (2, 3, 8, 8), (1, 8, 2000), (5,)])
    return tensor(random, *shape)


def latents(random: Random):
    shape = random.choice([(1, 4, 16, 16), (2, 4, 16, 16), (3, 4, 16, 16), (2, 16, 16, 16), (0, 4, 16, 16),
                           (1, 4, 0, 16), (1, 4, 1, 1), (1, 4, 15, 13), (1, 4, 3, 16, 16), (16, 16), (1, 64, 100)])
    more = random.choice([{}, {}, {"batch_index": [0]}, {"batch_index": [3, 1]}, {"batch_index": [-1, 0]},
                          {"batch_index": [10**12] * shape[0]}, {"batch_index": "x"},
                          {"noise_mask": torch.ones(3, 1, 7, 7)}, {"type": "audio"}])
    return {"samples": tensor(random, *shape)} | more


def rows(random: Random):
    """Sigmas and strengths."""
    values = random.choice([[], [1.0], [14.6, 0.0], [14.6, 5.0, 1.0, 0.0], [0.0] * 4, [3.0, 3.0, 0.0], [0.0, 1.0, 14.6],
                            [-1.0, -2.0, -3.0], [14.6, 1.0, 0.5], [1e30, 1.0, 0.0], [1e-30, 0.0], [0.5, 0.5]])
    return random.choice([lambda: torch.tensor(values), lambda: tensor(random, len(values)),
                          lambda: tensor(random, 2, 2), lambda: values])()


MAKERS = {"IMAGE": images, "MASK": masks, "LATENT": latents, "SIGMAS": rows, "RIDFR_STRENGTHS": rows}
SIMPLE = {"FLOAT": FLOATS, "INT": INTS, "STRING": TEXTS, "BOOLEAN": [True, False, 0, "yes"]}


@pytest.fixture(scope="module")
def weights(checkout) -> Path:
    """The shipped ones, whose detector takes pictures of any size."""
    return checkout / "ridfr_core" / "nano" / "weights"


@pytest.fixture(scope="module")
def good(pack, nodes, nano, adapter, face_model, identity) -> dict:
    """A value for each type that has no default, and further ones that a wire can really carry."""
    core = pack.ridfr_core.identity
    with torch.inference_mode():
        photos = nodes["RIDFR_NanoPortraits"].execute(0, 2, 1)[0]
        one = nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, "all photos show one person", nano.vision)[0]
        two = nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, "each photo is another person", nano.vision)[0]
        bare = nodes["RIDFR_ExtractIdentity"].execute(face_model, photos, "each photo is another person")[0]
    several = core.join_people([one, two], [1, 2])
    return {
        "IMAGE": [photos], "MASK": [torch.ones(1, 128, 128)], "LATENT": [{"samples": torch.zeros(2, 4, 16, 16)}],
        "SIGMAS": [torch.tensor([14.6, 5.0, 1.0, 0.0])], "RIDFR_STRENGTHS": [torch.ones(2)], "MODEL": [nano.model],
        "VAE": [nano.vae], "CLIP_VISION": [nano.vision], "RIDFR_FACE_MODEL": [face_model],
        "RIDFR_IDENTITY_ADAPTER": [adapter], "RIDFR_IDENTITY": [two, one, bare, identity, several],
    }


@pytest.fixture(scope="module")
def folders(nodes, tmp_path_factory):
    """Where Save Identity writes."""
    import folder_paths

    before = folder_paths.folder_names_and_paths["identities"]
    folder = tmp_path_factory.mktemp("fuzz") / "identities"
    folder.mkdir()
    folder_paths.folder_names_and_paths["identities"] = ([str(folder)], before[1])
    yield folder
    folder_paths.folder_names_and_paths["identities"] = before


def usual(slot, good: dict):
    kind = slot.get_io_type()
    if kind in good:
        return good[kind][0]
    if kind == "COMBO":
        return "nano" if slot.id in ("file", "pack") else slot.default or slot.options[0]
    return slot.default


def odd(slot, good: dict, random: Random):
    kind = slot.get_io_type()
    if random.random() < 0.06:
        return random.choice([*FOREIGN, *(values[0] for values in good.values())])
    if kind in MAKERS:
        return MAKERS[kind](random)
    if kind == "COMBO":
        return random.choice([*slot.options] * 2 + TEXTS)
    if kind in SIMPLE:
        limits = [slot.min, slot.max] if kind in ("FLOAT", "INT") else []
        return random.choice([*limits, *SIMPLE[kind]])
    return random.choice([*good.get(kind, []), *good.get(kind, []), *FOREIGN])


@pytest.mark.parametrize("name", [name for name, slots in NODES.items() if slots["inputs"]])
def test_odd_values(name, nodes, good, folders, finite):
    if "RIDFR_GUIDANCE" not in good:
        good["RIDFR_GUIDANCE"] = [nodes["RIDFR_IDPreservingSampling"].execute(
            **{slot.id: usual(slot, good) for slot in nodes["RIDFR_IDPreservingSampling"].define_schema().inputs})[1]]
    slots = nodes[name].define_schema().inputs
    before = resident()
    wrong = []
    for number in range(CASES):
        if os.environ.get("RIDFR_FUZZ", f"{name}:{number}") != f"{name}:{number}":
            continue
        random = Random(f"{SEED} {name} {number}")
        inputs = {slot.id: usual(slot, good) for slot in slots if not slot.optional or random.random() < 0.5}
        changed = random.sample(slots, min(len(slots), random.choice([1, 1, 1, 2, 3])))
        inputs |= {slot.id: odd(slot, good, random) for slot in changed}
        case = f"RIDFR_FUZZ_SEED={SEED} RIDFR_FUZZ={name}:{number} {({s.id: short(inputs[s.id]) for s in changed})}"
        began = time.process_time()
        try:
            fault = None if finite(nodes[name].execute(**inputs)) else "the result has NaN or infinite values"
        except Exception as error:
            fault = complaint(error)
        if (took := time.process_time() - began) > SECONDS:
            fault = f"it took {took:.0f} s ({fault})"
        if fault:
            wrong.append(f"{case}\n    {fault}")
    assert not wrong, f"{len(wrong)} of {CASES}:\n" + "\n".join(wrong)
    assert resident() - before < GIBIBYTES


def complaint(error: Exception) -> str | None:
    """What is wrong with the way in which an input was refused."""
    said = str(error)
    if not any(kind.__name__ == "RidfrError" for kind in type(error).__mro__):
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        return f"{type(error).__name__} in {place}: {said[:200]}"
    if not ONE_SENTENCE.fullmatch(said) or TRACEBACK.search(said):
        return f"not a sentence: {said[:500]!r}"
    return None


@pytest.fixture(scope="module")
def finite(nano, comfy):
    """finite(node output) -> whether all its numbers are, those of two steps with its MODEL, too."""
    from nodes import common_ksampler

    def of(value) -> bool:
        if isinstance(value, torch.Tensor):
            return bool(torch.isfinite(value.float()).all())
        if isinstance(value, float):
            return math.isfinite(value)
        if isinstance(value, dict):
            return all(map(of, value.values()))
        if hasattr(value, "get_model_object"):
            latent = {"samples": torch.zeros(2, 4, 16, 16)}
            return of(common_ksampler(value, 1, 2, 1.0, "euler", "normal", nano.prompt, nano.prompt, latent)[0])
        return True

    return lambda output: all(map(of, output.args))


def short(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device} {value.layout}"
    if isinstance(value, dict):
        return str({key: short(one) for key, one in value.items()})
    return repr(value)[:80]


def resident() -> float:
    """The most memory that the process has had, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
