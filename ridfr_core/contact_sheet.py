"""A contact sheet: people down, versions of each person's face across, a similarity under each."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PALE, PAPER = (24, 26, 30), (110, 114, 122), (255, 255, 255)
MARGIN, GAP = 24, 10  # px


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], similarity: Mapping[str, Sequence[float | None]],
                  title: str, note: str = "", cell: int = 192) -> Image.Image:
    """Draw the sheet.

    columns: name -> one picture per person, in the sheet's order, all columns equally long; each is scaled to
    `cell` x `cell` px. similarity: column name -> one cosine per person, None where no face was found, written
    under the picture; a column may have no similarities. Raises ValueError when the columns differ in length.
    """
    people = len(next(iter(columns.values())))
    if any(len(row) != people for row in (*columns.values(), *similarity.values())):
        raise ValueError(f"Every column of a contact sheet needs {people} entries, one per person.")
    large, small = ImageFont.load_default(26), ImageFont.load_default(18)
    head, caption = MARGIN + 110, 40
    width, height = 2 * MARGIN + len(columns) * (cell + GAP) - GAP, head + people * (cell + caption) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, large)
    draw.text((MARGIN, MARGIN + 36), note, PALE, small)
    for column, (name, pictures) in enumerate(columns.items()):
        left = MARGIN + column * (cell + GAP)
        middle = left + cell // 2
        draw.text((middle, head - 8), name, INK, small, anchor="ms")
        for person, picture in enumerate(pictures):
            top = head + person * (cell + caption)
            sheet.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (left, top))
            if name in similarity:
                value = similarity[name][person]
                text = "no face found" if value is None else f"ID {value:.2f}"
                draw.text((middle, top + cell + 5), text, PALE, small, anchor="ma")
    return sheet
