"""PW-MCC against all permutations, and its ends: the same dictionary, and one at random."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.evaluation import stability as module
from unbraid.evaluation.stability import over_seeds, similarity, stability
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build


def _sae(W_dec: torch.Tensor, architecture: str = "relu") -> SAE:
    sae = build(SAEConfig(architecture, W_dec.shape[1], W_dec.shape[0], site="layers.0.resid_post"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
    return sae


def _random(seed: int, width: int = 6, d: int = 4) -> torch.Tensor:
    return torch.randn(width, d, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 5), d=st.integers(1, 4))
def test_the_match_is_the_best_of_all_permutations(seed: int, width: int, d: int) -> None:
    a, b = _random(seed, width, d), _random(seed + 1, width, d)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).abs().numpy()
    best = max(np.mean([cosines[i, p] for i, p in enumerate(order)]) for order in permutations(range(width)))
    assert similarity(a, b, "pw_mcc") == pytest.approx(best, abs=1e-5)
    nearest = (cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2
    assert similarity(a, b, "pw_max_cosine") == pytest.approx(nearest, abs=1e-5)
    assert similarity(a, b, "pw_mcc") <= similarity(a, b, "pw_max_cosine") + 1e-6
    # Order, sign and length of the latents do not matter.
    turned = -3 * b[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]
    assert similarity(a, turned, "pw_mcc") == pytest.approx(best, abs=1e-5)


def test_the_same_dictionary_scores_one_and_noise_lowers_it() -> None:
    base = _random(0, 64, 32)
    same = stability({"a": _sae(base), "b": _sae(-2 * base[torch.randperm(64)])}, 0)
    (row,) = (row for name, row in same.rows.items() if name not in same.baselines)
    assert row["pw_mcc"].value == pytest.approx(1, abs=1e-5) and row["pw_mcc"].n == 1
    values = []
    for noise in (0.3, 1.0, 100.0):
        others = [base + noise * _random(seed, 64, 32) for seed in (1, 2, 3)]
        values.append(over_seeds(others, "pw_mcc"))
        assert values[-1].low <= values[-1].value <= values[-1].high and values[-1].n == 3
    assert 1 > values[0].value > values[1].value > values[2].value
    (floor,) = (same.rows[name] for name in same.baselines)
    assert values[2].value == pytest.approx(floor["pw_mcc"].value, abs=0.05)


def test_wide_dictionaries_get_another_metric_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MATCHED_WIDTH", 5)
    saes = {"a": _sae(_random(0)), "b": _sae(_random(1))}
    found = stability(saes, 0)
    assert all(list(row) == ["pw_max_cosine"] for row in found.rows.values())
    assert module.DEFINITIONS["pw_mcc"].id != module.DEFINITIONS["pw_max_cosine"].id
    whole = similarity(_random(0), _random(1), "pw_max_cosine")
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    assert similarity(_random(0), _random(1), "pw_max_cosine") == pytest.approx(whole, abs=1e-6)


def test_only_seeds_are_compared() -> None:
    saes = {"a": _sae(_random(0)), "b": _sae(_random(1)), "wide": _sae(_random(2, 9))}
    found = stability(saes, 0)
    assert found.notes == ("nothing to compare with: wide",)
    with pytest.raises(UserError, match="no two of these 2 do"):
        stability({"a": saes["a"], "wide": saes["wide"]}, 0)
    with pytest.raises(UserError, match="autoencoder b is not finite"):
        stability({"a": saes["a"], "b": _sae(torch.full((6, 4), torch.nan))}, 0)


def test_the_interval_is_students_about_the_logit_by_the_jackknife() -> None:
    base = _random(0, 24, 12)
    others = [base + noise * _random(seed, 24, 12) for seed, noise in ((1, 0.2), (2, 0.4), (3, 0.6))]
    pairs = [similarity(others[i], others[j], "pw_mcc") for i, j in ((1, 2), (0, 2), (0, 1))]
    z = [np.log(p / (1 - p)) for p in pairs]  # each is what is left without one of the three
    half = 4.302653 * np.sqrt(2 / 3 * sum((one - np.mean(z)) ** 2 for one in z))  # t of 2 degrees of freedom
    middle = np.log(np.mean(pairs) / (1 - np.mean(pairs)))
    found = over_seeds(others, "pw_mcc")
    assert found.value == pytest.approx(np.mean(pairs))
    assert (found.low, found.high) == pytest.approx(
        tuple(1 / (1 + np.exp(-(middle + side * half))) for side in (-1, 1)), rel=1e-5
    )
    alike = over_seeds([base] * 3, "pw_mcc")
    assert alike.low > 0.999 and alike.high >= alike.value
