"""The small charts of the feature browser, as SVG without styles or scripts: classes decide the colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unbraid.stats.bootstrap import Interval
from unbraid.ui.charts import Bar, Point, Series, bars, line_chart
from unbraid.ui.text import number

WIDTH, HEIGHT = 320, 96


def densities(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Latents by how often they fire."""
    each = [Bar(float(b["low"]), float(b["high"]), int(b["count"])) for b in bins]
    return bars(each, x_label="share of tokens on which it fires", y_label="latents", style=2)


def histogram(
    counts: Sequence[int],
    low: float,
    high: float,
    label: str,
    *,
    style: int = 2,
    names: Sequence[str] = (),
) -> Markup:
    """Counts in bins of equal width from `low` to `high`, or in bins with names; not the empty last ones.

    Heights are square roots, so that a bin with a single count can be seen beside one with thousands.
    """
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    width = (high - low) / len(counts)
    counts = counts[: filled[-1] + 1]
    edges = [low + i * width for i in range(len(counts) + 1)]
    bins = names or [f"{number(edges[i])} to {number(edges[i + 1])}" for i in range(len(counts))]
    ends = (bins[0], bins[len(counts) - 1]) if names else (number(low), number(edges[-1]))
    step, floor = WIDTH / len(counts), HEIGHT - 18
    parts: list[Markup] = []
    for i, count in enumerate(counts):
        if count:
            height = max((count / max(counts)) ** 0.5 * (floor - 4), 1.5)
            parts.append(
                Markup(
                    '<rect class="column" data-v="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                ).format(f"{bins[i]}: {count:,}", i * step, floor - height, max(step - 0.8, 0.6), height)
            )
    if not names and low < 0 < edges[-1]:
        zero = -low / width * step
        parts.append(
            Markup('<line class="mark" x1="{:.1f}" y1="0" x2="{:.1f}" y2="{}"/>').format(zero, zero, floor)
        )
    return Markup(
        '<svg class="chart bins" viewBox="0 0 {} {}" role="img" aria-label="{}"><g class="s{}">{}</g>'
        '<text x="0" y="{}">{}</text><text x="{}" y="{}" text-anchor="end">{}</text></svg>'
    ).format(
        WIDTH, HEIGHT, label, style, Markup("").join(parts), HEIGHT - 4, ends[0], WIDTH, HEIGHT - 4, ends[1]
    )


def octaves(count: int) -> list[str]:
    """Names of bins each twice as wide as the one before: 0, 1, 2 – 3, 4 – 7 …"""
    return ["0", "1", *(f"{2**i} – {2 ** (i + 1) - 1}" for i in range(1, count - 1))][:count]


def dose_response(finding: Mapping[str, Any], quantity: str, label: str) -> Markup:
    """A finding's curve with the controls at their doses."""
    points = [
        (float(p["dose"]), Interval(**p[quantity]) if isinstance(p[quantity], Mapping) else p[quantity])
        for p in finding["curve"]
        if p[quantity] is not None
    ]
    if len(points) < 2:
        return Markup("")
    series = [Series("these latents", tuple(_point(dose, value) for dose, value in points), 0)]
    start = points[0]
    for row in finding["rows"]:
        if row["kind"] in ("random latents", "random direction") and row[quantity] is not None:
            dose = float(row["settings"].get("dose", finding["dose"]))
            ends = (_point(*start), _point(dose, row[quantity]))
            series.append(Series(row["name"], ends, 2 if row["kind"] == "random latents" else 3))
    return line_chart(
        series,
        x_label="dose: multiples of the latents' own contribution removed",
        y_label=label,
        marked_x=float(finding["dose"]),
        marked_label="reported",
    )


def _point(dose: float, value: Interval) -> Point:
    return Point(dose, value.value, value.low, value.high)


def scatter_map(points: Sequence[Mapping[str, Any]], key: str) -> Markup:
    """A map of latents: each a link to its page, coloured by its group.

    The links are for the pointer; whoever uses the keyboard has the table of all latents.
    """
    if not points:
        return Markup("")
    xs, ys = [float(p["x"]) for p in points], [float(p["y"]) for p in points]
    left, bottom = min(xs), min(ys)
    scale = max(max(xs) - left, max(ys) - bottom, 1e-12)
    size = 560
    marks = [
        Markup(
            '<a href="/i/{}/latents/{}" tabindex="-1" aria-label="{}">'
            '<circle class="spot c{}" cx="{:.1f}" cy="{:.1f}" r="{}" data-v="{}"/>'
            "</a>"
        ).format(
            key,
            p["latent"],
            p["name"],
            int(p.get("group", 0)) % 6,
            8 + (x - left) / scale * (size - 16),
            8 + (bottom + scale - y) / scale * (size - 16),
            3 if len(points) > 800 else 4,
            p["name"],
        )
        for p, x, y in zip(points, xs, ys, strict=True)
    ]
    return Markup(
        '<svg class="chart map" viewBox="0 0 {} {}" role="group" aria-label="map of latents">{}</svg>'
    ).format(size, size, Markup("").join(marks))
