"""Axes of a drawing: round ticks that cover the range, and what they say of where they begin."""

import re

import pytest

from foveate.io.plot import MOST, Plot, begins, names, ticks


@pytest.mark.parametrize(
    ("low", "high", "first", "last", "count"),
    [(0, 1, 0, 1, 11), (0, 1.05, 0, 1, 11), (0.8, 0.92, 0.8, 0.92, 7), (0.3, 0.72, 0.3, 0.7, 9),
     (0, 0.0005, 0, 0, 1), (0.85, 0.97, 0.86, 0.96, 6), (0, 3, 0, 3, 7)],
)  # fmt: skip
def test_ticks_are_round_and_within(low, high, first, last, count):
    found = ticks(low, high)
    assert found[0] == pytest.approx(first)
    assert found[-1] == pytest.approx(last)
    assert len(found) == count <= MOST
    assert all(low - 1e-6 <= share <= high + 1e-6 for share in found)


def test_what_is_drawn_is_where_the_axes_say():
    plot = Plot((0.2, 1.0), (0.5, 0.9), "cost", "quality", "spoken")
    drawn = plot.draw()
    ys = dict(re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)<', drawn))
    for y, share in ys.items():
        assert plot.at(0.2, int(share) / 100)[1] + 4 == pytest.approx(float(y), abs=0.11)
    assert "cost; this axis begins at 20, not at 0" in drawn
    assert begins(0.0) == ""


def test_names_of_points_far_from_them_get_a_line():
    points = [(300.0, 200.0)] * 20
    drawn = names(points, [f"method {n}" for n in range(20)], bold=2)
    assert drawn.count("<text") == 20
    assert drawn.count('"tag"') == 2
    assert '<path class="grid"' in drawn
