"""Limits are read strictly and judged on the interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import DEFINITIONS, evaluate
from unbraid.evaluation.gates import Limit, judge, read_limits
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
        ("accuracy_of_everything>1", "no metric; there are l0"),
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
