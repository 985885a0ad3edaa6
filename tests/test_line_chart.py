"""The chart of lines: points lie where their values say."""

import numpy as np
import pytest

from ridfr_core.line_chart import COLOURS, INTERVALS, PLOT, SIZE, line_chart, y_marks


def coloured(chart, colour):
    """(x, y) of a colour's pixels within the plot."""
    left, top, right, bottom = PLOT
    y, x = np.nonzero((np.asarray(chart)[top - 4 : bottom + 5, left - 4 : right + 5] == colour).all(-1))
    return x + left - 4, y + top - 4


def nothing_at_the_edge(chart):
    pixels = np.asarray(chart)
    return all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_points_lie_at_their_values():
    chart = line_chart({"a": [(5, 0.2), (10, 0.4)], "b": [(5, 0.3)], "none": []}, "title", "step", "similarity", 20)
    assert chart.size == SIZE
    left, top, right, bottom = PLOT
    x, y = coloured(chart, COLOURS[0])
    assert x.min() == pytest.approx(left + (right - left) * 0.25, abs=4)
    assert x.max() == pytest.approx(left + (right - left) * 0.5, abs=4)
    assert y.max() == pytest.approx(bottom, abs=4) and y.min() == pytest.approx(top, abs=4)  # the axis: 0.2 to 0.4
    x, y = coloured(chart, COLOURS[1])
    assert y.mean() == pytest.approx((top + bottom) / 2, abs=4)


@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(1, 0.5)]}, {"a": [(1, float("nan")), (2, -0.31)]}])
def test_little_to_draw(lines):
    assert line_chart(lines, "", "", "", 1).size == SIZE


def test_many_lines_leave_the_picture_whole():
    picture = line_chart({f"picture {i}": [(0, i / 64), (1, 0)] for i in range(64)}, "", "", "", 1)
    assert picture.size == SIZE and nothing_at_the_edge(picture)


@pytest.mark.parametrize("values, marks", [
    ([], [0.1 * i for i in range(11)]),
    ([0.23, 0.3], [0.2, 0.3]),
    ([0.3, 0.3], [0.3, 0.4]),
    ([-1.0, 1.0], [0.1 * i for i in range(-10, 11)]),
    ([0.0, 35.0], [0.0, 2.0, 4.0]),
])
def test_marks(values, marks):
    found = y_marks(values)
    assert found[:len(marks)] == pytest.approx(marks)
    assert found[-1] >= max(values, default=1) - 1e-9


EXTREMES = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 1e30, -1e30, 1e-300, 0.0, 400.0, 3e9)


@pytest.mark.parametrize("a", EXTREMES)
@pytest.mark.parametrize("b", EXTREMES)
def test_whatever_is_drawn_has_few_marks_and_takes_no_time(a, b):
    """Embeddings that are not of unit length give any number."""
    line_chart({"one": [(1, a), (2, b)], "two": [(b, 0.5)]}, "", "", "", 20)
    finite = [value for value in (a, b) if abs(value) <= 1e30]
    assert 2 <= len(y_marks(finite)) <= INTERVALS + 3


def test_thousands_of_lines():
    picture = line_chart({f"picture {i}": [(0, i / 64), (1, 0)] for i in range(5000)}, "", "", "", 1)
    assert picture.size == SIZE and nothing_at_the_edge(picture)
