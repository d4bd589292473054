"""Counts of firings against dense codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.evaluation.definitions import Undefined
from unbraid.evaluation.latents import DEFINITIONS, Latents
from unbraid.sae.codes import SparseCodes

F = 30


def _dense(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rate = torch.linspace(0, 0.5, F) ** 2
    dense = torch.rand(n, F, generator=generator).exp() * (torch.rand(n, F, generator=generator) < rate)
    dense[:, 3] = 0
    return dense


@settings(max_examples=20, deadline=None)
@given(n=st.integers(20, 300), seed=st.integers(0, 1000), size=st.integers(1, 100))
def test_counts_are_exact_in_any_batches(n: int, seed: int, size: int) -> None:
    dense = _dense(n, seed)
    rows = torch.arange(n) // 7
    found = Latents(F)
    for windows in (rows.unique()).split(max(1, size // 7)):
        part = torch.isin(rows, windows)
        found.add(SparseCodes.from_dense(dense[part]), rows[part] - rows[part].min())
    assert torch.equal(found.fired, (dense > 0).sum(dim=0)) and found.tokens == n
    expected = [len(rows[dense[:, j] > 0].unique()) for j in range(F)]
    assert found.windows.tolist() == expected
    assert torch.equal(found.largest, dense.amax(dim=0))
    torch.testing.assert_close(found.total, dense.double().sum(dim=0))
    counts, _ = np.histogram(dense[dense > 0].double().numpy(), found.edges())
    assert int(found.histogram.sum()) == int((dense > 0).sum())
    assert np.abs(found.histogram.numpy() - counts).sum() <= 2  # a value on an edge may fall on either side
    share = found.density
    metrics = found.metrics(seed=0)
    assert metrics.keys() == DEFINITIONS.keys()
    value = {name: m.value for name, m in metrics.items() if not isinstance(m, Undefined)}
    assert value["dead"] == pytest.approx((share == 0).mean())
    for name, bar in (("1", 0.01), ("10", 0.1)):
        assert value[f"dense_{name}"] == pytest.approx((share > bar).mean())
        assert value[f"dense_share_{name}"] == pytest.approx(share[share > bar].sum() / share.sum())


def test_without_firings_their_shares_have_no_value() -> None:
    found = Latents(F)
    found.add(SparseCodes(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)), torch.zeros(5).long())
    metrics = found.metrics(seed=0)
    assert metrics["dead"].value == 1  # type: ignore[union-attr]
    assert metrics["dense_share_1"] == Undefined("no latent fires")
