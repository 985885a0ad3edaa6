"""Real face networks and photographs, which are no part of the project: where tests find them."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"


def real(name: str) -> Path:
    """A network beside the checkout; the test is skipped where it is not there."""
    if not (REAL / name).is_file():
        pytest.skip(f"real face networks are not part of the project; this test looks for {REAL / name}")
    return REAL / name


def photos() -> dict[str, torch.Tensor]:
    """Photographs [3,H,W] in [0,1] that the yardsticks' packages bring along: six people, and one."""
    import insightface
    from skimage import data

    people = Image.open(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg").convert("RGB")
    found = {"people": numpy.asarray(people), "astronaut": data.astronaut()}
    return {name: torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 for name, pixels in found.items()}
