"""Plots: round ticks that cover the data, lines inside the canvas, names escaped."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.trainer.report.plots import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Series,
    bar_plot,
    format_number,
    line_plot,
    nice_ticks,
    smoothed,
    stacked_plot,
    thin,
)

finite = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)


@given(finite, finite)
def test_ticks_are_round_and_cover_the_data(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1e-9, ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    gaps = [after - before for before, after in itertools.pairwise(ticks)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3) for gap in gaps)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12, "12"),
        (100, "100"),
        (1234.5, "1234"),
        (12345, "12,345"),
        (3e-5, "3.0e-5"),
        (-2.25, "-2.25"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


@given(st.lists(st.tuples(st.integers(0, 1000), finite), min_size=1, max_size=60, unique_by=lambda point: point[0]))
def test_lines_stay_inside_the_canvas(points: list[tuple[int, float]]) -> None:
    svg = line_plot([Series(name="a", points=sorted(points))], label="plot")
    for places in re.findall(r'points="([^"]*)"', svg):
        for place in places.split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_nothing_to_draw_draws_nothing() -> None:
    assert line_plot([Series(name="a", points=())], label="x") == ""
    assert stacked_plot([], label="x") == ""
    assert bar_plot({}, label="x") == ""


def test_names_are_escaped() -> None:
    evil = '<b>"&'
    points = [(1.0, 1.0), (2.0, 3.0)]
    for svg in (
        line_plot([Series(name=evil, points=points)], label=evil),
        stacked_plot([Series(name=evil, points=points)], label=evil),
        bar_plot({evil: 1.0}, label=evil),
    ):
        assert "<b>" not in svg
        assert 'aria-label="&lt;b&gt;&quot;&amp;"' in svg


def test_stacked_areas_lie_on_each_other() -> None:
    series = [Series(name="a", points=[(1, 1.0), (2, 1.0)]), Series(name="b", points=[(2, 1.0)])]
    lower, upper = re.findall(r'points="([^"]*)"', stacked_plot(series, label="x"))
    # The floor of the second runs back along the top of the first.
    assert upper.split()[2:] == list(reversed(lower.split()[:2]))
    assert upper.split()[0] == lower.split()[0]


def test_many_points_are_thinned_to_their_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(4 * MAX_POINTS)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert all(value == 0.5 for _, value in thinned)
    assert thinned[-1][0] == points[-1][0]


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert [value for _, value in smoothed([(step, 3.0) for step in range(100)])] == pytest.approx([3.0] * 100)
    assert smoothed([(step, float(step)) for step in range(100)])[0] == (0, 0.0)
