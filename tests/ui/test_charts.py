"""Charts: well-formed SVG whose marks lie where the numbers say."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.ui.charts import (
    Point,
    Scale,
    Series,
    before_after,
    interval_bar,
    line_chart,
    log_ticks,
    nice_ticks,
    scatter,
)


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


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e6))
def test_logarithmic_ticks_cover_the_range(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low * (1 + 1e-6) and ticks[-1] >= low * factor * (1 - 1e-6)
    assert ticks == sorted(set(ticks))
    assert all(round(t / 10 ** math.floor(math.log10(t) + 1e-9), 6) in (1, 2, 5) for t in ticks)


def test_equal_factors_are_equal_distances() -> None:
    scale = Scale(1, 100, 0, 10, logarithmic=True)
    assert scale(1) == 0 and scale(10) == pytest.approx(5) and scale(100) == 10


@pytest.mark.parametrize("sign", [1, -1])
def test_scatter_places_points_and_rings_the_marked(sign: int) -> None:
    points = (Point(8, 0.5 * sign, 0.4 * sign, 0.6 * sign, ringed=True), Point(64, 0.05, 0.04, 0.06))
    picture = str(scatter([Series("a<b", points, 2)], x_label="L0", y_label="FVU"))
    root = ET.fromstring(picture)
    dots = [c for c in root.iter("circle") if c.get("class") == "dot"]
    assert len(dots) == 2 and sum(c.get("class") == "ring" for c in root.iter("circle")) == 1
    x, y = ([float(d.get(name, "")) for d in dots] for name in ("cx", "cy"))
    assert x[0] < x[1] and (y[0] < y[1]) == (sign == 1)  # further down is less
    assert "a&lt;b" in picture and scatter([], x_label="", y_label="") == ""
    assert 'class="s2"' in picture
    assert 'class="s2 hollow"' in scatter([Series("c", points, 2, hollow=True)], x_label="", y_label="")
