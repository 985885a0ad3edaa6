"""The sweep over held-out people: its grid, its cells and its rows."""

import torch
import torch.nn.functional as F

from ridfr_core.evaluation.guidance_sweep import HEAD, MEASURES, Cell, cells, row


def test_the_grid():
    grid = cells((0.1, 0.2), (1, 2), ((0.0, 1.0), (0.5, 1.0)), ("face", "whole picture"), (0, 5))
    assert len(grid) == len(set(grid)) == 2 * (1 + 4 + 1 + 1 + 2)
    assert Cell(True, 0.2, 2) in grid and Cell(True, 0.1, start=0.5) in grid
    assert Cell(False, 0.1, decode="whole picture") in grid
    assert [cell.step for cell in grid].count(0.0) == 2 and grid[0] == Cell(adapter=False)


def test_rows():
    plain = {name: F.normalize(torch.arange(1.0, 9), dim=0) for name in MEASURES}
    better = {name: values + 0.1 for name, values in plain.items()}
    assert len(row(Cell(True), plain, plain)) == len(HEAD)
    values = row(Cell(True, 0.1), better, plain)
    assert len(values) == len(HEAD) and values[9] == "0.100 [0.100, 0.100]"
    assert values[-1].replace("-0.000", "0.000") == "0.000 [0.000, 0.000]"


def test_a_new_field_leaves_the_names_of_older_cells_alone():
    assert Cell(True, 0.1).name == (("adapter", True), ("step", 0.1), ("iterations", 1), ("start", 0.0), ("end", 1.0),
                                    ("decode", "face"))
    assert Cell(True, 0.1, find_every=0).name == (*Cell(True, 0.1).name, ("find_every", 0))
