"""Limits are read strictly and judged on the interval."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import DEFINITIONS, evaluate
from unbraid.evaluation.gates import Limit, judge, read_limits
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.suites import DEFINITIONS as SUITES
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval


def test_limits_are_read() -> None:
    found = read_limits("fvu<=0.05 dead < 2e-2, delta_ce<=.1 l0>=-1")
    assert [str(limit) for limit in found] == ["fvu<=0.05", "dead<0.02", "delta_ce<=0.1", "l0>=-1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fuv<=0.05", "did you mean fvu"),
        ("accuracy_of_everything>1", "no metric; there are l0, .*; with --suite tpp tpp_threshold_2_total_m"),
        ("scr_metric_treshold_2>0", "did you mean scr_metric_threshold_2"),
        ("probe_top_1>0.8", "probe_top_1, which the suite probing measures; add --suite probing"),
        ("fvu=0.05", "cannot be read from 'fvu=0.05'"),
        ("fvu<=", "cannot be read"),
        ("fvu<=0.05dead<1", "cannot be read"),
        ("fvu<=0.05; rm", "cannot be read"),
        ("fvu<=nan", "cannot be read"),
        ("fvu<=1e999", "too large"),
        ("fvu<=0.05 and", "cannot be read from 'and'"),
        ("  ", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_limits(text)
    assert "\n" not in str(error.value)


@given(
    name=st.sampled_from(sorted(DEFINITIONS)),
    sign=st.sampled_from(["<", "<=", ">", ">="]),
    bound=st.floats(-1e6, 1e6),
)
def test_every_limit_is_read_as_it_was_written(name: str, sign: str, bound: float) -> None:
    (found,) = read_limits(f"{name} {sign} {bound!r}")
    assert (found.metric, found.sign, found.bound) == (name, sign, bound)


@pytest.mark.parametrize(
    ("sign", "bound", "kept"),
    [
        ("<=", 0.3, True),
        ("<", 0.3, False),
        ("<=", 0.25, False),
        ("<=", 0.299, False),
        (">=", 0.1, True),
        (">", 0.1, False),
        (">=", 0.2, False),
    ],
)
def test_the_whole_interval_has_to_keep_a_limit(sign: str, bound: float, kept: bool) -> None:
    assert Limit("fvu", sign, bound).holds(Interval(0.2, 0.1, 0.3, 10)) is kept


def test_verdicts_say_what_broke(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    found = evaluate(sae, lm, documents)
    high, low = found.metrics["fvu"].high, found.metrics["cosine"].low
    verdicts = judge(read_limits(f"fvu<={high!r} fvu<{high!r} cosine>={low!r} cosine>={low + 1e-6!r}"), found)
    assert [verdict.kept for verdict in verdicts] == [True, False, True, False]
    assert "is broken: the upper end of its 95 % interval is" in str(verdicts[1])
    assert "is broken: the lower end" in str(verdicts[3])
    assert verdicts[1].as_dict()["found"] == found.metrics["fvu"].as_dict()


def test_a_metric_without_a_value_keeps_no_limit(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents[:2])
    (verdict,) = judge(read_limits("coherence>=-9"), found)
    assert not verdict.kept and "has no value (no drawn latent fires in" in str(verdict)
    assert verdict.as_dict().keys() == {"limit", "kept", "why"}


def _suite(name: str, rows: dict[str, dict[str, Interval]], **more: Any) -> SuiteResult:
    return SuiteResult(name, rows, ("neurons",), **more)


def test_limits_on_suites_are_judged_on_the_autoencoders_own_row(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents)
    high = {"probe_top_1": Interval(0.9, 0.85, 0.95, 90)}
    low = {"probe_top_1": Interval(0.6, 0.5, 0.7, 90)}
    suites = [
        _suite("probing", {"one": high, "two": low, "neurons": low}),
        _suite("stability", {"pair": {"pw_mcc": Interval(0.7, 0.6, 0.8, 3)}},
               details={"row_of": {"one": "pair"}}),
    ]  # fmt: skip
    limits = read_limits("probe_top_1>0.8 pw_mcc>=0.6 l0>0", ["probing", "stability"])
    assert [v.kept for v in judge(limits, found, "one", suites)] == [True, True, True]
    verdicts = judge(limits, found, "two", suites)
    assert [v.kept for v in verdicts] == [False, False, True]
    assert str(verdicts[0]) == (
        "probe_top_1>0.8 is broken: the lower end of its 95 % interval is 0.5 (value 0.6)"
    )
    assert "pw_mcc has no value (it was not measured)" in str(verdicts[1])


def test_what_a_suite_could_not_measure_keeps_no_limit_and_says_why(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents)
    row = {"scr_metric_threshold_2": Interval(0.9, 0.9, 0.9, 1)}
    suites = [_suite("scr", {"one": row}, notes=("no score where the bias costs less",))]
    limits = read_limits("scr_metric_threshold_2>0 scr_dir2_threshold_2>0", ["scr"])
    alone, missing = judge(limits, found, "one", suites)
    assert not alone.kept and "rests on one measurement alone and has no interval (value 0.9)" in str(alone)
    assert alone.as_dict()["found"]["value"] == 0.9 and "no interval" in alone.as_dict()["why"]
    assert not missing.kept and "has no value (no score where the bias costs less)" in str(missing)
    (nothing,) = judge(limits[:1], found, "one", [_suite("scr", {})])
    assert not nothing.kept and "it was not measured" in str(nothing)


@given(suite=st.sampled_from(sorted(SUITES)), number=st.integers(0, 99))
def test_every_metric_of_every_suite_can_be_asked_for(suite: str, number: int) -> None:
    names = list(SUITES[suite])
    name = names[number % len(names)]
    assert [limit.metric for limit in read_limits(f"fvu<=1 {name}>=0.5", [suite])] == ["fvu", name]
    with pytest.raises(UserError, match=f"add --suite {suite}"):
        read_limits(f"{name}>=0.5")
