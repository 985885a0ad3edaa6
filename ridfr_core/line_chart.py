"""A line chart, drawn with Pillow alone: ComfyUI has no plotting library."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PALE, GRID, PAPER = (24, 26, 30), (110, 114, 122), (226, 228, 232), (255, 255, 255)
# Okabe and Ito's colours, which colour-blind people tell apart
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (60, 60, 60))
SIZE, PLOT, LEGEND = (960, 540), (80, 60, 740, 470), 760  # px: the picture, the plot's left, top, right, bottom


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str,
               x_end: float) -> Image.Image:
    """Draw lines through (x, y) points, each named in the legend, over x from 0 to `x_end`.

    The y axis holds all points and ends at multiples of 0.1. Lines without points are left out.
    """
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font, large = ImageDraw.Draw(picture), ImageFont.load_default(16), ImageFont.load_default(22)
    left, top, right, bottom = PLOT
    low, high = _tenths([y for points in lines.values() for _, y in points if y == y])

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_end, bottom - (bottom - top) * (y - low) / (high - low)

    draw.text((left, 18), title, INK, large)
    draw.text((left, top - 8), y_label, PALE, font, anchor="lb")
    draw.text(((left + right) / 2, bottom + 46), x_label, PALE, font, anchor="mm")
    for tenth in range(round(low * 10), round(high * 10) + 1):
        y = place(0, tenth / 10)[1]
        draw.line((left, y, right, y), GRID)
        draw.text((left - 10, y), f"{tenth / 10:.1f}", PALE, font, anchor="rm")
    for quarter in range(5):
        x = place(x_end * quarter / 4, low)[0]
        draw.line((x, bottom, x, bottom + 6), PALE)
        draw.text((x, bottom + 18), f"{x_end * quarter / 4:g}", PALE, font, anchor="mm")
    drawn = {name: points for name, points in lines.items() if points}
    for i, (name, points) in enumerate(drawn.items()):
        colour, spots = COLOURS[i % len(COLOURS)], [place(*point) for point in points if point[1] == point[1]]
        draw.line(spots, colour, 3, joint="curve")
        for x, y in spots:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        if top + 24 * i < bottom:  # beyond, the legend is full
            draw.line((LEGEND, top + 24 * i, LEGEND + 24, top + 24 * i), colour, 3)
            draw.text((LEGEND + 32, top + 24 * i), name, INK, font, anchor="lm")
    return picture


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """The multiples of 0.1 that enclose all values and differ; (0, 1) for none."""
    if not values:
        return 0.0, 1.0
    low, high = min(values) // 0.1 / 10, -(-max(values) // 0.1) / 10
    return low, max(high, low + 0.1)
