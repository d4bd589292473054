"""Weights' norms and cosines against all pairs at once."""

from __future__ import annotations

import pytest
import torch

from unbraid.evaluation import geometry
from unbraid.evaluation.definitions import Undefined
from unbraid.evaluation.geometry import metrics, nearest
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build


def _sae(d_sae: int = 23, **config: object) -> SAE:
    sae = build(SAEConfig("relu", 6, d_sae, **config))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.mark.parametrize("side", [1, 5, 23, 100])
def test_the_nearest_is_found_in_squares_of_any_size(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "SIDE", side)
    sae = _sae()
    found = geometry.geometry(sae)
    for name, rows in (("decoder", sae.W_dec.detach()), ("encoder", sae.W_enc.detach().T)):
        cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
        cosines.fill_diagonal_(-2)
        torch.testing.assert_close(found[f"max_{name}_cosine"], cosines.amax(dim=1))
        torch.testing.assert_close(found[f"{name}_norm"], rows.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(sae.W_enc.detach().T, sae.W_dec.detach(), dim=1)
    torch.testing.assert_close(found["encoder_decoder_cosine"], expected)
    assert torch.equal(found["encoder_bias"], sae.b_enc.detach())
    means = metrics(found)
    for name, values in found.items():
        assert means[name].value == pytest.approx(float(values.mean()), rel=1e-5)  # type: ignore[union-attr]


def test_copies_antipodes_zeros_and_a_single_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert nearest(rows).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert nearest(rows[:1]).tolist() == [0.0]


def test_rows_of_different_spaces_have_no_cosine() -> None:
    sae = _sae(d_sae=9)
    sae.W_dec = torch.nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    means = metrics(geometry.geometry(sae))
    assert isinstance(means["encoder_decoder_cosine"], Undefined)
    assert not isinstance(means["max_decoder_cosine"], Undefined)
