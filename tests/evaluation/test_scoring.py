"""CE and KL in compiled loops against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.evaluation import loops
from unbraid.evaluation.scoring import Pairs, compiled, plain


def _exact(now: torch.Tensor, targets: torch.Tensor, news: Pairs) -> tuple[torch.Tensor, Pairs]:
    """Sums over the vocabulary, one token at a time, in float64."""
    clean = now.double().log_softmax(dim=1)
    found: Pairs = []
    for logits, which in news:
        new = logits.double().log_softmax(dim=1)[which]
        kl = [
            sum(float(p.exp() * (p - q)) for p, q in zip(a, b, strict=True) if p > -torch.inf)
            for a, b in zip(clean, new, strict=True)
        ]
        found.append((-new[range(len(now)), targets], torch.tensor(kl, dtype=torch.float64)))
    return -clean[range(len(now)), targets], found


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    vocabulary=st.sampled_from([2, 3, 511, 512, 513, 700]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 300.0]),
    offset=st.sampled_from([0.0, -500.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_loops_and_torch_are_the_definition(
    n: int, vocabulary: int, scale: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    now = torch.randn(n, vocabulary, generator=generator) * scale + offset
    new = now + torch.randn(n, vocabulary, generator=generator)
    which = torch.randint(0, 2, (n,), generator=generator).clamp(max=n - 1)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    news = [(new, torch.arange(n)), (new[:2], which)]
    ce, pairs = _exact(now, targets, news)
    for compute in (compiled, plain):
        its_ce, its_pairs = compute(now, targets, news)
        # Logits of 1,000 in float32 are 6e-5 apart.
        torch.testing.assert_close(its_ce, ce, rtol=1e-5, atol=2e-4 if compute is plain else 1e-6)
        for (a, b), (x, y) in zip(its_pairs, pairs, strict=True):
            torch.testing.assert_close(a, x, rtol=1e-5, atol=2e-4 if compute is plain else 1e-6)
            torch.testing.assert_close(b, y, rtol=1e-4, atol=2e-4 if compute is plain else 2e-5)


def test_the_same_logits_diverge_by_nothing() -> None:
    now = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)) * 5
    _, [(_, kl)] = compiled(now, torch.zeros(4, dtype=torch.int64), [(now.clone(), torch.arange(4))])
    assert torch.equal(kl, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("compute", [compiled, plain])
def test_a_token_that_is_impossible_in_both_adds_nothing(compute: object) -> None:
    now = torch.tensor([[0.0, 1.0, -torch.inf]])
    new = torch.tensor([[1.0, 0.0, -torch.inf]])
    ce, [(_, kl)] = compute(now, torch.tensor([1]), [(new, torch.tensor([0]))])  # type: ignore[operator]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert float(kl) == pytest.approx(p[1] - p[0], abs=1e-6)
    assert float(ce) == pytest.approx(-np.log(p[1]), abs=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("nan")])
@pytest.mark.parametrize("compute", [compiled, plain])
def test_what_is_no_number_stays_none(compute: object, wrong: float) -> None:
    now = torch.zeros(2, 520)
    new = now.clone()
    new[1, 515] = wrong
    _, [(ce, kl)] = compute(now, torch.tensor([0, 0]), [(new, torch.arange(2))])  # type: ignore[operator]
    assert kl[0] == 0 and torch.isfinite(ce[0])
    assert not torch.isfinite(ce[1]) and not torch.isfinite(kl[1])


def test_exponentials_are_exact_to_a_few_units() -> None:
    x = np.linspace(-86.9, 0, 5000, dtype=np.float32)
    out = np.empty_like(x)
    total = loops._exponentials(x, np.float32(0), out)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 4e-7
    assert total == pytest.approx(exact.sum(), rel=1e-6)
