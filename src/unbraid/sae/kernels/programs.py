"""The programs of `gpu`, in Triton's own language: each is run for a tile, a row or a latent.

Sizes and layouts as there. Names of arguments are those of the matrices; what Triton knows at compile time
is in capitals.
"""

# Programs are not Python: their arguments are pointers, numbers and constants, and have no types of ours.
# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_top(
    x, W, b, values, latents, n, F, d, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The KEEP largest of a tile of x W^T + b for each of its rows: values and latents (n, tiles, KEEP)."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles) * GROUP
    height = tl.minimum(tl.cdiv(n, BM) - first, GROUP)
    within = program % (GROUP * tiles)
    tile = within // height
    rows = (first + within % height) * BM + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    row_on, column_on = rows < n, columns < F
    row_at, column_at = rows.to(tl.int64) * d, columns.to(tl.int64) * d
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        on = inner < d
        left = tl.load(x + row_at[:, None] + inner[None, :], mask=row_on[:, None] & on[None, :], other=0.0)
        right = tl.load(
            W + column_at[None, :] + inner[:, None], mask=column_on[None, :] & on[:, None], other=0.0
        )
        total = tl.dot(left, right, total)
    total += tl.load(b + columns, mask=column_on, other=0.0)[None, :]
    total = tl.where(column_on[None, :], total, float("-inf"))
    place = tl.arange(0, BN)
    to = (rows.to(tl.int64) * tiles + tile) * KEEP
    for i in tl.static_range(KEEP):  # pyright: ignore
        best = tl.argmax(total, axis=1)
        tl.store(values + to + i, tl.max(total, axis=1), mask=row_on)
        tl.store(latents + to + i, tile * BN + best, mask=row_on)
        total = tl.where(place[None, :] == best[:, None], float("-inf"), total)


@triton.jit
def rescore(x, W, b, latents, values, d, c, C: tl.constexpr, BK: tl.constexpr):
    """A row's pre-activations in float32 at its c candidates."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, C)
    live = at < c
    j = tl.load(latents + row * c + at, mask=live, other=0).to(tl.int64)
    total = tl.load(b + j, mask=live, other=0.0)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        on = inner < d
        left = tl.load(x + row * d + inner, mask=on, other=0.0)
        right = tl.load(W + j[:, None] * d + inner[None, :], mask=live[:, None] & on[None, :], other=0.0)
        total += tl.sum(right * left[None, :], axis=1)
    tl.store(values + row * c + at, total, mask=live)


@triton.jit
def decode(
    latents, codes, W, b, target, error, gradient, squared, d, k, scale, K: tl.constexpr, BK: tl.constexpr
):
    """A row's error Σ code · W + b − target, its square, and each code's gradient scale · error · W."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, K)
    live = at < k
    j = tl.load(latents + row * k + at, mask=live, other=0).to(tl.int64)
    code = tl.load(codes + row * k + at, mask=live, other=0.0)
    slope = tl.zeros((K,), tl.float32)
    square = 0.0
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        on = inner < d
        w = tl.load(W + j[:, None] * d + inner[None, :], mask=live[:, None] & on[None, :], other=0.0)
        left = tl.sum(code[:, None] * w, axis=0) + tl.load(b + inner, mask=on, other=0.0)
        left -= tl.load(target + row * d + inner, mask=on, other=0.0)
        tl.store(error + row * d + inner, left, mask=on)
        square += tl.sum(left * left, axis=0)  # pyright: ignore
        slope += tl.sum(w * left[None, :], axis=1)
    tl.store(gradient + row * k + at, tl.where(code != 0.0, scale * slope, 0.0), mask=live)
    tl.store(squared + row, square)


@triton.jit
def sum_lists(first, entries, gradient, out):
    """A latent's bias gradient: the sum of its entries' gradients."""
    j = tl.program_id(0)
    total = 0.0
    for i in range(tl.load(first + j), tl.load(first + j + 1)):
        total += tl.load(gradient + tl.load(entries + i))
    tl.store(out + j, total)


@triton.jit
def adam(
    weight, grad, mean_at, square_at, on, step, unbias, B1: tl.constexpr, B2: tl.constexpr, EPS: tl.constexpr
):
    """A row moved by Adam, its moments stored."""
    mean = tl.load(mean_at, mask=on, other=0.0) * B1 + grad * (1.0 - B1)
    square = tl.load(square_at, mask=on, other=0.0) * B2 + grad * grad * (1.0 - B2)
    tl.store(mean_at, mean, mask=on)
    tl.store(square_at, square, mask=on)
    return weight - step * mean / (tl.sqrt(square * unbias) + EPS)


@triton.jit
def update(
    first, entries, codes, gradient, x, error, extra, extra_enc, extra_dec,
    W_enc, W_dec, mean_enc, square_enc, mean_dec, square_dec, shadow,
    d, k, scale, step, unbias,
    D: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One latent: both gradients, the decoder's without what changes its length, Adam, unit length again."""
    j = tl.program_id(0)
    inner = tl.arange(0, D)
    on = inner < d
    enc = tl.zeros((D,), tl.float32)
    dec = tl.zeros((D,), tl.float32)
    for i in range(tl.load(first + j), tl.load(first + j + 1)):
        entry = tl.load(entries + i)
        row = (entry // k).to(tl.int64) * d
        enc += tl.load(gradient + entry) * tl.load(x + row + inner, mask=on, other=0.0)
        dec += tl.load(codes + entry) * tl.load(error + row + inner, mask=on, other=0.0)
    dec *= scale
    more = tl.load(extra + j).to(tl.int64)
    also = on & (more + 0 * inner >= 0)  # a block, compared as one
    enc += tl.load(extra_enc + more * d + inner, mask=also, other=0.0)
    dec += tl.load(extra_dec + more * d + inner, mask=also, other=0.0)
    at = j.to(tl.int64) * d + inner
    w = tl.load(W_dec + at, mask=on, other=0.0)
    dec -= tl.sum(dec * w, axis=0) * w
    w = adam(w, dec, mean_dec + at, square_dec + at, on, step, unbias, B1, B2, EPS)
    w = tl.where(on, w, 0.0)
    tl.store(W_dec + at, w / tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1e-12), mask=on)
    w = tl.load(W_enc + at, mask=on, other=0.0)
    w = adam(w, enc, mean_enc + at, square_enc + at, on, step, unbias, B1, B2, EPS)
    tl.store(W_enc + at, w, mask=on)
    tl.store(shadow + at, w.to(shadow.dtype.element_ty), mask=on)
