import numpy as np
import pytest
from PIL import Image

from ridfr_core.contact_sheet import contact_sheet

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def faces(*colours):
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


def box_of(sheet, colour):
    """Bounding box (left, top, right, bottom) of a colour's pixels."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_people_go_down_and_versions_across():
    columns = {"LQ": faces(RED, GREEN), "RIDFR": faces(BLUE, BLUE)}
    sheet = contact_sheet(columns, {"RIDFR": [0.5, None]}, "Title", cell=96)
    red, green, blue = (box_of(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert all((box[2] - box[0]) == 96 for box in (red, green, blue))
    assert red[0] == green[0] and green[1] >= red[3], "a person per row"
    assert blue[0] >= red[2] and blue[1] == red[1] and blue[3] == green[3], "a version per column"


def test_similarity_is_written_under_its_picture_only():
    sheet = contact_sheet({"LQ": faces(RED), "RIDFR": faces(BLUE)}, {"RIDFR": [0.5]}, "Title", cell=96)
    left, _, right, bottom = box_of(sheet, BLUE)
    assert sheet.crop((left, bottom, right, bottom + 30)).convert("L").getextrema()[0] < 200
    left, _, right, bottom = box_of(sheet, RED)
    assert sheet.crop((left, bottom, right, bottom + 30)).convert("L").getextrema() == (255, 255)


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="needs 2 entries"):
        contact_sheet({"LQ": faces(RED, RED), "RIDFR": faces(RED)}, {}, "Title")
