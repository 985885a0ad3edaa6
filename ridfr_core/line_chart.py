"""A line chart, drawn with Pillow alone: ComfyUI has no plotting library."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from PIL import Image, ImageDraw, ImageFont

INK, PALE, GRID, PAPER = (24, 26, 30), (110, 114, 122), (226, 228, 232), (255, 255, 255)
# Okabe and Ito's colours, which colour-blind people tell apart
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (60, 60, 60))
SIZE, PLOT, LEGEND = (960, 540), (80, 60, 740, 470), 760  # px: the picture, the plot's left, top, right, bottom
INTERVALS = 20  # between marks of the y axis
LARGEST = 1e30  # values beyond it are not drawn


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str,
               x_end: float) -> Image.Image:
    """Draw lines through (x, y) points, each named in the legend, over x from 0 to `x_end`, which is above 0.

    The y axis holds all points and ends at its marks. Points beyond 0..x_end or +-LARGEST or not finite, and lines
    without any other, are left out.
    """
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font, large = ImageDraw.Draw(picture), ImageFont.load_default(16), ImageFont.load_default(22)
    left, top, right, bottom = PLOT
    drawn = {name: [(x, y) for x, y in points if 0 <= x <= x_end and abs(y) <= LARGEST]
             for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    marks = y_marks([y for points in drawn.values() for _, y in points])
    low, high = marks[0], marks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_end, bottom - (bottom - top) * (y - low) / (high - low)

    draw.text((left, 6), title, INK, large)
    draw.text((left, top - 8), y_label, PALE, font, anchor="lb")
    draw.text(((left + right) / 2, bottom + 46), x_label, PALE, font, anchor="mm")
    for mark in marks:
        y = place(0, mark)[1]
        draw.line((left, y, right, y), GRID)
        draw.text((left - 10, y), f"{mark:.1f}" if abs(mark) < 100 else f"{mark:.3g}", PALE, font, anchor="rm")
    for quarter in range(5):
        x = place(x_end * quarter / 4, low)[0]
        draw.line((x, bottom, x, bottom + 6), PALE)
        draw.text((x, bottom + 18), f"{x_end * quarter / 4:g}", PALE, font, anchor="mm")
    for i, (name, points) in enumerate(drawn.items()):
        colour, spots = COLOURS[i % len(COLOURS)], [place(*point) for point in points]
        draw.line(spots, colour, 3, joint="curve")
        for x, y in spots:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        if top + 24 * i < bottom:  # beyond, the legend is full
            draw.line((LEGEND, top + 24 * i, LEGEND + 24, top + 24 * i), colour, 3)
            draw.text((LEGEND + 32, top + 24 * i), name, INK, font, anchor="lm")
    return picture


def y_marks(values: Sequence[float]) -> list[float]:
    """Rising marks that enclose all values, at most INTERVALS + 3 of them: multiples of 0.1, or of the smallest larger
    1, 2 or 5 x 10^n that is coarse enough. 0 to 1 for no values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    step, coarser = 0.1, cycle((2, 2.5, 2))
    while (high - low) / step > INTERVALS or step < 1e-9 * max(abs(low), abs(high)):
        step *= next(coarser)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    return [i * step for i in range(first, max(last, first + 1) + 1)]
