"""Folds are exact: the folded autoencoder of x is the unfolded one inside its normalisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unbraid.sae.formats.folds import State, scale_codes, scale_input, unit_decoder


def _state(seed: int, d_in: int, d_sae: int) -> State:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    state = {name: torch.randn(shape, generator=g, dtype=torch.double) for name, shape in shapes.items()}
    return {**state, "threshold": torch.rand(d_sae, generator=g, dtype=torch.double)}


def _run(state: State, x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    p = (x - state["b_dec"] * centred) @ state["W_enc"] + state["b_enc"]
    codes = p * (p > state["threshold"])
    return codes, codes @ state["W_dec"] + state["b_dec"]


SIZES = {"d_in": st.integers(1, 7), "d_sae": st.integers(1, 9), "seed": st.integers(0, 99)}
FACTOR = st.floats(0.01, 100)


@settings(max_examples=30, deadline=None)
@given(**SIZES, factor=FACTOR, centred=st.booleans())
def test_a_scaled_input_folds(d_in: int, d_sae: int, seed: int, factor: float, centred: bool) -> None:
    state = _state(seed, d_in, d_sae)
    x = torch.randn(20, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.double)
    codes, x_hat = _run(state, x * factor, centred)
    scale_input(state, factor)
    folded, folded_x_hat = _run(state, x, centred)
    torch.testing.assert_close(folded, codes)
    torch.testing.assert_close(folded_x_hat, x_hat / factor)


@settings(max_examples=30, deadline=None)
@given(**SIZES, factor=FACTOR, each=st.booleans(), centred=st.booleans())
def test_scaled_codes_reconstruct_the_same(
    d_in: int, d_sae: int, seed: int, factor: float, each: bool, centred: bool
) -> None:
    state = _state(seed, d_in, d_sae)
    x = torch.randn(20, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.double)
    codes, x_hat = _run(state, x, centred)
    by = factor * torch.linspace(0.5, 2, d_sae, dtype=torch.double) if each else factor
    scale_codes(state, by)
    folded, folded_x_hat = _run(state, x, centred)
    torch.testing.assert_close(folded, codes * by)
    torch.testing.assert_close(folded_x_hat, x_hat)


@pytest.mark.parametrize("dead", [True, False])
def test_rows_get_length_one_and_a_row_of_zeros_stays_harmless(dead: bool) -> None:
    state = _state(0, 5, 6)
    state["threshold"].zero_()
    if dead:
        state["W_dec"][2] = 0
    x = torch.randn(20, 5, dtype=torch.double)
    x_hat = _run(state, x, True)[1]
    unit_decoder(state)
    lengths = state["W_dec"].norm(dim=1)
    assert torch.allclose(lengths[[0, 1, 3, 4, 5]], torch.ones(5, dtype=torch.double))
    torch.testing.assert_close(_run(state, x, True)[1], x_hat)
