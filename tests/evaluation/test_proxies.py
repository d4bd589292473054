"""Alike contexts and concentrated effects, on contexts and effects of which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unbraid.activations.corpus import Batch
from unbraid.evaluation.proxies import BEFORE, STRONGEST, TOP, Contexts, alike, concentration
from unbraid.sae.codes import SparseCodes

T, ROWS = 40, 24


def _batch(seed: int) -> Batch:
    """Random tokens; in every row the tokens 90, 91, 92 stand in a row, the last at column 20."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 80, (ROWS, T), generator=generator)
    ids[:, 18:21] = torch.tensor([90, 91, 92])
    real = torch.ones(ROWS, T, dtype=torch.int64)
    everywhere = real.bool()
    return Batch(ids, real, everywhere, everywhere[:, 1:], torch.arange(ROWS), torch.arange(ROWS) * T)


def _codes(seed: int) -> SparseCodes:
    """Latent 0 fires at column 20 of each row, latent 1 at a random one, latent 2 in two rows only."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(ROWS, T, 3)
    dense[:, 20, 0] = 1 + torch.rand(ROWS, generator=generator)
    dense[torch.arange(ROWS), torch.randint(0, T, (ROWS,), generator=generator), 1] = 1.0
    dense[:2, 5, 2] = 3.0
    return SparseCodes.from_dense(dense.flatten(0, 1))


def test_a_latent_of_one_phrase_is_coherent_and_a_random_one_is_not() -> None:
    contexts = Contexts(np.arange(3), 3)
    batch = _batch(0)
    contexts.add(0, batch, _codes(1))
    assert [len(best) for best in contexts.best] == [TOP, TOP, 2]
    strongest = set(_codes(1).dense(3)[:, 0].view(ROWS, T)[:, 20].topk(TOP).indices.tolist())
    assert set(contexts.best[0]) == strongest
    phrase, random = contexts.coherence([batch], seed=0)  # the third fires in too few documents
    assert phrase > 0.2 and abs(random) < 0.1
    assert contexts.coherence([batch], seed=0).tolist() == [phrase, random]


def test_only_the_strongest_firing_of_a_document_counts() -> None:
    batch = _batch(0)
    dense = torch.zeros(ROWS, T, 3)
    dense[0, 3, 0], dense[0, 9, 0], dense[0, 30, 0] = 1.0, 5.0, 2.0
    contexts = Contexts(np.arange(3), 3)
    contexts.add(0, batch, SparseCodes.from_dense(dense.flatten(0, 1)))
    assert [(f.row, f.column, f.value) for f in contexts.best[0].values()] == [(0, 9, 5.0)]


def test_likeness_is_the_mean_cosine_of_weighted_sets() -> None:
    weights = {1: 1.0, 2: 2.0, 3: 0.5}
    sets = [frozenset({1, 2}), frozenset({2, 3}), frozenset({1})]
    vectors = np.array([[1, 2, 0], [0, 2, 0.5], [1, 0, 0]])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = (unit @ unit.T)[np.tril_indices(3, -1)].mean()
    assert alike(sets, weights) == pytest.approx(expected)
    assert alike([frozenset({1}), frozenset()], weights) == 0 and BEFORE > 0


def test_concentration_is_1_on_few_tokens_and_known_for_equal_effects() -> None:
    few = torch.zeros(1, 5000)
    few[0, :3] = torch.tensor([1.0, -2.0, 3.0])
    assert float(concentration(few)) == pytest.approx(1, abs=2e-3)  # all but the mean that is taken out
    equal = torch.ones(1, 200)
    equal[0, ::2] = -1
    assert float(concentration(equal)) == pytest.approx(STRONGEST / 200)
    assert concentration(torch.ones(1, 20)).isnan().all()  # which `metrics` leaves out
