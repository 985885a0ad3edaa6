"""How fast the face networks run in torch, against onnxruntime on the same files: `make bench ARGS=faces`.

Nano's detector and recogniser, and whatever ONNX detectors lie in `../shared/data/real`, which are no part of the
project. A detector gets an input of 640x640; "search" is a photo of 1280x886 shrunk to that and its outputs read, here
and by insightface. One thread: with several, each side's waiting threads would slow the other down.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from ridfr_core.faces import Detector
from ridfr_core.nano import WEIGHTS
from ridfr_core.onnx_file import read_graph
from ridfr_core.onnx_network import load_network
from ridfr_core.recognition import CROP_SIZE, load_recogniser

from .bench import arguments, process_time, save, taking_turns
from .cache import CHECKOUT

NANO = WEIGHTS / "insightface" / "models" / "nano"
REAL = CHECKOUT.parent / "shared" / "data" / "real"
SIDE = 640
PHOTO = (886, 1280)  # height, width


def main() -> None:
    options = arguments("faces", __doc__).parse_args()
    torch.set_num_threads(1)
    detectors = [NANO / "det_nano.onnx", *sorted(REAL.glob("scrfd_*.onnx"))]
    with torch.inference_mode():
        rows = []
        for path in detectors:
            rows += [network(path, SIDE, options.repeats), search(path, options.repeats)]
        rows.append(recogniser(NANO / "rec_nano.onnx", options.repeats))
    save(options, "faces_cpu.json", {"rows": rows})


def session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def network(path: Path, side: int, repeats: int) -> dict:
    net, _ = load_network(path, read_graph(path), (1, 3, side, side))
    return beside_onnxruntime(path, net, side, repeats)


def recogniser(path: Path, repeats: int) -> dict:
    return beside_onnxruntime(path, load_recogniser(path), CROP_SIZE, repeats)


def beside_onnxruntime(path: Path, net: Callable, side: int, repeats: int) -> dict:
    theirs, x = session(path), torch.rand(1, 3, side, side)
    (name,), pixels = (value.name for value in theirs.get_inputs()), x.numpy()
    variants = {"torch": lambda: net(x), "onnxruntime": lambda: theirs.run(None, {name: pixels})}
    return compared(path.stem, variants, repeats)


def search(path: Path, repeats: int) -> dict:
    from insightface.model_zoo.scrfd import SCRFD

    detector, theirs = Detector(path), SCRFD(model_file=str(path), session=session(path))
    photo = torch.rand(3, *PHOTO)
    pixels = numpy.ascontiguousarray((photo * 255).byte().permute(1, 2, 0).numpy()[..., ::-1])
    return compared(f"{path.stem}, search", {
        "torch": lambda: detector._search(photo, 0, (SIDE, SIDE)),
        "onnxruntime": lambda: theirs.detect(pixels, input_size=(SIDE, SIDE)),
    }, repeats)


def compared(name: str, variants: dict[str, Callable], repeats: int) -> dict:
    for variant in variants.values():
        variant()
    seconds = taking_turns({f"{name}, {side}": run for side, run in variants.items()}, repeats, process_time)
    medians = dict(zip(variants, map(statistics.median, seconds.values())))
    return {"what": name, **medians, "ratio": medians["torch"] / medians["onnxruntime"]}


if __name__ == "__main__":
    main()
