"""Charts: well-formed SVG whose marks lie where the numbers say."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.recipes.charts import Point, Scale, Series, before_after, interval_bar, line_chart, nice_ticks


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 1 <= len(ticks) <= 14


def test_ticks_are_round() -> None:
    assert nice_ticks(0.0, 0.34, 4) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert nice_ticks(2.0, 2.0) == [2.0]


def test_scale_is_straight_and_survives_no_span() -> None:
    assert Scale(0.0, 2.0, 10.0, 30.0)(1.5) == 25.0
    assert Scale(1.0, 1.0, 10.0, 30.0)(1.0) == 20.0


def point(x: float, y: float) -> Point:
    return Point(x, y, y - 0.02, y + 0.02)


def test_line_chart_places_higher_values_higher() -> None:
    series = [
        Series("a <b>", (point(0, 0.1), point(2, 0.3), point(1, 0.2)), 0),
        Series("c", (point(0, 0.2),), 2),
    ]
    svg = ET.fromstring(line_chart(series, x_label="dose", y_label="rate", marked_x=1, marked_label="x"))
    lines = {g.get("class"): g.find("polyline") for g in svg.iter("g")}
    line = lines["s0"]
    assert line is not None
    places = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert (svg.get("aria-label") or "").endswith("a <b>, c")


def test_values_that_are_not_numbers_are_left_out() -> None:
    series = [Series("a", (Point(0, math.nan, math.nan, math.nan), point(1, 0.2)), 0)]
    svg = line_chart(series, x_label="", y_label="")
    assert "nan" not in svg and svg.count("<circle") == 1
    assert line_chart([Series("a", (), 0)], x_label="", y_label="") == ""


def test_bars_escape_names_and_stay_inside() -> None:
    svg = ET.fromstring(before_after([("<before>", point(0, 0.3), 1), ("after", point(0, 0.01), 0)]))
    assert svg.find(".//text[.='<before>']") is not None
    cell = ET.fromstring(interval_bar(Point(0, 0.9, 0.5, 1.4), 1.0))
    for whisker in cell.iter("line"):
        assert 0 <= float(whisker.get("x1") or -1) <= 120 and 0 <= float(whisker.get("x2") or -1) <= 120


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extremes_draw(value: float) -> None:
    ET.fromstring(before_after([("x", Point(0, value, value, value), 0)]))
    ET.fromstring(line_chart([Series("a", (Point(3, value, value, value),), 0)], x_label="", y_label=""))
