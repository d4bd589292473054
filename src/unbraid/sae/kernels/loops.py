"""Compiled loops over rows of activations and over latents (Numba; no compiler is needed where it runs).

Each function is sequential, releases the interpreter's lock and writes only into what it is given for its
own rows or latents, so any number of threads may run it side by side and the result does not depend on how
many.

Sizes: n rows of a batch, d = d_in, F = d_sae. Codes are rows of entries: those of row i are
starts[i]:starts[i + 1] of `latents` and `values`.
"""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]

# Sums may be reordered and fused; NaN and infinity keep their meaning.
_MATH = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return cast("Callable[P, R]", numba.njit(nogil=True, cache=True, fastmath=_MATH)(function))


@_compiled
def quantise_rows(x: F32, out: I8, scale: F32) -> None:
    """x (n, d) as int8 times one scale per row: out (n, d), scale (n,). A row of zeros has scale 1."""
    n, d = x.shape
    for i in range(n):
        top = np.float32(0)
        for c in range(d):
            top = max(top, abs(x[i, c]))
        unit = top / np.float32(127) if top > 0 else np.float32(1)
        scale[i] = unit
        inverse = np.float32(1) / unit
        for c in range(d):
            out[i, c] = np.int8(np.rint(x[i, c] * inverse))


@_compiled
def _partition(keys: F32, tags: I32, low: int, high: int, wanted: int) -> None:
    """Reorder keys[low:high] (and tags along) so that the `wanted` largest come first. Hoare's selection."""
    left, right, place = low, high - 1, low + wanted - 1
    while left < right:
        # The middle of three keeps sorted and constant input from being slow.
        a, b, c = keys[left], keys[(left + right) // 2], keys[right]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = left, right
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                tags[i], tags[j] = tags[j], tags[i]
                i += 1
                j -= 1
        if place <= j:
            right = j
        elif place >= i:
            left = i
        else:
            return


@_compiled
def _dot(a: F32, b: F32) -> np.float32:
    total = np.float32(0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@_compiled
def _four_dots(
    x: F32, a: F32, b: F32, c: F32, d: F32
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        p += x[i] * a[i]
        q += x[i] * b[i]
        r += x[i] * c[i]
        s += x[i] * d[i]
    return p, q, r, s


@_compiled
def _pre_activations(x: F32, W: F32, bias: F32, latents: I32, out: F32) -> None:
    """out[s] = x · W[latents[s]] + bias[latents[s]]; four at once, so that their rows come from memory
    together.
    """
    s = 0
    while s + 4 <= len(latents):
        one, two, three, four = latents[s], latents[s + 1], latents[s + 2], latents[s + 3]
        sums = _four_dots(x, W[one], W[two], W[three], W[four])
        out[s] = sums[0] + bias[one]
        out[s + 1] = sums[1] + bias[two]
        out[s + 2] = sums[2] + bias[three]
        out[s + 3] = sums[3] + bias[four]
        s += 4
    while s < len(latents):
        out[s] = _dot(x, W[latents[s]]) + bias[latents[s]]
        s += 1


@_compiled
def _bar(keys: F32, wanted: int) -> np.float32:
    """A bar that at least `wanted` keys reach and not many more. By bisection: counting has no branches."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    for _ in range(16):
        middle = np.float32(0.5) * (low + high)
        reach = 0
        for i in range(len(keys)):
            reach += keys[i] >= middle
        if reach >= wanted:
            low = middle
            if reach == wanted:
                break
        else:
            high = middle
    return low


@_compiled
def _score(product: I32, scale: F32, bias: F32, unit: np.float32, score: F32, best: F32) -> None:
    """score (F,) = product · scale + bias · unit, and best (groups,): the largest of g, g + groups, …"""
    F, groups = len(product), len(best)
    for start in range(0, F, groups):
        end = min(start + groups, F)
        # Slices tell the compiler that everything is contiguous; a fourth of the time without them.
        p, s, b, out = product[start:end], scale[start:end], bias[start:end], score[start:end]
        top = best[: end - start]
        if start == 0:
            top[:] = -np.inf
        for g in range(len(out)):
            value = np.float32(p[g]) * s[g] + b[g] * unit
            out[g] = value
            top[g] = value if value > top[g] else top[g]


@_compiled
def top_k_screened(
    product: I32,
    row_scale: F32,
    latent_scale: F32,
    x: F32,
    W: F32,
    bias: F32,
    screened: int,
    latents: I32,
    values: F32,
) -> None:
    """The k largest pre-activations of each row, looked for among the `screened` best by a rough product.

    product: (n, F) int32 products of quantised rows and latents; row_scale (n,) and latent_scale (F,) give
    their units. x: (n, d), W: (F, d), bias: (F,) are exact. latents and values: (n, k), filled. A row is cut
    into strided groups; the best `screened` entries lie in the `screened` groups with the largest maxima, so
    only these are searched.
    """
    n, F = product.shape
    k = latents.shape[1]
    groups = max(F // 32, min(F, 2 * screened))
    score = np.empty(F, np.float32)
    best = np.empty(groups, np.float32)
    keys, tags = np.empty(F, np.float32), np.zeros(F, np.int32)  # NaN leaves tags as they are
    for i in range(n):
        _score(product[i], latent_scale, bias, np.float32(1) / row_scale[i], score, best)
        bar = _bar(best, screened)
        found = 0
        for g in range(groups):
            if best[g] >= bar:
                for j in range(g, F, groups):
                    if score[j] >= bar:
                        keys[found] = score[j]
                        tags[found] = j
                        found += 1
        if found > screened:
            _partition(keys, tags, 0, found, screened)
            found = screened
        _pre_activations(x[i], W, bias, tags[:found], keys[:found])
        _partition(keys, tags, 0, found, k)
        latents[i] = tags[:k]
        values[i] = keys[:k]


@_compiled
def above_screened(
    product: I32,
    row_scale: F32,
    latent_scale: F32,
    x: F32,
    W: F32,
    bias: F32,
    edge: F32,
    slack: F32,
    counts: I64,
    latents: I32,
    values: F32,
) -> int:
    """The entries whose pre-activation exceeds edge (F,), looked for by a rough product that may be off by
    slack (n,) in each row; other arguments as in `top_k_screened`.

    Writes them row after row, latents rising, into latents and values (both of one length), and how many
    each row has into counts (n,). Returns their number, or −1 where they do not fit.
    """
    n, F = product.shape
    groups = max(F // 32, 1)
    score, best = np.empty(F, np.float32), np.empty(groups, np.float32)
    near, tags, exact = np.empty(groups, np.int32), np.empty(F, np.int32), np.empty(F, np.float32)
    below = bias - edge
    found = 0
    for i in range(n):
        unit = np.float32(1) / row_scale[i]
        _score(product[i], latent_scale, below, unit, score, best)
        bar = -slack[i] * unit
        many = 0
        for g in range(groups):
            near[many] = g
            many += best[g] > bar
        candidates = 0
        for offset in range(0, F, groups):
            for m in range(many):
                j = offset + near[m]
                if j < F and score[j] > bar:
                    tags[candidates] = j
                    candidates += 1
        _pre_activations(x[i], W, bias, tags[:candidates], exact[:candidates])
        start = found
        for c in range(candidates):
            if exact[c] > edge[tags[c]]:
                if found == len(latents):
                    return -1
                latents[found] = tags[c]
                values[found] = exact[c]
                found += 1
        counts[i] = found - start
    return found


@_compiled
def weighted_rows(latents: I64, weights: F32, table: F32, out: F32) -> None:
    """out[i] = Σ weights[i, s] · table[latents[i, s]]; latents and weights: (n, k), out: (n, d)."""
    n, k = latents.shape
    for i in range(n):
        row = out[i]
        row[:] = 0
        for s in range(k):
            weight = weights[i, s]
            if weight != 0:
                other = table[latents[i, s]]
                for c in range(len(row)):
                    row[c] += weight * other[c]


@_compiled
def row_products(latents: I64, rows: F32, table: F32, out: F32) -> None:
    """out[i, s] = rows[i] · table[latents[i, s]]; latents and out: (n, k), rows: (n, d)."""
    n, k = latents.shape
    for i in range(n):
        for s in range(k):
            out[i, s] = _dot(rows[i], table[latents[i, s]])


@_compiled
def sums_by_latent(
    begin: int, end: int, first: I64, rows: I32, entries: I32, weights: F32, table: F32, out: F32
) -> None:
    """out[j] = Σ weight · table[row] over the entries of each latent begin … end − 1; out: (F, d)."""
    for j in range(begin, end):
        mine = out[j]
        mine[:] = 0
        for p in range(first[j], first[j + 1]):
            weight, row = weights[entries[p]], table[rows[p]]
            for c in range(len(mine)):
                mine[c] += weight * row[c]


@_compiled
def decode_and_compare(
    starts: I64,
    latents: I32,
    values: F32,
    W_dec: F32,
    b_dec: F32,
    edges: I64,
    target: F32,
    first: int,
    scale: float,
    error: F32,
    gradient: F32,
    squared: NDArray[np.float64],
) -> None:
    """For rows first, first + 1, …: how wrong the reconstruction f W_dec + b_dec − target is, and what
    every entry's value adds to it, scale · error · W_dec[latent].

    With M nested widths edges[1:] (M is 1 but for Matryoshka), the reconstruction of the first edges[m + 1]
    latents has an error of its own, and what counts is the mean of the M: error[m] is Σ of those that latents
    edges[m] … edges[m + 1] − 1 have a part in, over M.

    target: (rows, d) and error: (M, rows, d), for these rows alone; starts, latents, values and gradient
    cover the batch. squared: (rows,), the squared length of each row's error when all latents take part.
    """
    rows, d = target.shape
    nested = len(edges) - 1
    for i in range(rows):
        begin, end = starts[first + i], starts[first + i + 1]
        for m in range(nested):
            row = error[m, i]
            if m == 0:
                for c in range(d):
                    row[c] = b_dec[c] - target[i, c]
            else:
                row[:] = error[m - 1, i]
            for e in range(begin, end):
                value, j = values[e], latents[e]
                if value != 0 and edges[m] <= j < edges[m + 1]:
                    latent = W_dec[j]
                    for c in range(d):
                        row[c] += value * latent[c]
        squared[i] = _dot(error[nested - 1, i], error[nested - 1, i])
        if nested > 1:
            share = np.float32(1) / np.float32(nested)
            for m in range(nested - 1, -1, -1):
                row = error[m, i]
                for c in range(d):
                    row[c] *= share
                if m + 1 < nested:
                    for c in range(d):
                        row[c] += error[m + 1, i, c]
        for e in range(begin, end):
            m = 0
            while latents[e] >= edges[m + 1]:
                m += 1
            gradient[e] = np.float32(scale) * _dot(error[m, i], W_dec[latents[e]])


@_compiled
def group_by_latent(starts: I64, latents: I32, values: F32, first: I64, rows: I32, entries: I32) -> None:
    """Lists of the entries of each latent, in the order of the rows; entries of value 0 are left out.

    Latent j's stand at first[j]:first[j + 1]; rows says which row each belongs to, entries where it is in
    `latents`. first: (F + 1,), rows and entries: as long as latents.
    """
    F = len(first) - 1
    first[:] = 0
    for e in range(len(latents)):
        if values[e] != 0:
            first[latents[e] + 1] += 1
    for j in range(F):
        first[j + 1] += first[j]
    place = first[:F].copy()
    for i in range(len(starts) - 1):
        for e in range(starts[i], starts[i + 1]):
            if values[e] != 0:
                p = place[latents[e]]
                place[latents[e]] += 1
                rows[p] = i
                entries[p] = e


@_compiled
def _sums(
    begin: int, end: int, rows: I32, entries: I32, values: F32, gradient: F32, x: F32, error: F32,
    scale: float, enc: F32, dec: F32,
) -> np.float32:  # fmt: skip
    """Add one latent's gradients to enc and dec (d,); returns that of its bias."""
    total = np.float32(0)
    for p in range(begin, end):
        g = gradient[entries[p]]
        v = np.float32(scale) * values[entries[p]]
        xs, es = x[rows[p]], error[rows[p]]
        total += g
        for c in range(len(enc)):
            enc[c] += g * xs[c]
            dec[c] += v * es[c]
    return np.float32(total)


@_compiled
def _adam(
    w: F32, g: F32, mean: F32, square: F32, lr: float, unbias: float, beta1: float, beta2: float, eps: float
) -> None:
    """One Adam step of a row; lr is divided by 1 − β₁ᵗ already, unbias is 1 / (1 − β₂ᵗ)."""
    b1, b2 = np.float32(beta1), np.float32(beta2)
    rest1, rest2 = np.float32(1) - b1, np.float32(1) - b2
    rate, scale, small = np.float32(lr), np.float32(unbias), np.float32(eps)
    for c in range(len(w)):
        m = b1 * mean[c] + rest1 * g[c]
        s = b2 * square[c] + rest2 * g[c] * g[c]
        mean[c] = m
        square[c] = s
        w[c] -= rate * m / (np.sqrt(s * scale) + small)


@_compiled
def update(
    begin: int,
    end: int,
    first: I64,
    rows: I32,
    entries: I32,
    values: F32,
    gradient: F32,
    x: F32,
    error: F32,
    edges: I64,
    scale: float,
    extra: I32,
    extra_enc: F32,
    extra_dec: F32,
    W_enc: F32,
    W_dec: F32,
    m_enc: F32,
    s_enc: F32,
    m_dec: F32,
    s_dec: F32,
    d_bias: F32,
    back: F32,
    shadow: I8,
    shadow_scale: F32,
    lr: float,
    unbias: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Move latents begin … end − 1 by their gradients, in one pass over their rows of every matrix.

    For each latent: Σ gradient · x[row] and scale · Σ value · error[m, row] over its entries, where latent j
    is one of edges[m] … edges[m + 1] − 1; plus row extra[j] of extra_enc and extra_dec where that is not −1;
    what would change the decoder row's length alone is taken out; Adam; the decoder row's length
    is set to 1; the encoder row is quantised into shadow (F, d) and shadow_scale (F,) for the next screen.
    d_bias: (F,), gradients of b_enc; back: (d,), to which Σ d_bias[j] · W_enc[j] is added, with the weights
    from before: what the codes' gradient is in the activations.
    """
    d = x.shape[1]
    enc, dec = np.empty(d, np.float32), np.empty(d, np.float32)
    m = 0
    for j in range(begin, end):
        while j >= edges[m + 1]:
            m += 1
        if extra[j] >= 0:
            enc[:] = extra_enc[extra[j]]
            dec[:] = extra_dec[extra[j]]
        else:
            enc[:] = 0
            dec[:] = 0
        total = _sums(first[j], first[j + 1], rows, entries, values, gradient, x, error[m], scale, enc, dec)
        d_bias[j] = total
        for c in range(d):
            back[c] += total * W_enc[j, c]
        along = _dot(dec, W_dec[j])
        for c in range(d):
            dec[c] -= along * W_dec[j, c]
        _adam(W_enc[j], enc, m_enc[j], s_enc[j], lr, unbias, beta1, beta2, eps)
        _adam(W_dec[j], dec, m_dec[j], s_dec[j], lr, unbias, beta1, beta2, eps)
        length = np.sqrt(_dot(W_dec[j], W_dec[j]))
        shrink = np.float32(1) / max(length, np.float32(1e-12))
        for c in range(d):
            W_dec[j, c] *= shrink
    quantise_rows(W_enc[begin:end], shadow[begin:end], shadow_scale[begin:end])
