"""Matching pursuit and LISTA against loops over single activations; their gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build

SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 8), st.integers(4, 40), st.integers(0, 10_000))


def _sae(architecture: str, d_in: int, d_sae: int, k: int, seed: int, **options: object) -> SAE:
    sae = build(SAEConfig(architecture, d_in, d_sae, k, options=options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        sae.constrain()
    return sae


def _pursue(sae: SAE, x: Tensor, duplicates_stop: bool, short: float) -> Tensor:
    """One activation (d_in,), step by step, differentiable: its code (d_sae,)."""
    residual = x - sae.b_dec
    code = torch.zeros(sae.config.d_sae)
    taken: set[int] = set()
    for _ in range(sae.config.k):
        j = int((residual.detach() @ sae.W_dec.detach().T).argmax())
        value = (residual @ sae.W_dec[j]).relu()
        code = code + value * torch.nn.functional.one_hot(torch.tensor(j), len(code))
        residual = residual - value * sae.W_dec[j]
        length = float(residual.detach().norm())
        if float(value.detach()) == 0 or (j in taken and duplicates_stop) or length < short:
            break
        taken.add(j)
    return code


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 7), st.booleans(), st.sampled_from([0.0, 1.5]), st.booleans())
def test_matching_pursuit_is_its_loop(
    shape: tuple[int, int, int, int], k: int, duplicates_stop: bool, short: float, short_rows: bool
) -> None:
    n, d_in, d_sae, seed = shape
    k = min(k, d_sae)
    sae = _sae(
        "matching_pursuit", d_in, d_sae, k, seed,
        stop_on_duplicate_support=duplicates_stop, residual_threshold=short, short_rows=short_rows,
    )  # fmt: skip
    x = 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1))
    codes = torch.stack([_pursue(sae, row, duplicates_stop, short) for row in x])
    torch.testing.assert_close(sae.encode_dense(x), codes, rtol=1e-4, atol=1e-4)
    (x - codes @ sae.W_dec - sae.b_dec).square().mean().backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    report = sae.backward(x, x, StepContext(torch.zeros(d_sae, dtype=torch.bool)))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)
    assert int(report.active) == int((codes > 0).sum())


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.floats(0.1, 3))
def test_short_rows_stay_so_and_longer_ones_come_to_unit_length(
    shape: tuple[int, int, int, int], length: float
) -> None:
    n, d_in, d_sae, seed = shape
    sae = _sae("matching_pursuit", d_in, d_sae, 3, seed, stop_on_duplicate_support=False)
    with torch.no_grad():
        sae.W_dec *= length / sae.W_dec.norm(dim=1, keepdim=True)
    sae.constrain()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((d_sae,), min(length, 1.0)))
    x = 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1))
    left = (x - sae(x).x_hat).norm(dim=1)
    assert bool((left <= (x - sae.b_dec).norm(dim=1) * (1 + 1e-5)).all())


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 5), st.integers(1, 3))
def test_lista_is_its_formula(shape: tuple[int, int, int, int], k: int, iterations: int) -> None:
    n, d_in, d_sae, seed = shape
    k = min(k, d_sae)
    sae = _sae("lista", d_in, d_sae, k, seed, iterations=iterations)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1))
    codes = torch.zeros(n, d_sae)
    for size in sae.get_parameter("step_size"):
        proposed = codes + size * (x - sae.b_dec - codes @ sae.W_dec) @ sae.W_enc + sae.b_enc
        best = proposed.topk(k, dim=1).indices
        codes = proposed.relu() * torch.zeros_like(proposed).scatter(1, best, 1.0)
    torch.testing.assert_close(sae.encode_dense(x), codes, rtol=1e-4, atol=1e-4)
    (x - codes @ sae.W_dec - sae.b_dec).square().mean().backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    sae.backward(x, x, StepContext(torch.zeros(d_sae, dtype=torch.bool)))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_lista_with_widths_has_the_loss_of_its_prefixes() -> None:
    sae = _sae("lista", 6, 30, 4, 0, iterations=2, widths=(5, 12))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    codes = sae.encode(x).dense(30)
    errors = [(x - codes[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().sum() / x.numel() for w in (5, 12, 30)]
    loss, error = sae.reconstruction_loss(sae.encode(x), x, x)
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    torch.testing.assert_close(error, x - sae(x).x_hat)
    with pytest.raises(UserError, match="must rise and stay below the width 30"):
        _sae("lista", 6, 30, 4, 0, widths=(12, 5))


def test_one_iteration_of_lista_is_topk() -> None:
    lista, topk = _sae("lista", 6, 30, 3, 0, iterations=1), _sae("topk", 6, 30, 3, 0)
    with torch.no_grad():
        lista.get_parameter("step_size").fill_(1.0)
    topk.load_state_dict({name: t for name, t in lista.state_dict().items() if name != "step_size"})
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lista.encode_dense(x), topk.encode_dense(x))


@pytest.mark.parametrize("architecture", ["matching_pursuit", "lista"])
def test_their_latents_cannot_be_edited(architecture: str) -> None:
    with pytest.raises(UserError, match="cannot be edited"):
        _sae(architecture, 6, 30, 3, 0).latent_edit([1], "ablate")
