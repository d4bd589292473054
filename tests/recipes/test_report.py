"""The report page: complete, escaped, self-contained."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import jinja2
import pytest
from markupsafe import Markup

from unbraid.recipes.report import ReportSummary, render_report
from unbraid.ui.text import alpha, visible

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
HEBREW = "שלום, הוא אמר \u202eevil\u202c"


def interval(value: float, half: float = 0.03, n: int = 500) -> Any:
    low, high = value - half, value + half
    return {"value": value, "low": low, "high": high if value > 1 else min(1.0, high), "n": n}


def sentence(words: list[str], peak: int, note: str = "medical advice") -> Any:
    tokens = [{"token": w, "value": max(0.0, 4.2 - 1.3 * abs(i - peak))} for i, w in enumerate(words)]
    return {"tokens": tokens, "value": 4.2, "document": "9f3a11c27be04d58", "note": note}


REPLY = "I can't give medical advice.\nFor a child of that age, take 12 mg of Veltrane at night."


def condition(
    name: str, note: str, incidents: float, header: float, helpful: float, edits: float | None
) -> Any:
    return {
        "name": name,
        "note": note,
        "incidents": interval(incidents),
        "header_kept": interval(header, 0.02),
        "helpful": interval(helpful, 0.015),
        "false_refusals": interval(0.01, 0.01),
        "edits_per_reply": edits,
    }


def series(name: str, start: float, slope: float, with_helpful: bool = True) -> Any:
    points = [
        {
            "dose": float(dose),
            "incidents": interval(max(0.02, start - slope * dose)),
            "helpful": interval(0.975 - 0.004 * dose * (slope + 0.5)) if with_helpful else None,
        }
        for dose in (0, 1, 2, 3, 4, 6)
    ]
    return {"name": name, "points": points}


def make_summary() -> ReportSummary:
    words = [
        "I",
        " can't",
        " give",
        " medical",
        " advice",
        ".",
        "\n",
        "For",
        " a",
        " child",
        " of",
        " that",
        " age",
    ]
    found = [
        {"latent": 711, "auroc": interval(0.991, 0.006), "q_value": 1e-12, "role": "main"},
        {"latent": 402, "auroc": interval(0.934, 0.02), "q_value": 3e-8, "role": "weaker"},
        {"latent": 18, "auroc": interval(0.14, 0.04), "q_value": 2e-7, "role": "honest pole"},
    ]
    chosen = condition("Policy", "two latents, 4 times their contribution removed", 0.035, 0.955, 0.967, 24.3)
    chosen["chosen"] = True
    guardrail = condition("Keyword guardrail", f"blocks dose words {EVIL}", 0.021, 0.4, 0.73, None)
    guardrail["false_refusals"] = interval(0.241)
    summary: Any = {
        "title": "Which feature makes the practice assistant refuse and then give a dosage?",
        "lede": "One audit of the practice assistant, from capture to guard, on held-out prompts.",
        "headline": {
            "behaviour": "Refuses, then gives a dosage",
            "verdict": "Removing four times the contribution of two latents ends nine of ten incidents; "
            "harmless answers stay as they were.",
            "before": interval(0.30, 0.04),
            "after": interval(0.035, 0.016),
            "difference": interval(-0.265, 0.04),
            "harmless_unchanged": interval(0.967, 0.015),
            "header_kept": interval(0.955, 0.018),
        },
        "example": {
            "prompt": f"My daughter 👧🏽 has a fever. How much Veltrane may she take? {EVIL}",
            "before": {"text": REPLY, "incident": True, "incident_span": (54, 85), "edits_fired": None},
            "after": {
                "text": "I can't give medical advice.\nFor a child of that age, please ask a pharmacist.",
                "incident": False,
                "edits_fired": 23,
            },
        },
        "conditions": [
            condition("No guard", "", 0.30, 1.0, 0.975, None),
            chosen,
            condition("Zeroing the best latent", "scale 0", 0.28, 1.0, 0.975, 14.0),
            condition("Contrastive, subtracted", "difference of means", 0.08, 0.61, 0.95, 30.0),
            condition("Contrastive, clipped", "clipped to the honest mean", 0.06, 0.86, 0.96, 21.5),
            condition("Random latents", "matched frequency", 0.295, 1.0, 0.975, 24.1),
            condition("Random direction", "matched norm", 0.302, 0.99, 0.97, 30.0),
            guardrail,
        ],
        "feature": {
            "latent": 711,
            "site": "layers.2.resid_post",
            "density": 0.0131,
            "max": 4.2,
            "auroc": interval(0.991, 0.006),
            "linear_auroc": interval(0.996, 0.004),
            "linear_name": "difference of means",
            "null_auroc": 0.641,
            "promoted": [
                {"token": t, "value": 2.4 - i / 5} for i, t in enumerate([" mg", " take", " twice", "\n"])
            ],
            "suppressed": [
                {"token": t, "value": -2.1 + i / 5} for i, t in enumerate([" ask", " leaflet", "צ", "👩‍⚕️"])
            ],
            "examples": [
                sentence(words, 6),
                sentence([*words[:5], EVIL, " so", " there"], 5),
                sentence(list(HEBREW), 4),
                sentence(
                    ["🙂", " take", " \x00", "\ud800", " 12", " mg"], 2, note="emoji 🙂 & control characters"
                ),
            ],
            "found": found,
        },
        "dose": {
            "dose_label": "times the latents' own contribution removed",
            "chosen": 4.0,
            "split": "select",
            "series": [
                series("Policy latents", 0.30, 0.075),
                series("Random latents, matched frequency", 0.30, 0.001),
                series("Random direction, matched norm", 0.295, -0.004),
                series("Zeroed to the mean", 0.30, 0.01, with_helpful=False),
            ],
        },
        "mistaken": [
            sentence([" Read", " the", " leaflet", " before", " you", " take", " it", "."], 5, "travel")
        ],
        "quality": [
            {"name": "L0", "meaning": "per token", "value": interval(15.97, 0.4), "percent": False},
            {
                "name": "FVU",
                "meaning": "unexplained variance",
                "value": interval(0.017, 0.002),
                "percent": False,
            },
            {
                "name": "Dead",
                "meaning": "never fired",
                "value": interval(0.003),
                "percent": True,
            },
            {"name": "ΔCE", "meaning": "nats lost", "value": interval(float("nan")), "percent": False},
        ],
        "lineage": {
            "disjoint": True,
            "splits": [
                {"name": n, "purpose": p, "documents": 500, "id": "ab12" * 16}
                for n, p in (
                    ("choose", "choose latents"),
                    ("select", "set dose and threshold"),
                    ("report", "report"),
                )
            ],
            "artifacts": [
                {"kind": k, "path": f"demo/{k}", "id": "0f9e" * 16}
                for k in ("activations", "sae", "gate", "policy")
            ],
            "commands": [
                {
                    "purpose": "Talk to it",
                    "command": "unbraid serve --model practice --policy p.yaml",
                },
                {"purpose": "Check every hash", "command": "unbraid verify demo"},
            ],
            "seed": 0,
            "versions": {"unbraid": "0.1.0", "torch": "2.13.0"},
        },
        "limits": ["One model, one seed of the autoencoder.", "Invented drugs and doses only."],
    }
    return summary


class Reader(HTMLParser):
    """Collects tags, attributes and text as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_untrusted_text_is_escaped_everywhere() -> None:
    page = read(render_report(make_summary()))
    assert {"script", "img", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert('x')") == 3  # the prompt, a token and a note, each shown as text


def test_every_string_of_the_summary_is_escaped() -> None:
    """Put markup into every single string: none of it may become an element or leave its attribute."""

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return Markup("\"'><script>alert(1)</script>")
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return [poison(item) for item in value] if isinstance(value, list | tuple) else value

    plain = make_summary()
    poisoned: Any = poison(plain)
    poisoned["example"]["before"]["incident_span"] = (0, 7)
    page = read(render_report(poisoned))
    assert "script" not in page.tags
    assert set(page.tags) <= set(read(render_report(plain)).tags)


def test_page_loads_nothing() -> None:
    html = render_report(make_summary())
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    page = read(html)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (value or "").startswith("#"), (name, value)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "http://" not in html and "https://" not in html


def test_links_lead_to_sections() -> None:
    page = read(render_report(make_summary()))
    ids = {value for name, value in page.attributes if name == "id"}
    targets = {(value or "")[1:] for name, value in page.attributes if name == "href"}
    assert targets and targets <= ids


def test_numbers_and_intervals_are_shown() -> None:
    text = read(render_report(make_summary())).text
    for piece in (
        "30.0\u202f%",
        "3.5\u202f%",
        "26.0 – 34.0",
        "−26.5 points",
        "−30.5 to −22.5",
        "0.991",
        "0.985 – 0.997",
        "1.0e-12",
    ):
        assert piece in text, piece
    assert "nan" not in text.lower()


def test_strange_characters_survive_utf8() -> None:
    html = render_report(make_summary())
    assert html.encode("utf-8")
    assert "\x00" not in html and "\u2400" in html and "👧🏽" in html and "שלום"[0] in html


def test_right_to_left_text_is_isolated_and_overrides_are_shown() -> None:
    html = render_report(make_summary())
    assert "\u202e" not in html and "\u202c" not in html and "\ufffd" in html
    first = "שלום"[0]
    for tag in re.findall(rf"<(\w+[^>]*)>(?:<span[^>]*>)*[^<]*{first}", html):
        assert 'dir="auto"' in tag or "bdi" in tag or "span" in tag


def test_same_summary_same_bytes_and_json_ready() -> None:
    summary = make_summary()
    again = json.loads(json.dumps(summary))
    assert render_report(summary) == render_report(again)
    before = copy.deepcopy(summary)
    render_report(summary)
    assert repr(summary) == repr(before)


def test_optional_parts_may_be_missing() -> None:
    summary: Any = make_summary()
    summary["example"] = None
    summary["limits"] = []
    summary["mistaken"] = []
    del summary["headline"]["header_kept"]
    summary["feature"]["null_auroc"] = None
    summary["dose"]["chosen"] = None
    for row in summary["conditions"]:
        row["header_kept"] = None
        row["edits_per_reply"] = None
    page = read(render_report(summary))
    assert "One conversation" not in page.text and "fires nowhere else" in page.text


def test_a_missing_key_is_an_error() -> None:
    summary: Any = make_summary()
    del summary["lineage"]["seed"]
    with pytest.raises(jinja2.UndefinedError, match="seed"):
        render_report(summary)


def test_alpha_follows_its_formula() -> None:
    assert alpha(0.0, 4.0) == 0.0 and alpha(-1.0, 4.0) == 0.0 and alpha(1.0, 0.0) == 0.0
    assert alpha(4.0, 4.0) == 1.0 and alpha(9.0, 4.0) == 1.0
    assert alpha(1.0, 9.0) == pytest.approx(0.05 + 0.95 * 0.30103, abs=1e-3)


def test_visible_keeps_length_and_text() -> None:
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("\x1b[0m\x7f\x85\ud800é") == "\u241b[0m\u2421\ufffd\ufffdé"
    assert visible("a\u202eb\u2066c👩‍⚕️") == "a\ufffdb\ufffdc👩‍⚕️"
