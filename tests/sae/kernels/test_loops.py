"""The compiled loops against plain PyTorch, over shapes, sparsities and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.kernels import loops, reference
from unbraid.sae.kernels.cpu import Precision, Screen

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 150), st.integers(0, 10_000))


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _codes(n: int, F: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct latents in each row, a third of the values 0."""
    rng = np.random.default_rng(seed)
    latents = np.stack([rng.permutation(F)[:k] for _ in range(n)]).astype(np.int32)
    values = rng.random((n, k), np.float32) * (rng.random((n, k)) < 0.67)
    return latents, values.astype(np.float32)


def _grouped(latents: np.ndarray, values: np.ndarray, F: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = latents.shape
    first = np.empty(F + 1, np.int64)
    rows, entries = np.empty(n * k, np.int32), np.empty(n * k, np.int32)
    starts = np.arange(0, n * k + 1, k)
    loops.group_by_latent(starts, latents.reshape(-1), values.reshape(-1), first, rows, entries)
    return first, rows, entries


def _words(d: int) -> int:
    """How many words a row of d numbers takes."""
    return -(-d // (loops.WORD * loops.STEP)) * loops.STEP


def _tiles(rows: np.ndarray) -> np.ndarray:
    """int8 rows (m, d) as `rough_scores` reads them, m a multiple of TILE_ROWS."""
    m, d = rows.shape
    padded = np.zeros((m, _words(d) * loops.WORD), np.int8)
    padded[:, :d] = rows
    words = (padded.view(np.uint8) ^ 128).view(np.int32)
    return np.ascontiguousarray(words.reshape(-1, loops.TILE_ROWS, _words(d)).swapaxes(1, 2))


def _quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `quantise_rows` makes of x (n, d): int8 (n, d), units and lengths (n,)."""
    n, d = x.shape
    tiles = _tiles(np.zeros((-(-n // loops.TILE_ROWS) * loops.TILE_ROWS, d), np.int8))
    unit, length = np.empty(n, np.float32), np.empty(n, np.float32)
    loops.quantise_rows(x, tiles, unit, length)
    rows = np.ascontiguousarray(tiles.swapaxes(1, 2)).view(np.uint8).reshape(-1, 4 * tiles.shape[1]) ^ 128
    rows = rows.view(np.int8)
    assert not rows[n:].any() and not rows[:, d:].any()
    assert (_tiles(rows[:, :d]) == tiles).all()
    return rows[:n, :d], unit, length


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_row_is_quantised_to_half_a_unit(shape: tuple[int, int, int, int]) -> None:
    n, d, _, seed = shape
    x = _normal(seed, n, d) * 10.0 ** np.random.default_rng(seed).integers(-6, 6, (n, 1)).astype(np.float32)
    x[0] = 0
    rough, scale, length = _quantised(x)
    np.testing.assert_allclose(length, np.linalg.norm(x.astype(np.float64), axis=1), rtol=1e-5)
    assert np.abs(rough).max() <= 127 and (rough[0] == 0).all() and (scale > 0).all()
    assert (np.abs(x - rough * scale[:, None]) <= 0.5001 * scale[:, None]).all()


def _int8_copy(F: int, d: int) -> tuple[np.ndarray, ...]:
    """Room for `quantise_latents`: shadow, shift, unit and length."""
    shadow = np.zeros((-(-F // loops.GROUP), _words(d), loops.GROUP), np.int32)
    return shadow, np.zeros(F, np.int32), np.zeros(F, np.float32), np.zeros(F, np.float32)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_the_int8_copy_of_latents_holds_what_quantised_rows_do(shape: tuple[int, int, int, int]) -> None:
    _, d, F, seed = shape
    W = _normal(seed, F, d)
    rough, unit, length = _quantised(W)
    shadow, shift, units, lengths = _int8_copy(F, d)
    for part in (slice(F // 2, F), slice(0, F // 2)):
        loops.quantise_latents(part.start, part.stop, W, shadow, shift, units, lengths)
    by_latent = (
        np.ascontiguousarray(shadow.transpose(0, 2, 1)).view(np.int8).reshape(len(shadow) * loops.GROUP, -1)
    )
    assert (by_latent[:F, :d] == rough).all() and not by_latent[F:].any() and not by_latent[:, d:].any()
    assert (shift == -128 * rough.sum(axis=1, dtype=np.int32)).all()
    assert (units == unit).all() and (lengths == length).all()
    loops.quantise_latents(0, F, W, shadow[:, :0].copy(), shift, units, again := np.empty(F, np.float32))
    assert (again == length).all()


@pytest.mark.skipif(not loops.multiplies_int8(), reason="this processor has no AVX-512 VNNI")
@given(st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_rough_scores_are_products_of_int8(d: int, tiles: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, F = tiles * loops.TILE_ROWS, groups * loops.GROUP
    x = rng.integers(-128, 128, (m, d)).astype(np.int8)
    W = np.where(rng.random((F, d)) < 0.2, 127, rng.integers(-127, 128, (F, d))).astype(np.float32)
    W[:, 0] = 127  # so that the unit is 1
    shadow, shift, _, _ = copy = _int8_copy(F, d)
    loops.quantise_latents(0, F, W, *copy)
    unit, bias, x_unit = rng.random((3, max(m, F)), np.float32)
    unit, bias, x_unit = unit[:F].copy(), bias[:F].copy(), x_unit[: m + 8].copy()
    scores = np.full((groups, m + 8, loops.GROUP), np.nan, np.float32)  # more rows than are asked for
    best = np.full((m + 8, groups), np.nan, np.float32)
    loops.rough_scores(_tiles(x), x_unit, shadow, shift, unit, bias, scores, best)
    product = x.astype(np.int64) @ W.T.astype(np.int64)
    found = scores[:, :m].swapaxes(0, 1)
    np.testing.assert_allclose(
        found.reshape(m, F), product * unit + bias * x_unit[:m, None], rtol=1e-5, atol=1e-3
    )
    assert (best[:m] == found.max(axis=2)).all()
    assert np.isnan(scores[:, m:]).all() and np.isnan(best[m:]).all()


def _entries(
    rough: np.ndarray,
    x: np.ndarray,
    W: np.ndarray,
    b_enc: np.ndarray,
    edge: np.ndarray,
    wanted: int,
    off: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates by a rough x Wᵀ, with exact pre-activations."""
    n, F = rough.shape
    width = -(-F // loops.GROUP) * loops.GROUP
    scores, wrong = np.full((n, width), -np.inf, np.float32), np.zeros(width, np.float32)
    scores[:, :F], wrong[:F] = rough + (b_enc - edge), off
    grouped, size, wrong = scores.reshape(n, -1, loops.GROUP), 1, wrong[:F]
    if 2 * loops.GROUP * wanted <= F:
        size = loops.GROUP
        wrong = np.array([off[g : g + size].max() for g in range(0, F, size)])
    starts, latents = np.zeros(n + 1, np.int64), np.empty(9 * n * F + 999, np.int32)
    least = np.zeros(n, np.float32)
    given = (grouped.swapaxes(0, 1), grouped.max(axis=2), wrong, size, wanted, least, starts)
    found = loops.candidates(*given, latents)
    assert found == starts[-1]
    starts = starts.copy()
    assert not found or loops.candidates(*given, np.empty(found - 1, np.int32)) == -1
    values = np.empty(found, np.float32)
    loops.pre_activations(x, W, b_enc, starts, latents[:found], values)
    return starts, latents[:found], values


@given(SHAPES, st.integers(1, 12), st.sampled_from(["normal", "ties", "sorted"]))
@settings(max_examples=80, deadline=None)
def test_the_screened_top_k_is_the_top_k(shape: tuple[int, int, int, int], k: int, kind: str) -> None:
    n, d, F, seed = shape
    k = min(k, F)
    x, W, b = _normal(seed, n, d), _normal(seed + 1, F, d), _normal(seed + 2, F)
    if kind == "ties":
        x, W, b = np.ones_like(x), np.ones_like(W), np.zeros_like(b)
    elif kind == "sorted":
        W[:] = np.linspace(-1, 1, F, dtype=np.float32)[:, None]
    exact = (x @ W.T + b).astype(np.float32)
    off = _normal(seed + 3, n, F)
    for error in (0.0, 0.2):
        wrong = (error * np.abs(off).max(axis=0) + 1e-4).astype(np.float32)
        entries = _entries(exact - b + error * off, x, W, b, np.zeros_like(b), k, wrong)
        latents, values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
        loops.best_entries(*entries, latents, values)
        wanted, best = reference.top_k(*map(torch.from_numpy, (x, W, b)), k)
        np.testing.assert_allclose(np.sort(values)[:, ::-1], best.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(exact, latents, 1), values, rtol=1e-4, atol=1e-4)
        assert all(len(set(row)) == k for row in latents.tolist())
        if kind == "normal" and F > 1:
            gap = np.sort(exact)[:, ::-1]
            clear = gap[:, k - 1] - gap[:, min(k, F - 1)] > 1e-3
            for row in np.flatnonzero(clear) if k < F else ():
                assert set(latents[row]) == set(wanted[row].tolist())


def test_an_int8_screen_finds_the_top_k_of_uneven_rows() -> None:
    n, d, F, k = 64, 48, 1024, 8
    x = _normal(0, n, d) * np.geomspace(1, 30, d, dtype=np.float32)  # a few dimensions far larger than others
    W, b = _normal(1, F, d), np.zeros(F, np.float32)
    latents, values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    Screen(W, b, "int8").top_k(torch.from_numpy(x), latents, values)
    wanted, _ = reference.top_k(*map(torch.from_numpy, (x, W, b)), k)
    hits = sum(len(set(a) & set(c)) for a, c in zip(latents.tolist(), wanted.tolist(), strict=True))
    assert hits >= 0.999 * n * k
    np.testing.assert_allclose(values, np.take_along_axis(x @ W.T, latents.astype(np.int64), 1), rtol=1e-3)


@given(SHAPES, st.floats(-1, 3))
@settings(max_examples=60, deadline=None)
def test_entries_above_an_edge(shape: tuple[int, int, int, int], level: float) -> None:
    n, d, F, seed = shape
    x, W, b = _normal(seed, n, d), _normal(seed + 1, F, d), _normal(seed + 2, F)
    edge = np.full(F, level, np.float32) + 0.1 * _normal(seed + 3, F)
    exact = x @ W.T + b
    off = 0.2 * _normal(seed + 4, n, F)  # how wrong the rough product is, within the slack
    starts, latents, values = _entries(
        x @ W.T + off, x, W, b, edge, 0, np.abs(off).max(axis=0) + np.float32(1e-4)
    )
    rows = np.repeat(np.arange(n), np.diff(starts))
    np.testing.assert_allclose(values, exact[rows, latents], rtol=1e-4, atol=1e-4)
    assert len(set(rows * F + latents)) == len(rows)
    assert set(zip(*np.nonzero(exact > edge + 1e-4), strict=True)) <= set(zip(rows, latents, strict=True))


def test_a_screen_makes_room_for_rows_where_all_is_equal() -> None:
    F = 2000
    screen = Screen(np.ones((F, 16), np.float32), np.zeros(F, np.float32))
    x, latents, values = torch.ones(64, 16), np.empty((64, 3), np.int32), np.empty((64, 3), np.float32)
    room = len(screen._kept().latents)
    screen.top_k(x, latents, values)
    assert (values == 16).all() and all(len(set(row)) == 3 for row in latents.tolist())
    assert len(screen._kept().latents) > room
    starts, found, exact = screen.above(x, np.full(F, 15, np.float32))
    assert starts.tolist() == [F * i for i in range(65)] and (exact == 16).all()
    assert np.sort(found.reshape(64, F), axis=1).tolist() == [list(range(F))] * 64


def _in_parts(
    x: np.ndarray, W: np.ndarray, b: np.ndarray, k: int, parts: int, kind: Precision
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the first latents, with which those of the other parts compete."""
    screens = [Screen(w, c, kind) for w, c in zip(np.split(W, parts), np.split(b, parts), strict=True)]
    latents, values = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32)
    screens[0].top_k(torch.from_numpy(x), latents, values)
    for number, screen in enumerate(screens[1:], start=1):
        screen.improve(torch.from_numpy(x), number * len(W) // parts, latents, values)
    return latents, values


@given(SHAPES, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_competes_part_by_part_ends_as_the_top_k(
    shape: tuple[int, int, int, int], k: int, parts: int
) -> None:
    n, d, F, seed = shape
    k, F = min(k, F), F * parts
    x, W, b = _normal(seed, n, d), _normal(seed + 1, F, d), _normal(seed + 2, F)
    latents, values = _in_parts(x, W, b, k, parts, "float32")
    exact = x @ W.T + b
    np.testing.assert_allclose(np.sort(values)[:, ::-1], np.sort(exact)[:, ::-1][:, :k], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(exact, latents, 1), values, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == k for row in latents.tolist())


def test_an_int8_screen_lets_through_what_is_better() -> None:
    n, d, F, k = 200, 48, 3072, 8
    x, W, b = _normal(0, n, d), _normal(1, F, d), _normal(2, F)
    latents, values = _in_parts(x, W, b, k, 3, "int8")
    wanted, _ = reference.top_k(*map(torch.from_numpy, (x, W, b)), k)
    hits = sum(len(set(a) & set(c)) for a, c in zip(latents.tolist(), wanted.tolist(), strict=True))
    assert hits >= 0.999 * n * k
    np.testing.assert_allclose(values, np.take_along_axis(x @ W.T + b, latents, 1), rtol=1e-3)


def test_a_row_without_codes_stays_so() -> None:
    latents, values = np.array([[0, 1], [0, 1]], np.int32), np.array([[np.nan] * 2, [1, 5]], np.float32)
    entries = np.array([0, 1, 4]), np.arange(4, dtype=np.int32), np.array([9, 2, 1, 7], np.float32)
    loops.improve(*entries, 10, latents, values)
    assert np.isnan(values[0]).all() and latents[0].tolist() == [0, 1]
    assert values[1].tolist() == [7, 5] and latents[1].tolist() == [13, 1]


def test_a_row_that_is_not_a_number_has_no_codes() -> None:
    entries = (np.array([0, 0, 2]), np.array([4, 7], np.int32), np.array([1, 2], np.float32))
    latents, values = np.empty((2, 2), np.int32), np.empty((2, 2), np.float32)
    loops.best_entries(*entries, latents, values)
    assert np.isnan(values[0]).all() and sorted(values[1]) == [1, 2] and sorted(latents[1]) == [4, 7]


@given(SHAPES, st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_error_and_value_gradients(shape: tuple[int, int, int, int], k: int, nested: int) -> None:
    n, d, F, seed = shape
    k = min(k, F)
    latents, values = _codes(n, F, k, seed)
    W, b, target = _normal(seed, F, d), _normal(seed + 1, d), _normal(seed + 2, n, d)
    edges = np.unique([0, *np.random.default_rng(seed).integers(1, F + 1, nested - 1), F])
    nested = len(edges) - 1
    error, gradient = np.empty((nested, n, d), np.float32), np.zeros(n * k, np.float32)
    squared, starts = np.empty(n), np.arange(0, n * k + 1, k)
    half = n // 2
    for rows in (slice(0, half), slice(half, n)):
        loops.decode_and_compare(
            starts, latents.reshape(-1), values.reshape(-1), W, b, edges, target[rows], rows.start, 0.25,
            error[:, rows], gradient, squared[rows],
        )  # fmt: skip
    leaf, table = torch.from_numpy(values).requires_grad_(), torch.from_numpy(latents).long()
    wanted = [
        reference.error(table, leaf * (table < high), *map(torch.from_numpy, (W, b, target)))
        for high in edges[1:]
    ]
    (auto,) = torch.autograd.grad(sum(0.5 * e.square().sum() for e in wanted) / nested, leaf)
    np.testing.assert_allclose(gradient.reshape(n, k), 0.25 * auto, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(squared, wanted[-1].detach().square().sum(dim=1), rtol=1e-4, atol=1e-4)
    for m in range(nested):
        shared = torch.stack(wanted[m:]).sum(dim=0).detach() / nested
        np.testing.assert_allclose(error[m], shared, rtol=1e-3, atol=1e-4)


@given(SHAPES, st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_lists_hold_every_entry_once_in_order(shape: tuple[int, int, int, int], k: int) -> None:
    n, _, F, seed = shape
    latents, values = _codes(n, F, min(k, F), seed)
    first, rows, entries = _grouped(latents, values, F)
    assert first[0] == 0 and first[-1] == (values != 0).sum()
    for j in range(F):
        mine = slice(first[j], first[j + 1])
        want = np.flatnonzero((latents == j).any(axis=1) & ((latents == j) & (values != 0)).any(axis=1))
        assert rows[mine].tolist() == want.tolist()
        assert (latents.reshape(-1)[entries[mine]] == j).all()


@given(SHAPES, st.integers(1, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_update(shape: tuple[int, int, int, int], k: int, unit_rows: bool) -> None:
    n, d, F, seed = shape
    k = min(k, F)
    latents, values = _codes(n, F, k, seed)
    first, rows, entries = _grouped(latents, values, F)
    x, gradient, d_bias = _normal(seed, n, d), _normal(seed + 2, n, k), np.empty(F, np.float32)
    edges = np.array([0, (F + 1) // 2, F] if F > 1 else [0, F])  # two nested widths, each with its error
    error = _normal(seed + 1, len(edges) - 1, n, d)
    lists = (first, rows, entries, values.reshape(-1), gradient.reshape(-1), x, error, edges, 0.5)
    enc, bias, dec = (torch.zeros(F, d), torch.zeros(F), torch.zeros(F, d))
    for m in range(len(edges) - 1):
        tensors = [torch.from_numpy(t) for t in (values, gradient, x, error[m])]
        mine = slice(edges[m], edges[m + 1])
        for whole, part in zip(
            (enc, bias, dec), reference.weight_gradients(torch.from_numpy(latents), *tensors, F), strict=True
        ):
            whole[mine] = part[mine]
    W_enc, W_dec = _normal(seed + 3, F, d), _normal(seed + 4, F, d)
    if unit_rows:
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    moments = [np.abs(_normal(seed + 5 + i, F, d)) for i in range(4)]
    extra = np.full(F, -1, np.int32)
    extra[F // 2] = 0
    more = _normal(seed + 9, 2, 1, d)
    g_enc, g_dec = enc.clone(), 0.5 * dec
    g_enc[F // 2] += torch.from_numpy(more[0, 0])
    g_dec[F // 2] += torch.from_numpy(more[1, 0])
    before = [torch.from_numpy(t.copy()) for t in (W_enc, W_dec, *moments)]
    if unit_rows:
        g_dec = reference.without_length(g_dec, before[1])
    want_enc, *enc_moments = reference.adam(before[0], g_enc, before[2], before[3], 0.01, 3)
    want_dec, *dec_moments = reference.adam(before[1], g_dec, before[4], before[5], 0.01, 3)
    if unit_rows:
        want_dec = want_dec / want_dec.norm(dim=1, keepdim=True)
    back, copy = np.zeros(d, np.float32), _int8_copy(F, d)
    for begin, end in ((0, F // 3), (F // 3, F)):
        loops.update(
            begin, end, *lists, extra, more[0], more[1], W_enc, W_dec, *moments, d_bias, back,
            *copy, 0.01 / (1 - 0.9**3), 1 / (1 - 0.999**3), 0.9, 0.999, 1e-8, unit_rows,
        )  # fmt: skip
    np.testing.assert_allclose(d_bias, bias, rtol=1e-3, atol=1e-4)
    found = (W_enc, W_dec, *moments)
    for mine, wanted in zip(found, (want_enc, want_dec, *enc_moments, *dec_moments), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(back, bias.numpy() @ before[0].numpy(), rtol=1e-3, atol=1e-3)
    again = _int8_copy(F, d)
    loops.quantise_latents(0, F, W_enc, *again)
    assert all((a == c).all() for a, c in zip(copy, again, strict=True))


def test_what_is_not_a_number_stays_visible() -> None:
    W, b = np.ones((3, 4), np.float32), np.zeros(4, np.float32)
    target = np.full((1, 4), np.nan, np.float32)
    error, squared = np.empty((1, 1, 4), np.float32), np.empty(1)
    codes = (np.array([0, 1]), np.zeros(1, np.int32), np.ones(1, np.float32))
    loops.decode_and_compare(
        *codes, W, b, np.array([0, 3]), target, 0, 1.0, error, np.zeros(1, np.float32), squared
    )
    assert np.isnan(squared).all()


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000])
def test_every_width_is_searched_to_its_end(size: int) -> None:
    """The best latent is found wherever it stands, also in a last group that is not full."""
    x, bias = np.ones((1, 1), np.float32), np.zeros(size, np.float32)
    for at in {0, size // 2, size - 1}:
        W = np.zeros((size, 1), np.float32)
        W[at] = 5
        latents, values = np.empty((1, 1), np.int32), np.empty((1, 1), np.float32)
        entries = _entries(W.T, x, W, bias, np.zeros_like(bias), 1, np.zeros(size, np.float32))
        loops.best_entries(*entries, latents, values)
        assert latents[0, 0] == at and values[0, 0] == 5
