"""Small charts as inline SVG, drawn on the server: no script, no font, no dependency.

Colours and line styles are CSS classes (`s0`, `s1`, … for series, `grid`, `tick` and `axis` for the rest), so
that the page around the chart decides them and a dark theme needs no second drawing. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Point:
    """One measured value with its interval."""

    x: float
    """Position on the horizontal axis."""
    y: float
    """Estimate."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    ringed: bool = False
    """Whether a ring points it out."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    """What the line shows."""
    points: tuple[Point, ...]
    """The measured values, in any order."""
    style: int
    """Which CSS class draws it: `s<style>`."""
    hollow: bool = False
    """Whether a scatter draws it with open dots, to tell it from another of the same style."""


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    low: float
    """Where it begins, above 0."""
    high: float
    """Where it ends."""
    count: int
    """What is in it."""


@dataclass(frozen=True)
class Scale:
    """A map from data to pixels, straight or by the logarithm."""

    low: float
    high: float
    start: float
    end: float

    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
        span = high - low
        share = 0.5 if span == 0 else (value - low) / span
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high] in about `count` steps."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`, both
    above 0."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    first = max(t for t in every if t <= low * (1 + 1e-9))
    last = min(t for t in every if t >= high * (1 - 1e-9))
    return [t for t in every if first <= t <= last]


def percent(value: float, digits: int = 0) -> str:
    """0.284 as `28 %`."""
    return f"{100 * value:.{digits}f}\u202f%"


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    marked_x: float | None = None,
    marked_label: str = "",
    width: int = 460,
    height: int = 324,
) -> Markup:
    """Lines with interval bands over a shared horizontal axis; values are shares in [0, 1].

    The first series is drawn last, on top of the others. `marked_x` draws a dashed line, say at the chosen
    dose.
    """
    points = [p for s in series for p in s.points if math.isfinite(p.y)]
    if not points:
        return Markup("")
    y_ticks = nice_ticks(0.0, max(min(1.0, max(p.high for p in points)), 0.05), 4)
    xs = sorted({p.x for p in points})
    x_ticks = xs if len(xs) <= 9 else nice_ticks(xs[0], xs[-1], 6)
    left, right, top, bottom = 52, 14, 46, 46
    x = Scale(min(xs[0], x_ticks[0]), max(xs[-1], x_ticks[-1]), left + 8, width - right - 8)
    y = Scale(0.0, y_ticks[-1], height - bottom, top)
    parts: list[Markup] = []
    for tick in y_ticks:
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, percent(tick), "tick", anchor="end"))
    for tick in x_ticks:
        parts.append(_text(x(tick), height - bottom + 18, f"{tick:g}", "tick"))
    parts.append(_text(left, 16, y_label, "axis", anchor="start"))
    parts.append(_text((left + width - right) / 2, height - 8, x_label, "axis"))
    if marked_x is not None:
        parts.append(_line(x(marked_x), top, x(marked_x), height - bottom, "mark"))
        parts.append(_text(x(marked_x), top - 7, marked_label, "tick"))
    for s in reversed(series):
        parts.append(_series(s, x, y))
    description = f"{y_label} by {x_label}: {', '.join(s.name for s in series)}"
    return _svg(parts, width, height, description, "chart")


def bars(
    each: Sequence[Bar], *, x_label: str, y_label: str, style: int = 0, width: int = 460, height: int = 260
) -> Markup:
    """A histogram over a logarithmic axis; nothing for no bins."""
    if not each:
        return Markup("")
    left, right, top, bottom = 58, 14, 34, 46
    x = Scale(each[0].low, each[-1].high, left + 8, width - right - 8, logarithmic=True)
    ticks = nice_ticks(0.0, max(bar.count for bar in each), 4)
    y = Scale(0.0, ticks[-1], height - bottom, top)
    parts: list[Markup] = []
    for tick in ticks:
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:,.6g}", "tick", anchor="end"))
    powers = [10.0**n for n in range(math.floor(math.log10(x.low)), math.ceil(math.log10(x.high)) + 1)]
    inside = [p for p in powers if x.low <= p <= x.high]
    if len(inside) < 2:
        inside = [t for t in log_ticks(x.low, x.high) if x.low <= t <= x.high]
    for tick in inside:
        parts.append(_text(x(tick), height - bottom + 18, f"{tick:g}", "tick"))
    parts.append(_text(left, 16, y_label, "axis", anchor="start"))
    parts.append(_text((left + width - right) / 2, height - 8, x_label, "axis"))
    columns = [
        Markup(
            '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
            "<title>{}</title></rect>"
        ).format(
            x(bar.low) + 0.5,
            y(bar.count),
            max(x(bar.high) - x(bar.low) - 1, 0.5),
            y(0.0) - y(bar.count),
            f"{bar.low:.3g} to {bar.high:.3g}: {bar.count:,}",
        )
        for bar in each
    ]
    parts.append(Markup('<g class="s{}">{}</g>').format(style, Markup("").join(columns)))
    return _svg(parts, width, height, f"{y_label} by {x_label}", "chart")


def scatter(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    band: Sequence[Point] = (),
    width: int = 460,
    height: int = 340,
) -> Markup:
    """Points with their vertical intervals, those of a series joined in the order of x.

    Both axes are logarithmic where all values allow it, so that equal factors are equal distances. `band`
    shades the intervals of points, by x, each reaching to the next.
    """
    points = [p for s in series for p in s.points]
    if not points:
        return Markup("")
    left, right, top, bottom = 58, 14, 34, 46
    x = _axis([p.x for p in points], left + 8, width - right - 8)
    y = _axis([v for p in points for v in (p.y, p.low, p.high)], height - bottom, top)
    parts: list[Markup] = []
    for tick in _ticks(y):
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:.6g}", "tick", anchor="end"))
    for tick in _ticks(x):
        parts.append(_text(x(tick), height - bottom + 18, f"{tick:.6g}", "tick"))
    parts.append(_text(left, 16, y_label, "axis", anchor="start"))
    parts.append(_text((left + width - right) / 2, height - 8, x_label, "axis"))
    if band:
        ends = [*(p.x for p in band[1:]), x.high]
        upper = [
            f"{x(at):.1f},{y(p.high):.1f}" for p, end in zip(band, ends, strict=True) for at in (p.x, end)
        ]
        lower = [
            f"{x(at):.1f},{y(p.low):.1f}" for p, end in zip(band, ends, strict=True) for at in (p.x, end)
        ]
        outline = " ".join(upper + lower[::-1])
        parts.append(Markup('<polygon class="front" points="{}"/>').format(outline))
    for s in series:
        ordered = sorted(s.points, key=lambda p: p.x)
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in ordered)
        marks = [Markup('<polyline class="line" points="{}"/>').format(path)]
        for p in ordered:
            marks.append(_line(x(p.x), y(p.low), x(p.x), y(p.high), "whisker"))
            if p.ringed:
                marks.append(
                    Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="7"/>').format(x(p.x), y(p.y))
                )
            said = f"{s.name}: {p.y:.4g} ({p.low:.4g} – {p.high:.4g}) at {p.x:.4g}"
            marks.append(
                Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(
                    x(p.x), y(p.y), said
                )
            )
        kind = f"s{s.style} hollow" if s.hollow else f"s{s.style}"
        parts.append(Markup('<g class="{}">{}</g>').format(kind, Markup("").join(marks)))
    description = f"{y_label} by {x_label}: {', '.join(s.name for s in series if s.points)}"
    return _svg(parts, width, height, description, "chart")


def _axis(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale whose ends are ticks around all values."""
    low, high = min(values), max(values)
    if low > 0:
        ticks = log_ticks(low, high)
        return Scale(ticks[0], ticks[-1], start, end, logarithmic=True)
    ticks = nice_ticks(low, high)
    return Scale(ticks[0], ticks[-1], start, end)


def _ticks(scale: Scale) -> list[float]:
    """The ticks of an axis, of a long logarithmic one the powers of ten alone."""
    if not scale.logarithmic:
        return nice_ticks(scale.low, scale.high)
    ticks = log_ticks(scale.low, scale.high)
    return ticks if len(ticks) <= 9 else [t for t in ticks if math.log10(t) % 1 < 1e-9]


def before_after(rows: Sequence[tuple[str, Point, int]], *, width: int = 460) -> Markup:
    """One row per condition (name, value, style): a bar with its interval; `Point.x` is not used."""
    row, top, left, right = 58, 8, 8, 8
    height = top + row * len(rows) + 24
    ticks = nice_ticks(0.0, max(min(1.0, max(p.high for _, p, _ in rows)), 0.05), 4)
    x = Scale(0.0, ticks[-1], left + 14, width - right - 18)
    parts: list[Markup] = []
    for tick in ticks:
        parts.append(_line(x(tick), top, x(tick), height - 24, "grid"))
        parts.append(_text(x(tick), height - 6, percent(tick), "tick"))
    for i, (name, point, style) in enumerate(rows):
        y = top + row * i + 38
        parts.append(_text(x(0) + 6, y - 20, name, "axis", anchor="start"))
        parts.append(
            Markup('<line class="s{} bar" x1="{:.1f}" y1="{}" x2="{:.1f}" y2="{}"/>').format(
                style, x(0), y, x(point.y), y
            )
        )
        parts.append(_whisker(point, x, y, style))
    said = "; ".join(f"{n} {percent(p.y, 1)}" for n, p, _ in rows)
    return _svg(parts, width, height, said, "chart")


def interval_bar(point: Point, top: float, *, style: int = 0, width: int = 120, height: int = 16) -> Markup:
    """A dot with its interval on a scale from 0 to `top`, small enough for a table cell."""
    x = Scale(0.0, top, 4, width - 5)
    y = height / 2
    parts = [
        _line(x(0), y, x(top), y, "grid"),
        _line(x(0), 2, x(0), height - 2, "zero"),
        _whisker(point, x, y, style, r=3.5),
    ]
    return _svg(parts, width, height, "", "cellbar")


def matrix(rows: Sequence[Sequence[float]], label: str, *, style: int = 0, cell: int = 7) -> Markup:
    """A square for every value in [0, 1], the more opaque the larger; values below 0.02 are left blank."""
    width, height = cell * max(len(row) for row in rows), cell * len(rows)
    parts = [
        Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}"/>').format(
            cell * j, cell * i, cell, cell, min(value, 1.0)
        )
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if value >= 0.02
    ]
    frame = Markup('<rect class="frame" width="{}" height="{}"/>').format(width, height)
    group = Markup('<g class="s{}">{}</g>').format(style, Markup("").join(parts))
    return _svg([group, frame], width, height, label, "chart")


def arrows(vectors: Sequence[tuple[float, float]], label: str, *, reach: float, size: int = 150) -> Markup:
    """Vectors from the middle of a square that shows [−reach, reach] both ways; the i-th has style s<i>."""
    x, y = Scale(-reach, reach, 4, size - 4), Scale(-reach, reach, size - 4, 4)
    parts = [_line(x(-reach), y(0), x(reach), y(0), "grid"), _line(x(0), y(-reach), x(0), y(reach), "grid")]
    for i, (a, b) in enumerate(vectors):
        parts.append(
            Markup('<g class="s{}">{}<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="5"/></g>').format(
                i, _line(x(0), y(0), x(a), y(b), "vector"), x(a), y(b)
            )
        )
    return _svg(parts, size, size, label, "chart")


def _series(s: Series, x: Scale, y: Scale) -> Markup:
    points = sorted((p for p in s.points if math.isfinite(p.y)), key=lambda p: p.x)
    if not points:
        return Markup("")
    upper = [f"{x(p.x):.1f},{y(min(p.high, y.high)):.1f}" for p in points]
    lower = [f"{x(p.x):.1f},{y(max(p.low, 0.0)):.1f}" for p in reversed(points)]
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in points)
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}</title></circle>').format(
            x(p.x), y(p.y), _said(s.name, p)
        )
        for p in points
    )
    return Markup(
        '<g class="s{}"><polygon class="band" points="{}"/><polyline class="line" points="{}"/>{}</g>'
    ).format(s.style, " ".join(upper + lower), path, dots)


def _said(name: str, p: Point) -> str:
    return f"{name}, {p.x:g}: {percent(p.y, 1)} ({percent(p.low, 1)} – {percent(p.high, 1)})"


def _whisker(point: Point, x: Scale, y: float, style: int, r: float = 6) -> Markup:
    low, high = x(max(point.low, x.low)), x(min(point.high, x.high))
    return Markup(
        '<g class="s{}"><line class="whisker" x1="{:.1f}" y1="{}" x2="{:.1f}" y2="{}"/>'
        '<circle class="dot" cx="{:.1f}" cy="{}" r="{}"/></g>'
    ).format(style, low, y, high, y, x(min(max(point.y, x.low), x.high)), y, r)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _svg(parts: Sequence[Markup], width: int, height: int, label: str, kind: str) -> Markup:
    label_html = (
        Markup('role="img" aria-label="{}"').format(escape(label)) if label else Markup('aria-hidden="true"')
    )
    return Markup('<svg class="{}" viewBox="0 0 {} {}" {}>{}</svg>').format(
        kind, width, height, label_html, Markup("").join(parts)
    )
