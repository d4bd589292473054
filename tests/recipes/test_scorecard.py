"""Fronts, matched pairs and histograms of the evaluation's page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from unbraid.recipes.scorecard import front
from unbraid.ui.charts import Bar, Point, Series, bars, scatter

POINTS = st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    points = [Point(x, y, y, y) for x, y in pairs]
    kept = front(points)
    for point in points:
        beaten = any(o.x <= point.x and o.y <= point.y and (o.x, o.y) != (point.x, point.y) for o in points)
        assert beaten != any((k.x, k.y) == (point.x, point.y) for k in kept)
    assert [k.x for k in kept] == sorted(k.x for k in kept)


def test_bars_and_band_are_drawn_in_proportion() -> None:
    drawn = str(bars([Bar(0.01, 0.1, 5), Bar(0.1, 1.0, 10)], x_label="share", y_label="<latents>"))
    assert drawn.count('class="column"') == 2 and "&lt;latents&gt;" in drawn and "<latents>" not in drawn
    heights = [
        float(part.split('"')[0])
        for part in drawn.split('class="column"')[1:]
        for part in [part.split('height="')[1]]
    ]
    assert heights[1] == 2 * heights[0] > 0
    assert str(bars([], x_label="x", y_label="y")) == ""
    points = [Point(1.0, 0.5, 0.4, 0.6), Point(10.0, 0.2, 0.1, 0.3)]
    with_band = str(scatter([Series("a", tuple(points), 0)], x_label="x", y_label="y", band=points))
    outline = with_band.split('class="front" points="')[1].split('"')[0].split()
    assert len(outline) == 8
    assert 'class="front"' not in str(scatter([Series("a", tuple(points), 0)], x_label="x", y_label="y"))
