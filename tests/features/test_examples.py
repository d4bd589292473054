"""Accumulators are exact, and how the stream was cut leaves no trace."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.features.examples import (
    Best,
    Firings,
    Tally,
    context_hashes,
    peaks,
    quantile_groups,
    uniform_priorities,
)

LATENTS, LENGTH = 4, 6


def _stream(seed: int, windows: int) -> np.ndarray:
    """Activations (windows, length, latents), half of them zero, with ties."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 40, (windows, LENGTH, LATENTS)).astype(np.float32) / 8
    return values * (rng.random(values.shape) < 0.5)


def _firings(values: np.ndarray, first: int) -> Firings:
    window, position, latent = np.nonzero(values)
    row = window * LENGTH + position
    return Firings(latent, values[window, position, latent], row, window + first, position)


def _nothing_around(chosen: Firings) -> np.ndarray:
    return np.repeat(chosen.value[:, None], 3, axis=1)


def _run(values: np.ndarray, cuts: list[int], size: int) -> tuple[Best, Best, Tally]:
    best, sample, tally = Best(LATENTS, size, 1), Best(LATENTS, size, 1), Tally(LATENTS)
    edges = [0, *sorted(cuts), len(values)]
    for start, stop in pairwise(edges):
        batch = _firings(values[start:stop], start)
        tally.add(batch, batch.window // 2)  # two windows a document, so that cuts go through documents
        top = peaks(batch)
        contexts = (top.value * 8).astype(np.uint64) % 7
        best.offer(top, top.value.astype(np.float64), _nothing_around, contexts)
        sample.offer(batch, uniform_priorities(batch, 3), _nothing_around)
    return best, sample, tally


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 5))
def test_batches_leave_no_trace(seed: int, windows: int, cuts: list[int], size: int) -> None:
    values = _stream(seed, windows)
    whole = _run(values, [], size)
    parts = _run(values, [min(cut, windows) for cut in cuts], size)
    for one, other in zip(whole[:2], parts[:2], strict=True):
        for name in ("key", "at", "position", "around"):
            held = one.at >= 0
            np.testing.assert_array_equal(getattr(one, name)[held], getattr(other, name)[held])
        np.testing.assert_array_equal(one.at, other.at)
    for name in ("count", "documents", "max", "histogram", "histogram_top"):
        np.testing.assert_array_equal(getattr(whole[2], name), getattr(parts[2], name))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12))
def test_counts_agree_with_the_whole_matrix(seed: int, windows: int) -> None:
    values = _stream(seed, windows)
    tally = _run(values, [windows // 2], 3)[2]
    flat = values.reshape(-1, LATENTS)
    np.testing.assert_array_equal(tally.count, (flat > 0).sum(axis=0))
    np.testing.assert_array_equal(tally.max, flat.max(axis=0))
    np.testing.assert_array_equal(tally.histogram.sum(axis=1), tally.count)
    by_document = [values[start : start + 2].any(axis=(0, 1)) for start in range(0, windows, 2)]
    np.testing.assert_array_equal(tally.documents, np.sum(by_document, axis=0))
    for latent in range(LATENTS):
        if tally.count[latent]:
            fired = flat[:, latent][flat[:, latent] > 0]
            expected, _ = np.histogram(fired, bins=64, range=(0, tally.histogram_top[latent]))
            np.testing.assert_array_equal(tally.histogram[latent], expected)
            assert tally.histogram_top[latent] / 2 <= fired.max() < tally.histogram_top[latent]
            np.testing.assert_allclose(tally.mean[latent], fired.mean(), rtol=1e-6)


def test_the_best_are_the_best_in_different_contexts() -> None:
    values = _stream(0, 12)
    best = _run(values, [5], 3)[0]
    for latent in range(LATENTS):
        highest = values[:, :, latent].max(axis=1)
        contexts: dict[int, float] = {}
        for value in highest[highest > 0]:
            context = int(value * 8) % 7
            contexts[context] = max(contexts.get(context, 0.0), float(value))
        assert best.key[latent].tolist() == sorted(contexts.values(), reverse=True)[:3]


def test_the_reservoir_is_uniform() -> None:
    firings = Firings(
        np.zeros(10_000, dtype=np.int64),
        np.ones(10_000, dtype=np.float32),
        np.arange(10_000),
        np.arange(10_000) // 100,
        np.arange(10_000) % 100,
    )
    priorities = uniform_priorities(firings, 0)
    assert np.abs(np.histogram(priorities, 10, (0, 1))[0] - 1000).max() < 130  # about four deviations
    assert abs(np.corrcoef(priorities, np.arange(10_000))[0, 1]) < 0.04
    assert len(np.unique(priorities)) == 10_000
    assert not np.array_equal(priorities, uniform_priorities(firings, 1))


def test_contexts_hash_alike_when_their_tokens_do() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8])
    hashes = context_hashes(tokens, 2)
    assert hashes[2] == hashes[8]  # 1 2 3 4 5
    assert hashes[3] != hashes[9]  # 2 3 4 5 9 and 2 3 4 5 8
    assert hashes[0] != hashes[6]  # the start of a text is a context too


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 10, width=32), max_size=40), st.integers(1, 10))
def test_quantile_groups_are_ordered_and_even(values: list[float], groups: int) -> None:
    array = np.array(values, dtype=np.float32)
    number = quantile_groups(array, groups)
    sizes = np.bincount(number, minlength=groups)
    assert sizes.max(initial=0) - sizes.min(initial=99) <= 1 or not len(values)
    for low in range(groups - 1):
        below, above = array[number <= low], array[number > low]
        assert not len(below) or not len(above) or below.max() <= above.min()
