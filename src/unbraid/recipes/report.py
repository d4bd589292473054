"""The HTML report of an audit: one self-contained page, no network, no script.

`ReportSummary` is everything the page shows, as plain data (JSON-ready): the recipe fills it in,
`render_report` draws it. All text in it is untrusted (prompts, replies, tokens of any model): it is escaped,
control characters are made visible, and every piece is isolated so that right-to-left text cannot reorder its
surroundings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unbraid.ui.charts import Point, Series, before_after, interval_bar, line_chart, percent
from unbraid.ui.text import alpha, visible


class IntervalDict(TypedDict):
    """An estimate with its interval, as `unbraid.stats.bootstrap.Interval.as_dict()` gives it."""

    value: float
    low: float
    high: float
    n: int


class Headline(TypedDict):
    """What the page says first; all shares in [0, 1] on the report split."""

    behaviour: str
    """The failure in a few words, such as "refuses, then gives a dosage"."""
    verdict: str
    """One sentence that a reader may quote."""
    before: IntervalDict
    """Incident rate without the guard."""
    after: IntervalDict
    """Incident rate under the policy."""
    difference: IntervalDict
    """after − before, paired by prompt."""
    harmless_unchanged: IntervalDict
    """Share of harmless prompts whose answer is the same with and without the guard."""
    header_kept: NotRequired[IntervalDict]
    """Share of probe replies under the policy that keep the refusal header."""


class ExampleReply(TypedDict):
    """One reply of the example conversation."""

    text: str
    incident: bool
    """Whether this reply shows the failure."""
    incident_span: NotRequired[tuple[int, int] | None]
    """Characters [start, end) of `text` that show it."""
    edits_fired: NotRequired[int | None]
    """How many times the policy's edits fired in it."""


class ExampleConversation(TypedDict):
    """The same prompt, same seed, without and with the guard."""

    prompt: str
    before: ExampleReply
    after: ExampleReply


class ConditionRow(TypedDict):
    """One line of the before/after table; None where a column does not apply."""

    name: str
    note: str
    """A few words on what was done; may be empty."""
    incidents: IntervalDict
    header_kept: IntervalDict | None
    helpful: IntervalDict | None
    """Share of harmless prompts that got the expected answer."""
    false_refusals: IntervalDict | None
    edits_per_reply: float | None
    """Mean number of times an edit fired per probe reply."""
    chosen: NotRequired[bool]
    """Whether this line is the deployed policy."""


class TokenActivation(TypedDict):
    """One token of an example and the latent's activation on it."""

    token: str
    value: float


class SentenceExample(TypedDict):
    """A document window on which the latent fires."""

    tokens: list[TokenActivation]
    value: float
    """The highest activation in it."""
    document: str
    """Document id."""
    note: str
    """What kind of document it is; may be empty."""


class TokenWeight(TypedDict):
    """A token that the latent's decoder row promotes or suppresses, and its logit."""

    token: str
    value: float


class FoundLatent(TypedDict):
    """One of the latents that separate the bad replies from the good, AUROC on the report split."""

    latent: int
    auroc: IntervalDict
    q_value: float
    role: str
    """Such as "main" or "honest pole"."""


class Feature(TypedDict):
    """The best latent and what it was compared with."""

    latent: int
    site: str
    density: float
    """Share of tokens on which it fires."""
    max: float
    """Its highest activation in the index; the highlight's full scale."""
    auroc: IntervalDict
    """Held-out AUROC of the latent."""
    linear_auroc: IntervalDict
    """Held-out AUROC of the best linear read-out at the same site."""
    linear_name: str
    """Which read-out that is."""
    null_auroc: NotRequired[float | None]
    """95 % point of the best AUROC over all latents when labels are shuffled."""
    promoted: list[TokenWeight]
    suppressed: list[TokenWeight]
    examples: list[SentenceExample]
    found: list[FoundLatent]


class DosePoint(TypedDict):
    """One dose of one series."""

    dose: float
    incidents: IntervalDict
    helpful: IntervalDict | None


class DoseSeries(TypedDict):
    """A dose–response line; the first series in the list is the policy's own, the others are controls."""

    name: str
    points: list[DosePoint]


class DoseResponse(TypedDict):
    """Incidents and helpful answers over the dose."""

    dose_label: str
    chosen: float | None
    """The dose that the policy uses; chosen on the selection split."""
    split: str
    """Name of the split the curve was measured on."""
    series: list[DoseSeries]


class QualityRow(TypedDict):
    """One metric of the sparse autoencoder."""

    name: str
    meaning: str
    value: IntervalDict
    percent: bool
    """Whether to print it as a percentage."""


class Split(TypedDict):
    """One of the disjoint sets of documents."""

    name: str
    purpose: str
    documents: int
    id: str


class Artifact(TypedDict):
    """One folder with a manifest."""

    kind: str
    path: str
    id: str


class Command(TypedDict):
    """A command that the reader can run."""

    purpose: str
    command: str


class Lineage(TypedDict):
    """Where every number came from."""

    disjoint: bool
    """Whether the splits share no document."""
    splits: list[Split]
    artifacts: list[Artifact]
    commands: list[Command]
    seed: int
    versions: Mapping[str, str]


class ReportSummary(TypedDict):
    """Everything on the page."""

    title: str
    lede: str
    """One or two sentences: which model, which question."""
    headline: Headline
    example: ExampleConversation | None
    conditions: list[ConditionRow]
    feature: Feature
    dose: DoseResponse
    mistaken: list[SentenceExample]
    """Strongest examples of the latent outside the positive set."""
    quality: list[QualityRow]
    lineage: Lineage
    limits: list[str]
    """Sentences on what the numbers do not show; may be empty."""


def render_report(summary: ReportSummary, *, language: str = "en") -> str:
    """The page as one HTML string; the same summary gives the same bytes.

    `language` is the HTML `lang` of the page's own words. Raises jinja2.UndefinedError when a required key is
    missing.
    """
    environment = Environment(
        loader=PackageLoader("unbraid.recipes"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    filters: dict[str, Any] = environment.filters  # pyright: ignore[reportAssignmentType]
    filters.update(
        pct=_pct, span=_span, num=_num, points=_points, alpha=alpha, marked=_marked, style=series_style
    )
    clean = cast("dict[str, Any]", _visible_all(summary))
    charts = _charts(cast("ReportSummary", clean))
    # Summary strings are data all the way: the template is the only place where markup comes from.
    return environment.get_template("report.html.j2").render(s=clean, charts=charts, language=language)


def series_style(i: int) -> int:
    """The CSS style of a chart's i-th line: the policy's own first, then the controls; 1 is the failure's."""
    return 0 if i == 0 else 2 + (i - 1) % 4


def _visible_all(value: object) -> object:
    if isinstance(value, str):
        # Joining plain characters also turns a Markup that somebody slipped in back into text to be escaped.
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _visible_all(item) for key, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_visible_all(item) for item in cast("Sequence[object]", value)]
    return value


def _charts(s: ReportSummary) -> dict[str, object]:
    headline, conditions, dose = s["headline"], s["conditions"], s["dose"]
    top = max([c["incidents"]["high"] for c in conditions if math.isfinite(c["incidents"]["high"])] or [1.0])
    return {
        "headline": before_after(
            [
                ("without the guard", _point(headline["before"]), 1),
                ("with the policy", _point(headline["after"]), 0),
            ]
        ),
        "conditions": [
            interval_bar(_point(c["incidents"]), min(1.0, top), style=0 if c.get("chosen") else 1)
            for c in conditions
        ],
        "dose_incidents": _dose_chart(dose, "incidents", "replies with the failure"),
        "dose_helpful": _dose_chart(dose, "helpful", "harmless prompts answered as expected"),
    }


def _dose_chart(dose: DoseResponse, key: str, label: str) -> Markup:
    series = [
        Series(
            line["name"],
            tuple(
                _point(cast("IntervalDict", p[key]), p["dose"])
                for p in cast("list[dict[str, Any]]", line["points"])
                if p[key] is not None
            ),
            series_style(i),
        )
        for i, line in enumerate(dose["series"])
    ]
    return line_chart(
        series, x_label=dose["dose_label"], y_label=label, marked_x=dose["chosen"], marked_label="policy"
    )


def _point(interval: IntervalDict, x: float = 0.0) -> Point:
    return Point(x=x, y=interval["value"], low=interval["low"], high=interval["high"])


def _pct(interval: IntervalDict | float | None, digits: int = 1) -> str:
    value = interval["value"] if isinstance(interval, Mapping) else interval
    return "–" if value is None or not math.isfinite(value) else percent(value, digits)


def _num(interval: IntervalDict | float | None, digits: int = 3) -> str:
    value = interval["value"] if isinstance(interval, Mapping) else interval
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def _span(interval: IntervalDict, digits: int = 1, scale: float = 100.0) -> str:
    """The interval's two ends: percentages with scale 100, plain numbers with scale 1."""
    low, high = interval["low"], interval["high"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    between = "to" if low < 0 else "–"
    return f"{scale * low:.{digits}f} {between} {scale * high:.{digits}f}".replace("-", "−")


def _points(interval: IntervalDict) -> str:
    """A difference of shares in percentage points, with its sign."""
    value = interval["value"]
    return "–" if not math.isfinite(value) else f"{100 * value:+.1f}".replace("-", "−")


def _marked(reply: ExampleReply) -> Markup:
    """The reply's text with the characters that show the failure marked."""
    text, span = reply["text"], reply.get("incident_span")
    if not span:
        return Markup("{}").format(text)
    start, end = max(0, span[0]), min(len(text), span[1])
    return Markup("{}<mark>{}</mark>{}").format(text[:start], text[start:end], text[end:])


def _finalize(value: object) -> object:
    return "" if value is None else value
