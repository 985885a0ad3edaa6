"""Who looks like whom: results and reference photos against reference photos, as a table of faces and in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .contact_sheet import GAP, INK, MARGIN, PALE, PAPER

CELL, FACE, HEAD = 76, 64, 96  # px: a cell, the face beside it, the title
SHOWN = 32  # at most, of the results and of the references: two hundred photos would be a picture of gigabytes
ALIKE = (0, 114, 178)  # colour of similarity 1 (Okabe and Ito's blue); 0 and less are paper


@dataclass(frozen=True)
class Seen:
    """A face: its name, its picture [3,H,W] in [0,1], the person it is of or should be, counted from 1, and its unit
    embedding [D], None where no face was found."""

    name: str
    picture: Tensor
    person: int
    embedding: Tensor | None


def similarities(rows: Sequence[Seen], columns: Sequence[Seen]) -> list[list[float | None]]:
    """Cosine of each row's face to each column's; None where a face is missing."""
    table = cosines(rows, columns).tolist()
    return [[None if math.isnan(value) else value for value in row] for row in table]


def cosines(rows: Sequence[Seen], columns: Sequence[Seen]) -> Tensor:
    """[rows,columns], NaN where a face is missing."""
    width = next((len(face.embedding) for face in (*rows, *columns) if face.embedding is not None), 1)
    missing = torch.full((width,), torch.nan)
    a, b = ([missing if face.embedding is None else face.embedding for face in faces] for faces in (rows, columns))
    return torch.stack(a) @ torch.stack(b).T if a and b else torch.zeros(len(a), len(b))


def report_sheet(results: Sequence[Seen], references: Sequence[Seen], note: str = "") -> Image.Image:
    """The table: results, then references, down; references across. Framed where both are of the same person.

    Of many faces the first SHOWN of both are shown, and a line says so.
    """
    hidden = max(len(results), len(references)) > SHOWN
    shown = f"the first {SHOWN} of {len(results)} results and {len(references)} photos; the report has all"
    results, references = results[:SHOWN], references[:SHOWN]
    rows = [*results, *references]
    table = similarities(rows, references)
    head = HEAD + 20 * hidden
    left, top = MARGIN + 110 + FACE + GAP, head + MARGIN + FACE + GAP
    gaps = GAP if results else 0
    width = max(left + len(references) * CELL + MARGIN, 520)
    sheet = Image.new("RGB", (width, top + len(rows) * CELL + gaps + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((MARGIN, MARGIN), "Identity report", INK, ImageFont.load_default(26))
    draw.text((MARGIN, MARGIN + 36), "cosine similarity: 1 the same, about 0 strangers; framed: one person", PALE, font)
    for line, text in enumerate((note, shown) if hidden else (note,)):
        draw.text((MARGIN, MARGIN + 56 + 20 * line), text, PALE, font)
    for column, face in enumerate(references):
        x = left + column * CELL
        draw.text((x + CELL // 2, top - FACE - 8), face.name, INK, font, anchor="ms")
        paste_face(sheet, face, (x + (CELL - FACE) // 2, top - FACE - 4))
    for row, face in enumerate(rows):
        y = top + row * CELL + (gaps if row >= len(results) else 0)
        draw.text((left - FACE - GAP - 6, y + CELL // 2), face.name, INK, font, anchor="rm")
        paste_face(sheet, face, (left - FACE - GAP, y + (CELL - FACE) // 2))
        for column, other in enumerate(references):
            draw_cell(draw, (left + column * CELL, y), table[row][column], face.person == other.person)
    return sheet


def paste_face(sheet: Image.Image, face: Seen, corner: tuple[int, int]) -> None:
    pixels = (face.picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    sheet.paste(Image.fromarray(pixels).resize((FACE, FACE), Image.Resampling.LANCZOS), corner)


def draw_cell(draw: ImageDraw.ImageDraw, corner: tuple[int, int], value: float | None, same: bool) -> None:
    """A number on its colour."""
    (x, y), share = corner, min(max(value or 0.0, 0.0), 1.0)
    fill = tuple(round(p + share * (a - p)) for p, a in zip(PAPER, ALIKE))
    box = (x + 2, y + 2, x + CELL - 3, y + CELL - 3)
    draw.rectangle(box, fill, INK if same else None, 2 if same else 0)
    text, ink = ("no face", PALE) if value is None else (f"{value:.2f}", PAPER if share > 0.55 else INK)
    draw.text((x + CELL // 2, y + CELL // 2), text, ink, ImageFont.load_default(15), anchor="mm")


def report_text(results: Sequence[Seen], references: Sequence[Seen]) -> str:
    """A line for each result (its person's photos, and the most similar other person), then for each person."""
    lines = [_result_line(face, references) for face in results]
    return "\n".join([*lines, *(_person_line(p, references) for p in sorted({face.person for face in references}))])


def _result_line(face: Seen, references: Sequence[Seen]) -> str:
    if face.embedding is None:
        return f"{face.name}: no face found"
    (row,) = similarities([face], references)
    by_person: dict[int, list[float]] = {}
    for other, value in zip(references, row):
        by_person.setdefault(other.person, []).append(value)
    own = by_person.pop(face.person, [])
    line = f"{face.name}: there is no photo of person {face.person}"
    if own:
        line = f"{face.name}: {sum(own) / len(own):.2f} like person {face.person} ({min(own):.2f} to {max(own):.2f})"
    if not by_person:
        return line
    means = {person: sum(values) / len(values) for person, values in by_person.items()}
    other = max(means, key=means.get)
    return f"{line}, {means[other]:.2f} like person {other}, the next"


def _person_line(person: int, references: Sequence[Seen]) -> str:
    own = [face for face in references if face.person == person]
    if len(own) == 1:
        return f"person {person}: one photo"
    first, second = torch.tril_indices(len(own), len(own), -1)
    pairs = cosines(own, own)[first, second]
    least = int(pairs.argmin())
    i, j = own[int(first[least])], own[int(second[least])]
    value, mean = pairs[least].item(), pairs.mean().item()
    return f"person {person}: photos {mean:.2f} like each other, least {j.name} and {i.name} with {value:.2f}"
