"""What a pass finds is what one computes from the whole dense matrix, however the text was cut or merged."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.features import hashes, lists, loops, pairs
from unbraid.features.around import around
from unbraid.features.coactive import FEWEST, TokenSample
from unbraid.features.groups import INTERVALS, level_edges
from unbraid.features.state import Sizes, State, row_keys

LATENTS, LENGTH, TOKENS = 4, 6, 5
SIZES = Sizes(best=3, sample=4, per_interval=2, reach=1, coactive=1 << 20)
SEED = 7


class Corpus:
    """Random activations (windows, length, latents), half of them zero, with ties; two windows a document."""

    def __init__(self, seed: int, windows: int) -> None:
        rng = np.random.default_rng(seed)
        values = rng.integers(1, 40, (windows, LENGTH, LATENTS)).astype(np.float32) / 8
        values *= 2.0 ** rng.integers(-6, 6, (windows, 1, 1))
        self.values = values * (rng.random(values.shape) < 0.5)
        self.token = rng.integers(0, TOKENS, (windows, LENGTH))
        self.context = rng.integers(0, 7, (windows, LENGTH)).astype(np.uint64)
        self.document = np.arange(windows) // 2
        place = np.tile(np.arange(LENGTH), windows) + np.repeat(np.arange(windows) % 2, LENGTH) * LENGTH
        self.key = row_keys(SEED, np.repeat(self.document, LENGTH), place).reshape(windows, LENGTH)

    def add_to(self, state: State, start: int, stop: int) -> None:
        """Give a state some windows."""
        values = self.values[start:stop].reshape(-1, LATENTS)
        rows = np.zeros(len(values), loops.ROW)
        rows["passage"] = np.repeat(np.arange(start, stop), LENGTH)
        rows["position"] = np.tile(np.arange(LENGTH), stop - start)
        rows["document"] = np.repeat(self.document[start:stop], LENGTH)
        for name in ("token", "context", "key"):
            rows[name] = getattr(self, name)[start:stop].ravel()
        rows["stratum"] = [state.stratum("even" if d % 2 == 0 else "odd") for d in rows["document"]]
        rows["first"] = rows["position"] == 0
        row, latent = np.nonzero(values)
        starts = np.searchsorted(row, np.arange(len(values) + 1)).astype(np.int64)
        state.add(starts, latent.astype(np.int32), values[row, latent], rows)

    def state(self, folder: Path, *cuts: int, only: range | None = None) -> State:
        """The state after all windows, or some, given at several times."""
        state = State(LATENTS, SIZES, folder)
        wanted = only or range(len(self.values))
        edges = [wanted.start, *sorted(c for c in cuts if c in wanted), wanted.stop]
        for start, stop in pairwise(edges):
            self.add_to(state, start, stop)
        return state


def _held(slots: loops.Slots) -> list[list[tuple[float, ...]]]:
    """What is in the slots of each latent, in an order of its own."""
    found = []
    for j in range(LATENTS):
        near = around(slots, j, j + 1, SIZES.reach)[0]
        columns = zip(slots.key[j], slots.value[j], slots.passage[j], slots.position[j], near)  # noqa: B905
        rows = [(int(k), float(v), int(p), int(q), *map(float, a)) for k, v, p, q, a in columns if p >= 0]
        found.append(sorted(rows))
    return found


def _everything(state: State) -> dict[str, object]:
    counts = state.counts._asdict()
    order = [state.seen.strata[name][0] for name in sorted(state.seen.strata)]
    counts["strata"] = counts["strata"][:, order]
    counts["mean"] = counts.pop("total").sum(axis=1).astype(np.float32)
    counts.pop("last_document")
    found: dict[str, object] = {name: array.tolist() for name, array in counts.items()}
    found |= {name: _held(getattr(state, name)) for name in ("best", "sample", "spread")}
    found["tokens"] = [list(zip(p.token, p.times, strict=True)) for p in state.tokens.blocks()]
    found["octaves"], found["occurrences"] = state.seen.octaves, state.occurrences.tolist()
    found["together"] = sorted(state.together.keys.tolist())
    return found


cuts = st.lists(st.integers(1, 11), max_size=4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), cuts)
def test_batches_leave_no_trace(seed: int, windows: int, where: list[int]) -> None:
    corpus = Corpus(seed, windows)
    with tempfile.TemporaryDirectory() as name:
        whole, parts = corpus.state(Path(name)), corpus.state(Path(name), *where)
        assert _everything(whole) == _everything(parts)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 6), st.permutations(range(3)))
def test_merged_shares_are_the_whole(seed: int, documents: int, order: list[int]) -> None:
    corpus = Corpus(seed, 2 * documents)
    with tempfile.TemporaryDirectory() as name:
        whole = corpus.state(Path(name))
        ends = [0, 2 * (documents // 3), 2 * (2 * documents // 3), 2 * documents]
        spans = [range(a, b) for a, b in pairwise(ends) if a < b]
        merged = State(LATENTS, SIZES, Path(name))
        for number in order:
            if number < len(spans):
                merged.merge(corpus.state(Path(name), only=spans[number]))
        assert _everything(whole) == _everything(merged)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), cuts)
def test_what_is_counted_agrees_with_the_dense_matrix(seed: int, windows: int, where: list[int]) -> None:
    corpus = Corpus(seed, windows)
    with tempfile.TemporaryDirectory() as name:
        state = corpus.state(Path(name), *where)
        tokens = next(iter(state.tokens.blocks()))
    counts, dense = state.counts, corpus.values
    np.testing.assert_array_equal(counts.firings, (dense > 0).sum(axis=(0, 1)))
    np.testing.assert_array_equal(counts.highest, dense.max(axis=(0, 1)))
    np.testing.assert_allclose(counts.total.sum(axis=1), dense.sum(axis=(0, 1), dtype=float), rtol=1e-12)
    by_document = [dense[start : start + 2].any(axis=(0, 1)) for start in range(0, windows, 2)]
    np.testing.assert_array_equal(counts.documents, np.sum(by_document, axis=0))
    for j in range(LATENTS):
        window, position = np.nonzero(dense[:, :, j])
        fired = dense[window, position, j]
        if not len(fired):
            continue
        top = 2.0 ** counts.exponent[j]
        assert top / 2 <= fired.max() < top
        np.testing.assert_array_equal(counts.histogram[j], np.histogram(fired, 64, (0, top))[0])
        np.testing.assert_array_equal(counts.levels[j], np.histogram(fired, level_edges(top))[0])
        assert counts.positions[j].tolist() == [position.sum(), (position**2).sum(), (position == 0).sum()]
        octaves = np.bincount([int(p).bit_length() for p in position], minlength=20)
        np.testing.assert_array_equal(counts.octaves[j], octaves)
        even = int((corpus.document[window] % 2 == 0).sum())
        number = state.seen.strata["even"][0]
        assert counts.strata[j, number] == even and counts.strata[j].sum() == len(fired)
        mine = slice(tokens.first[j], tokens.first[j + 1])
        expected = Counter(corpus.token[window, position].tolist())
        assert dict(zip(tokens.token[mine].tolist(), tokens.times[mine].tolist(), strict=True)) == expected
        assert tokens.times[mine].tolist() == sorted(expected.values(), reverse=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), cuts)
def test_the_best_are_the_best_in_different_contexts(seed: int, windows: int, where: list[int]) -> None:
    corpus = Corpus(seed, windows)
    with tempfile.TemporaryDirectory() as name:
        best = corpus.state(Path(name), *where).best
    for j in range(LATENTS):
        of_context: dict[int, tuple[float, int, int]] = {}
        for w in range(windows):
            p = int(corpus.values[w, :, j].argmax())  # the first of equal ones
            value, context = float(corpus.values[w, p, j]), int(corpus.context[w, p])
            if value and (context not in of_context or value > -of_context[context][0]):
                of_context[context] = (-value, w, p)
        wanted = sorted(of_context.values())[: SIZES.best]
        held = [(-v, w, p) for _, v, w, p, *_ in _held(best)[j]]
        assert sorted(held) == wanted
        for _, value, w, p, left, at, right in _held(best)[j]:
            row = corpus.values[w, :, j]
            assert (left, at, right) == (row[p - 1] if p else 0, value, row[p + 1] if p + 1 < LENGTH else 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), cuts)
def test_samples_are_those_drawn_first(seed: int, windows: int, where: list[int]) -> None:
    corpus = Corpus(seed, windows)
    with tempfile.TemporaryDirectory() as name:
        state = corpus.state(Path(name), *where)
    for j in range(LATENTS):
        window, position = np.nonzero(corpus.values[:, :, j])
        keys = hashes.mixed(corpus.key[window, position], np.full(len(window), j, np.uint64))
        drawn = sorted(zip(keys.tolist(), window.tolist(), position.tolist(), strict=True), reverse=True)
        assert sorted((k, w, p) for k, _, w, p, *_ in _held(state.sample)[j]) == sorted(drawn[: SIZES.sample])
        width = 2.0 ** state.counts.exponent[j] / INTERVALS
        by_interval: dict[int, list[tuple[int, int, int]]] = {}
        for key, w, p in drawn:
            by_interval.setdefault(int(corpus.values[w, p, j] / width), []).append((key, w, p))
        wanted = sorted(x for found in by_interval.values() for x in found[: SIZES.per_interval])
        assert sorted((k, w, p) for k, _, w, p, *_ in _held(state.spread)[j]) == wanted


def test_priorities_are_uniform_and_differ_between_latents() -> None:
    keys = row_keys(0, np.zeros(10_000, np.int64), np.arange(10_000))
    one, other = (hashes.mixed(keys, np.full(10_000, j, np.uint64)) / 2.0**64 for j in (0, 1))
    assert np.abs(np.histogram(one, 10, (0, 1))[0] - 1000).max() < 130  # about four deviations
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04
    assert len(np.unique(one)) == 10_000
    assert not np.array_equal(keys, row_keys(1, np.zeros(10_000, np.int64), np.arange(10_000)))


def test_contexts_hash_alike_when_their_tokens_do() -> None:
    tokens = np.array([11, 12, 13, 14, 15, 19, 11, 12, 13, 14, 15, 18], np.uint64)
    found = np.empty(12, np.uint64)
    hashes.contexts_of(tokens, np.array([0, 6]), np.array([6, 12]), 2, found)
    assert found[2] == found[8]  # 11 12 13 14 15
    assert found[3] != found[9]  # 12 13 14 15 19 and 12 13 14 15 18
    assert found[0] == found[6]  # both at the start of a window
    assert found[0] != found[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_token_counts_spill_and_add_up(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    expected: Counter[tuple[int, int]] = Counter()
    before = pairs.ROOM, pairs.MOST_RUNS
    pairs.ROOM, pairs.MOST_RUNS = 10, 2
    try:
        with tempfile.TemporaryDirectory() as name:
            counts = pairs.TokenCounts(Path(name), 30)
            for size in sizes:
                latent, token = np.sort(rng.integers(0, 30, size)), rng.integers(0, 9, size)
                expected.update(zip(latent.tolist(), token.tolist(), strict=True))
                first = np.searchsorted(latent, np.arange(31)).astype(np.int64)
                counts.add(first, token.astype(np.int32))
            counts.tidy()
            (found,) = counts.blocks()
            assert len(list(Path(name).iterdir())) <= 3
    finally:
        pairs.ROOM, pairs.MOST_RUNS = before
    latent = np.repeat(np.arange(30), np.diff(found.first))
    columns = zip(latent.tolist(), found.token.tolist(), strict=True)
    assert dict(zip(columns, found.times.tolist(), strict=True)) == expected


def _sample(codes: np.ndarray, room: int, cut: int) -> TokenSample:
    sample = TokenSample(codes.shape[1], room)
    keys = row_keys(0, np.zeros(len(codes), np.int64), np.arange(len(codes)))
    for part in (slice(0, cut), slice(cut, None)):
        row, latent = np.nonzero(codes[part])
        starts = np.searchsorted(row, np.arange(len(codes[part]) + 1)).astype(np.int64)
        sample.add(keys[part], starts, latent.astype(np.int32))
    return sample


def test_co_activation_is_exact_where_the_corpus_fits() -> None:
    rng = np.random.default_rng(0)
    codes = rng.random((300, 12)) < np.linspace(0.02, 0.6, 12)
    codes[:, 3] = codes[:, 7]
    sample = _sample(codes, 1 << 20, 100)
    assert sample.level == 0 and len(sample) == 300
    (found,) = sample.neighbours(3)
    together = codes.T.astype(int) @ codes.astype(int)
    own = np.diag(together)
    for j in range(12):
        jaccard = {
            i: together[i, j] / (own[i] + own[j] - together[i, j]) for i in range(12) if together[i, j]
        }
        jaccard.pop(j, None)
        pmi = {i: together[i, j] / (own[i] * own[j]) for i in jaccard if together[i, j] >= FEWEST}
        near, close = (sorted(x, key=lambda i: (-x[i], i))[:3] for x in (jaccard, pmi))
        mine = found.latent == j
        assert found.neighbour[mine].tolist() == near + [i for i in close if i not in near]
        for i, n, a, b in zip(
            found.neighbour[mine], found.together[mine], found.own[mine], found.other[mine], strict=True
        ):
            assert (n, a, b) == (together[i, j], own[j], own[i])
    assert found.neighbour[found.latent == 3][0] == 7


def test_the_sample_of_tokens_is_bounded_uniform_and_keeps_no_trace_of_batches() -> None:
    rng = np.random.default_rng(1)
    codes = rng.random((4000, 20)) < 0.2
    one, other = _sample(codes, 5000, 4000), _sample(codes, 5000, 1234)
    assert one.level == other.level >= 1
    assert sorted(one.keys) == sorted(other.keys)
    assert 2000 < len(one.latents) <= 5000
    assert abs(len(one) / len(codes) * 2**one.level - 1) < 0.2
    assert all(np.all(np.diff(one.latents[a:b]) > 0) for a, b in pairwise(one.starts))
    merged = TokenSample(20, 5000)
    for part in (one, _sample(codes[:0], 5000, 0)):
        merged.add(part.keys, part.starts, part.latents, part.level)
    assert merged.level == one.level and sorted(merged.keys) == sorted(one.keys)


def test_examples_that_are_almost_the_same_are_shown_once() -> None:
    base = np.arange(10, dtype=np.uint64) + 5
    near, far = base.copy(), base.copy()
    near[0], far[:4] = 99, 99
    rank = np.empty(5, np.int32)
    lists.shown(np.stack([base, near, far, near, base]), np.array([3, 2]), 8, rank)
    assert rank.tolist() == [0, -1, 1, 0, -1]
