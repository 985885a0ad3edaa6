"""Convert a recogniser (.onnx) or PyTorch weights (.bin, .pth, .ckpt) to safetensors, which holds no code."""

import argparse
import os
from pathlib import Path


def describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="insightface's recogniser, an identity adapter or other weights")
    parser.add_argument("out", type=Path, nargs="?", help="the new file (default: beside it, with .safetensors)")


def run(options: argparse.Namespace) -> None:
    """Write the file and say what it holds. Exit code: 0 written, 2 it was not, and a sentence says why."""
    from .. import checkpoints
    from ..errors import RidfrError
    from ..face_model import SOURCE_DIGEST, digest_of
    from ..recognition import load_iresnet

    source = options.file
    out = options.out or source.parent / f"{source.stem}.safetensors"
    if os.path.lexists(out):
        fail(f"'{out}' is there already: remove it, or name another file after '{source}'.")
    try:
        if source.suffix.lower() == ".onnx" and os.path.isfile(source):
            state, metadata = load_iresnet(source).state_dict(), {SOURCE_DIGEST: digest_of(source)}
            checkpoints.check_numbers(state, source.name)
        else:
            state, metadata = checkpoints.read(source)
        if not state:
            fail(f"'{source}' holds no weights: choose another file.")
        checkpoints.write(state, out, metadata)
    except RidfrError as error:
        fail(str(error))
    print(f"{out}: {len(state)} tensors, {checkpoints.KINDS[checkpoints.kind_of(state)]}")


def fail(message: str) -> None:
    print(f"ridfr convert: {message}", flush=True)
    raise SystemExit(2)
