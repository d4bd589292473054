"""The rule of choice, on measurements made up for it: no model runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unbraid.causal import selection
from unbraid.causal.measure import Measurement, Sampling
from unbraid.causal.selection import Limits, Option, select

PROBES = [SimpleNamespace(id=f"p{i}") for i in range(300)]
BENIGN = [SimpleNamespace(id=f"b{i}") for i in range(300)]


def measurement(
    prompts: list[Any], incident: float, kept: float, helpful: float, refused: float
) -> Measurement:
    n = len(prompts)
    probe = prompts[0].id.startswith("p")
    nan = np.full(n, np.nan)

    def share(rate: float) -> Any:
        return (np.arange(n) % 100 < round(100 * rate)).astype(float)

    outcomes = {
        "incident": share(incident) if probe else nan,
        "kept": share(kept) if probe else nan,
        "helpful": nan if probe else share(helpful),
        "refused": nan if probe else share(refused),
    }
    return Measurement(tuple(p.id for p in prompts), (), outcomes, ())  # type: ignore[arg-type]


@pytest.fixture
def effects(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float, float, float]]:
    known: dict[str, tuple[float, float, float, float]] = {}

    def measure(lm: Any, prompts: Any, edits: Any, sampling: Any) -> Measurement:
        return measurement(list(prompts), *known[edits[0].name])

    monkeypatch.setattr(selection, "measure", measure)
    return known


def choose(effects: dict[str, tuple[float, float, float, float]], **limits: float) -> selection.Selection:
    options = [Option(SimpleNamespace(name=name), {"name": name}) for name in effects]  # type: ignore[arg-type]
    base = (measurement(PROBES, 0.29, 1.0, 0, 0), measurement(BENIGN, 0, 0, 0.95, 0.02))
    return select(None, options, PROBES, BENIGN, base, Sampling(), Limits(**limits))  # type: ignore[arg-type]


def test_the_mildest_of_nearly_equal_options_is_taken(effects: Any) -> None:
    effects |= {"mild": (0.05, 1, 0.95, 0.02), "strong": (0.045, 1, 0.95, 0.02), "weak": (0.2, 1, 0.95, 0.02)}
    assert choose(effects).chosen.settings == {"name": "mild"}


def test_a_clearly_better_option_beats_a_milder_one(effects: Any) -> None:
    effects |= {"mild": (0.12, 1, 0.95, 0.02), "strong": (0.03, 1, 0.95, 0.02)}
    assert choose(effects).chosen.settings == {"name": "strong"}


@pytest.mark.parametrize(
    "costly", [(0.0, 0.9, 0.95, 0.02), (0.0, 1, 0.9, 0.02), (0.0, 1, 0.95, 0.05)]
)  # loses the header, helpfulness, refuses more
def test_an_option_beyond_a_limit_is_never_taken(effects: Any, costly: tuple[float, ...]) -> None:
    effects |= {"costly": costly, "fair": (0.1, 1, 0.95, 0.02)}
    chosen = choose(effects)
    assert chosen.chosen.settings == {"name": "fair"}
    assert len(chosen.tried) == 2  # no more than the finalists, so no heats before


def test_where_all_cost_too_much_the_cheapest_is_taken(effects: Any) -> None:
    effects |= {"worse": (0.0, 0.5, 0.95, 0.02), "bad": (0.1, 0.9, 0.95, 0.02)}
    chosen = choose(effects)
    assert chosen.chosen.settings == {"name": "bad"} and not chosen.result.within(Limits())
