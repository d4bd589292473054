"""Rows that are rounded to int8, against the same steps in PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations.rows import LEAST, Rows


@settings(deadline=None)  # the first call compiles
@given(
    n=st.integers(1, 200),
    d=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-35, 1, 1e30]),
)
def test_rounding_is_what_pytorch_does(n: int, d: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * size
    x[torch.rand(n, generator=generator) < 0.1] = 0
    rows, sums = Rows.empty(n + 2, d, "int8"), torch.ones(d, dtype=torch.float64)
    rows.values.fill_(7)
    lost, squares = rows.put(1, x, sums)

    scale = (x.abs().amax(dim=1) / 127).clamp(min=float(LEAST))
    values = (x / scale[:, None]).round()
    assert rows.scale is not None and rows.scale[1:-1].equal(scale)
    assert rows.values[1:-1].equal(values.to(torch.int8)) and (rows.values[[0, -1]] == 7).all()
    back = values * scale[:, None]
    assert rows.take()[1:-1].equal(back)
    if size == 1:
        exact = x.double()
        assert lost == pytest.approx(float((back.double() - exact).square().sum()), rel=1e-4, abs=1e-9)
        assert squares == pytest.approx(float(exact.square().sum()), rel=1e-5)
        torch.testing.assert_close(sums - 1, exact.sum(dim=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_and_strides_are_taken(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).T
    rows, plain = Rows.empty(5, 6, "int8"), Rows.empty(5, 6, "int8")
    rows.put(0, x)
    plain.put(0, x.float().contiguous())
    assert rows.values.equal(plain.values) and rows.take().equal(plain.take())
