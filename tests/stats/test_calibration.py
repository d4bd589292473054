"""benchmarks/calibration.py in short: false alarms at 5 %, intervals that hold the truth at 95 %.

Seeds are fixed, so these pass or fail for good; the bounds are what chance alone would cross once in a
thousand such tests, around the nominal 5 % and around 93 to 97 %.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration.py"
SPEC = importlib.util.spec_from_file_location("calibration", PATH)
assert SPEC and SPEC.loader
calibration = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(calibration)

RUNS = 200
INTERVALS = [
    "mean, exponential, 30 documents",
    "mean per token, 20 documents",
    "loss recovered, 20 documents",
    "FVU, 30 documents",
    "paired means, 20 documents",
    "paired rates, 60 prompts, −.15",
    "paired rates, 30 prompts × 4, −.15",
    "rate 0.02, 200 trials",
    "rate 0.05, 60 prompts × 4",
    "auroc 0.7, 20 + 30",
    "auroc 0.9, 40 + 60, sparse",
    "auroc by document, chosen: 0.9, 24 documents × 4, normal, 0.5 common, mixed",
    "auroc by document, chosen: 0.97, 30 documents × 2, normal, 0.3 common, one kind",
    "correlation 0.5, 20 documents × 5",
    "risk difference .3 − .1, 40 + 60",
    "agreement, percent, 30 things, 2 people, 0.9",
    "agreement, kappa, 30 things, 3 people, 0.6",
    "label score, 25 documents × 2, 0.8 and 0.7",
    "concepts, completeness, 15 documents, mean of 1",
    "concepts, auroc, 30 documents, mean of 4",
    "PW-MCC of 3 seeds",
    "mean of 3 seeds",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RESAMPLES", 400)


@pytest.mark.parametrize("name", calibration.TESTS)
def test_no_effect_raises_an_alarm_one_time_in_twenty_at_most(name: str) -> None:
    rng = np.random.default_rng([1, *name.encode()])
    alarms = sum(calibration.TESTS[name](rng) for _ in range(RUNS))
    assert alarms <= binom.ppf(0.999, RUNS, 0.05)


@pytest.mark.parametrize("name", INTERVALS)
def test_the_interval_holds_the_truth_as_often_as_it_says(name: str) -> None:
    rng = np.random.default_rng([2, *name.encode()])
    found = [calibration.INTERVALS[name](rng) for _ in range(RUNS)]
    covered = sum(interval.low <= truth <= interval.high for interval, _, truth in found)
    assert binom.ppf(0.001, RUNS, 0.93) <= covered <= binom.ppf(0.999, RUNS, 0.97)


def test_an_effect_is_seen_by_what_sees_none_where_there_is_none() -> None:
    """So that none of the tests above holds by saying nothing at all."""
    rng = np.random.default_rng(0)
    paired = [calibration.paired_share(rng, 60, 4, 0.6) for _ in range(50)]
    assert sum(interval.low > 0 for interval, _, _ in paired) > 40
    apart = [calibration.separation(rng, 20, 20, 0.85, False) for _ in range(50)]
    assert sum(interval.low > 0.5 for interval, _, _ in apart) > 40


def test_statistics_need_no_torch() -> None:
    import subprocess

    code = (
        "import sys, unbraid.stats.bootstrap, unbraid.stats.effects, unbraid.stats.multiple,"
        " unbraid.stats.permutation, unbraid.stats.splits; print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
