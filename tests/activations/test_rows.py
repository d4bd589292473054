"""Rows that are rounded to int8 and float16, against the same steps in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations import loops
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


@pytest.mark.parametrize("native", [True, False])
def test_float16_is_what_pytorch_rounds_to(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and not loops.HALVES:
        pytest.skip("this processor does not round to float16 by itself")
    monkeypatch.setattr(loops, "HALVES", native)
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()  # all from 0 to the largest
    between = (every[1:] + every[:-1]) / 2  # ties
    drawn = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(
        -10, 10
    ).tile(250).clamp(max=4)
    edges = torch.tensor([0.0, 65519.99, 65520.0, torch.inf, 1e-30, 1e-45])
    x = torch.cat([every, between, between.nextafter(torch.tensor(0.0)), drawn, edges])
    x = torch.cat([x, -x])
    x = x[: len(x) // 7 * 7].view(-1, 7)
    rows = Rows.empty(len(x) + 2, 7, "float16")
    rows.values.fill_(7)
    with np.errstate(over="ignore"):
        assert rows.put(1, x) == (0, 0)
    assert rows.values[1:-1].view(torch.int16).equal(x.half().view(torch.int16))
    assert (rows.values[[0, -1]] == 7).all()


@pytest.mark.parametrize("stored", ["int8", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_and_strides_are_taken(dtype: torch.dtype, stored: str) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).T
    rows, plain = Rows.empty(5, 6, stored), Rows.empty(5, 6, stored)
    rows.put(0, x)
    plain.put(0, x.float().contiguous())
    assert rows.values.equal(plain.values) and rows.take().equal(plain.take())
    if stored != "int8":
        assert rows.values.equal(x.to(rows.values.dtype))
