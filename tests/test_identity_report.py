"""The report: who is how much like whom, in numbers, in words and as a picture."""

import time

import pytest
import torch

from ridfr_core.identity_report import ALIKE, CELL, SHOWN, Seen, report_sheet, report_text, similarities


def face(name, person, *direction):
    embedding = torch.nn.functional.normalize(torch.tensor(direction), dim=0) if direction else None
    return Seen(name, torch.full((3, 112, 112), 0.2 * person), person, embedding)


REFERENCES = [face("1.1", 1, 1.0, 0.0), face("1.2", 1, 0.8, 0.6), face("2.1", 2, 0.0, 1.0)]
RESULTS = [face("result 1", 1, 1.0, 0.0), face("result 2", 2)]


def test_similarities():
    first, second = similarities(RESULTS, REFERENCES)
    assert first == pytest.approx([1.0, 0.8, 0.0]) and second == [None] * 3


def test_words():
    assert report_text(RESULTS, REFERENCES).splitlines() == [
        "result 1: 0.90 like person 1 (0.80 to 1.00), 0.00 like person 2, the next",
        "result 2: no face found",
        "person 1: photos 0.80 like each other, least 1.1 and 1.2 with 0.80",
        "person 2: one photo",
    ]


def test_a_person_without_references_is_named():
    assert report_text([face("result 1", 3, 1.0, 0.0)], REFERENCES).splitlines()[0] == (
        "result 1: there is no photo of person 3, 0.90 like person 1, the next")
    assert report_text([face("result 1", 1, 1.0, 0.0)], []) == "result 1: there is no photo of person 1"
    assert report_sheet([face("result 1", 3, 1.0, 0.0)], REFERENCES).width > 0


def test_picture():
    """A column for each reference, and a row for each face, in colours that tell the numbers."""
    alone, table = report_sheet([], REFERENCES), report_sheet(RESULTS, REFERENCES)
    assert table.height - alone.height >= 2 * CELL and table.width == alone.width
    many = report_sheet(RESULTS, REFERENCES * 4)
    assert many.width - table.width > 5 * CELL
    colours = {colour for _, colour in table.getcolors(1 << 20)}
    assert ALIKE in colours and (255, 255, 255) in colours
    half = tuple(round(255 + 0.8 * (a - 255)) for a in ALIKE)
    assert half in colours


def test_many_faces():
    """Two hundred photos of one person, and as many results: the table shows the first, and says so; the words are of
    all."""
    g = torch.Generator().manual_seed(0)
    photos = [face(f"1.{i}", 1, *torch.randn(512, generator=g).tolist()) for i in range(200)]
    photos[150] = Seen("1.150", photos[150].picture, 1, -photos[3].embedding)
    start = time.process_time()
    table, words = report_sheet(photos, photos), report_text(photos, photos)
    assert time.process_time() - start < 10
    assert table.width * table.height < 20e6 and table.height > 2 * SHOWN * CELL
    few = report_sheet(photos[:SHOWN], photos[:SHOWN])
    assert table.width == few.width and table.height == few.height + 20  # the line that says how many there are
    lines = words.splitlines()
    assert len(lines) == 201 and "least 1.3 and 1.150 with -1.00" in lines[-1]


def test_no_face_at_all():
    nobody = [Seen("result 1", torch.zeros(3, 112, 112), 1, None)]
    assert similarities(nobody, nobody) == [[None]] and similarities([], nobody) == []
    report_sheet(nobody, REFERENCES)
