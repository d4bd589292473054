"""Compiled loops over rows of activations and over latents (Numba; no compiler is needed where it runs).

Each function is sequential, releases the interpreter's lock and writes only into what it is given for its
own rows or latents, so any number of threads may run it side by side and the result does not depend on how
many. They stand in one file because Numba's cache asks for the age of a function's own file alone, and not of
those whose functions it calls.

Sizes: n rows of a batch, d = d_in, F = d_sae. Codes are rows of entries: those of row i are
starts[i]:starts[i + 1] of `latents` and `values`.
"""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, codegen, config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]
U8 = NDArray[np.uint8]

LANES, TILE_ROWS, GROUP = 16, 8, 32
"""Numbers in a 512-bit register; rows, and latents next to each other, whose int8 products are summed at the
same time, each in a lane of its own."""
LINE = 4 * LANES
"""Bytes of a line of the cache."""
WORD, STEP = 4, 2
"""int8 products that the processor sums in one lane at once; words of a row that a step takes: with TILE_ROWS
rows, a line of the cache."""


def _use_wide_registers() -> None:
    """LLVM leaves 512-bit registers unused where it thinks that they slow the processor down; these loops
    wait for memory most of the time, and gain by them. Whoever has set Numba's own variables is left alone.
    """
    numba_config, features = cast(Any, config), codegen.get_host_cpu_features()
    if numba_config.CPU_NAME is None and numba_config.CPU_FEATURES is None and "+avx512f" in features:
        numba_config.CPU_NAME = binding.get_host_cpu_name()
        numba_config.CPU_FEATURES = f"{features},-prefer-256-bit"


_use_wide_registers()


def multiplies_int8() -> bool:
    """Whether the processor has an instruction for products of int8 (AVX-512 VNNI) that Numba may use."""
    features = cast(Any, config).CPU_FEATURES
    return "+avx512vnni" in (features or codegen.get_host_cpu_features()).split(",")


# Sums may be reordered and fused; NaN and infinity keep their meaning. A check for division by 0 would keep
# loops from being vectorised.
_MATH = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return cast(
        "Callable[P, R]", numba.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")(function)
    )


@_compiled
def _dot(a: F32, b: F32) -> np.float32:
    total = np.float32(0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@_compiled
def _quantise(x: F32, out: I8) -> tuple[np.float32, np.float32]:
    """x (d,) as int8 times a unit, in the first d of out; returns the unit, 1 for zeros, and x's length."""
    # Without their signs, floats are in the order of their bits; maxima of integers are vectorised.
    bits, most = x.view(np.int32), np.int32(0)
    for c in range(len(x)):
        most = max(most, bits[c] & np.int32(0x7FFFFFFF))
    highest = np.empty(1, np.int32)
    highest[0] = most
    top = highest.view(np.float32)[0]
    unit = top / np.float32(127) if top > 0 else np.float32(1)
    inverse = np.float32(1) / unit
    for c in range(len(x)):
        out[c] = np.int8(np.rint(x[c] * inverse))
    return unit, np.sqrt(_dot(x, x))


@_compiled
def quantise_rows(x: F32, tiles: I32, unit: F32, length: F32) -> None:
    """x (n, d) as int8 times one unit per row, in the order that `rough_scores` reads.

    tiles: (n / TILE_ROWS or more, words, TILE_ROWS), each a word of WORD numbers, 128 too large; unit:
    (n,); length: (n,), that of each row.
    """
    words = np.zeros(tiles.shape[1], np.int32)
    for i in range(len(x)):
        unit[i], length[i] = _quantise(x[i], words.view(np.int8))
        tile, place = tiles[i // TILE_ROWS], i % TILE_ROWS
        for c in range(len(words)):
            tile[c, place] = words[c] ^ np.int32(-0x7F7F7F80)  # from −128 … 127 to 0 … 255


@_compiled
def quantise_latents(
    begin: int, end: int, W: F32, shadow: I32, shift: I32, unit: F32, length: F32
) -> None:  # fmt: skip
    """Rows begin … end − 1 of W (F, d) as `quantise_rows` does it, in the order that `rough_scores` reads.

    shadow: (F / GROUP, words, GROUP), each a word of WORD int8; with no words, only lengths are found. shift:
    what is to be added to a product with numbers that are 128 too large. shift, unit, length: (F,) or more.
    """
    words = np.zeros(shadow.shape[1], np.int32)
    row = words.view(np.int8)
    for j in range(begin, end):
        if len(words) == 0:
            length[j] = np.sqrt(_dot(W[j], W[j]))
            continue
        unit[j], length[j] = _quantise(W[j], row)
        total = np.int32(0)
        for c in range(len(row)):
            total += row[c]
        shift[j] = -128 * total
        tile, place = shadow[j // GROUP], j % GROUP
        for c in range(len(words)):
            tile[c, place] = words[c]


def _everywhere(builder: Any, value: Any) -> Any:
    """The value in each of LANES lanes."""
    unset, word = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), ir.IntType(32)
    first = builder.insert_element(unset, value, ir.Constant(word, 0))
    return builder.shuffle_vector(first, unset, ir.Constant(ir.VectorType(word, LANES), [0] * LANES))


def _instruction(builder: Any, name: str, result: Any, *given: Any) -> Any:
    """LLVM's own function of that name."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, given), name)


@intrinsic
def _tile(
    _: Any, x: Any, words: Any, x_unit: Any, shadow: Any, shift: Any, unit: Any, bias: Any, scores: Any,
    best: Any, best_pitch: Any,
) -> Any:  # fmt: skip
    """`rough_scores` of TILE_ROWS rows and GROUP latents, in 512-bit registers, with the instruction that
    AVX-512 VNNI has for products of int8. All but `words` are addresses, and the bytes from one row's best to
    the next.
    """

    def emit(context: Any, builder: Any, _: Any, given: Any) -> Any:
        x, words, x_unit, shadow, shift, unit, bias, scores, best, best_pitch = given
        word, number = ir.IntType(32), ir.FloatType()
        integers, floats = ir.VectorType(word, LANES), ir.VectorType(number, LANES)
        line, halves = 4 * LANES, range(GROUP // LANES)
        multiply = _instruction(builder, "llvm.x86.avx512.vpdpbusd.512", integers, *3 * [integers])
        largest = _instruction(builder, "llvm.vector.reduce.fmax.v16f32", number, floats)
        byte = ir.IntType(8).as_pointer()
        prefetch = _instruction(builder, "llvm.prefetch.p0", ir.VoidType(), byte, word, word, word)

        def at(base: Any, index: Any, pitch: Any) -> Any:
            index, pitch = (ir.Constant(words.type, v) if isinstance(v, int) else v for v in (index, pitch))
            return builder.inttoptr(builder.add(base, builder.mul(index, pitch)), byte)

        def load(kind: Any, *where: Any) -> Any:
            return builder.load(builder.bitcast(at(*where), kind.as_pointer()), align=1)

        def store(value: Any, *where: Any) -> None:
            builder.store(value, builder.bitcast(at(*where), value.type.as_pointer()), align=1)

        shifts = [load(integers, shift, h, line) for h in halves]
        # LLVM keeps these in registers.
        sums = [[cgutils.alloca_once_value(builder, start) for start in shifts] for _ in range(TILE_ROWS)]
        size = builder.mul(words, ir.Constant(words.type, WORD * TILE_ROWS))  # of a tile of x
        with cgutils.for_range(builder, builder.udiv(words, ir.Constant(words.type, STEP))) as loop:
            numbers = builder.ptrtoint(at(x, loop.index, line), words.type)
            column = builder.ptrtoint(at(shadow, loop.index, STEP * 4 * GROUP), words.type)
            read, near, data = (ir.Constant(word, value) for value in (0, 3, 1))
            builder.call(prefetch, [at(numbers, size, 1), read, near, data])  # the next tile's
            for step in range(STEP):
                weights = [load(integers, column, step * len(halves) + h, line) for h in halves]
                for r, totals in enumerate(sums):
                    four = _everywhere(builder, load(word, numbers, step * TILE_ROWS + r, WORD))
                    for total, weight in zip(totals, weights, strict=True):
                        builder.store(builder.call(multiply, [builder.load(total), four, weight]), total)
        units, biases = ([load(floats, base, h, line) for h in halves] for base in (unit, bias))
        for r, totals in enumerate(sums):
            mine, found = _everywhere(builder, load(number, x_unit, r, 4)), []
            for h in halves:
                product = builder.fmul(builder.sitofp(builder.load(totals[h]), floats), units[h])
                found.append(builder.fadd(product, builder.fmul(biases[h], mine)))
                store(found[h], scores, r * len(halves) + h, line)
            top = builder.select(builder.fcmp_ordered(">", *found), *found)
            store(builder.call(largest, [top], fastmath=("nnan",)), best, r, best_pitch)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10), emit


@intrinsic
def _fetch(_: Any, address: Any) -> Any:
    """Asks for the line of the cache at an address, which need not be anybody's."""

    def emit(context: Any, builder: Any, _: Any, given: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = _instruction(builder, "llvm.prefetch.p0", ir.VoidType(), byte, word, word, word)
        read, near, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(prefetch, [builder.inttoptr(given[0], byte), read, near, data])
        return context.get_dummy_value()

    return types.void(types.intp), emit


@_compiled
def rough_scores(
    tiles: I32, x_unit: F32, shadow: I32, shift: I32, unit: F32, bias: F32, scores: F32, best: F32
) -> None:
    """scores[j / GROUP, i, j % GROUP] ≈ (x W_encᵀ + bias)[i, j] in units of x's row.

    tiles: of x, (m / TILE_ROWS, words, TILE_ROWS), see `quantise_rows`; words is a multiple of STEP; x_unit:
    1 / its units, (m,) or more; shadow and shift: see `quantise_latents`; unit and bias: (F,), F a multiple
    of GROUP; scores: (F / GROUP, m or more, GROUP); best: the largest score of each group, (m or more, F /
    GROUP). One group's weights stay in a core's nearest cache while all rows pass by and the next group's are
    on their way, and scores are written one after the other.
    """
    x, row_units, table, shifts = tiles.ctypes.data, x_unit.ctypes.data, shadow.ctypes.data, shift.ctypes.data
    units, biases, out, tops = unit.ctypes.data, bias.ctypes.data, scores.ctypes.data, best.ctypes.data
    lines = shadow.strides[0] // LINE
    for g in range(len(shadow)):
        j = 4 * g * GROUP
        for t in range(len(tiles)):
            i = t * TILE_ROWS
            for line in range(lines * t // len(tiles), lines * (t + 1) // len(tiles)):
                _fetch(table + (g + 1) * shadow.strides[0] + line * LINE)  # pyright: ignore[reportCallIssue]
            _tile(  # pyright: ignore[reportCallIssue]
                x + t * tiles.strides[0], shadow.shape[1], row_units + 4 * i, table + g * shadow.strides[0],
                shifts + j, units + j, biases + j, out + g * scores.strides[0] + i * scores.strides[1],
                tops + i * best.strides[0] + 4 * g, best.strides[0],
            )  # fmt: skip


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
def _eight_dots(
    x: F32, a: F32, b: F32, c: F32, d: F32, e: F32, f: F32, g: F32, h: F32
) -> tuple[np.float32, ...]:
    p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    t, u, v, w = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        p += x[i] * a[i]
        q += x[i] * b[i]
        r += x[i] * c[i]
        s += x[i] * d[i]
        t += x[i] * e[i]
        u += x[i] * f[i]
        v += x[i] * g[i]
        w += x[i] * h[i]
    return p, q, r, s, t, u, v, w


@_compiled
def _dots(x: F32, table: F32, which: I32, out: F32) -> None:
    """out[s] = x · table[which[s]]. Eight at once, so that their rows come from memory together."""
    s = 0
    while s + 8 <= len(which):
        a, b, c, d = which[s], which[s + 1], which[s + 2], which[s + 3]
        e, f, g, h = which[s + 4], which[s + 5], which[s + 6], which[s + 7]
        some = _eight_dots(x, table[a], table[b], table[c], table[d], table[e], table[f], table[g], table[h])
        for t in range(8):
            out[s + t] = some[t]
        s += 8
    while s < len(which):
        out[s] = _dot(x, table[which[s]])
        s += 1


@_compiled
def _at(which: I32, s: int) -> int:
    """which[s], or the last."""
    return which[min(s, len(which) - 1)]


@_compiled
def _weight(weights: F32, s: int) -> np.float32:
    """weights[s], or 0 beyond the last."""
    return weights[s] if s < len(weights) else np.float32(0)


@_compiled
def _add_eight(
    out: F32, a: F32, b: F32, c: F32, d: F32, e: F32, f: F32, g: F32, h: F32,
    p: np.float32, q: np.float32, r: np.float32, s: np.float32,
    t: np.float32, u: np.float32, v: np.float32, w: np.float32,
) -> None:  # fmt: skip
    for i in range(len(out)):
        left = p * a[i] + q * b[i] + r * c[i] + s * d[i]
        out[i] += left + t * e[i] + u * f[i] + v * g[i] + w * h[i]


@_compiled
def _add_rows(weights: F32, which: I32, table: F32, out: F32) -> None:
    """out += Σ weights[s] · table[which[s]], both of one length. Eight at once, as in `_dots`; where fewer
    are left, the last is taken again with weight 0.
    """
    for s in range(0, len(which), 8):
        a, b, c, d = which[s], _at(which, s + 1), _at(which, s + 2), _at(which, s + 3)
        e, f, g, h = _at(which, s + 4), _at(which, s + 5), _at(which, s + 6), _at(which, s + 7)
        _add_eight(
            out, table[a], table[b], table[c], table[d], table[e], table[f], table[g], table[h],
            weights[s], _weight(weights, s + 1), _weight(weights, s + 2),
            _weight(weights, s + 3), _weight(weights, s + 4), _weight(weights, s + 5),
            _weight(weights, s + 6), _weight(weights, s + 7),
        )  # fmt: skip


@_compiled
def _bar(keys: F32, wanted: int) -> np.float32:
    """A bar that at least `wanted` keys reach and not many more. By bisection: counting has no branches."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    for _ in range(16):
        middle = np.float32(0.5) * (low + high)
        reach = np.int32(0)
        for i in range(len(keys)):
            reach += np.int32(keys[i] >= middle)
        if reach >= wanted:
            low = middle
            if reach == wanted:
                break
        else:
            high = middle
    return low


@intrinsic
def _reach(_: Any, keys: Any, bar: Any, first: Any, out: Any) -> Any:
    """Which of LANES float32 at address `keys` are `bar` or more: writes first + lane of each to int32 at
    address `out`, one after the other, and returns how many; what follows them in the LANES there is lost.
    """

    def emit(_: Any, builder: Any, __: Any, given: Any) -> Any:
        keys, bar, first, out = given
        word, size = ir.IntType(32), keys.type
        integers, mask = ir.VectorType(word, LANES), ir.VectorType(ir.IntType(1), LANES)
        floats = ir.VectorType(bar.type, LANES)

        name = "llvm.experimental.vector.compress.v16i32"  # in registers: into memory it is slow on some
        compress = _instruction(builder, name, integers, integers, mask, integers)
        values = builder.load(builder.inttoptr(keys, floats.as_pointer()), align=4)
        reach = builder.fcmp_ordered(">=", values, _everywhere(builder, bar))
        lanes = builder.add(
            _everywhere(builder, builder.trunc(first, word)), ir.Constant(integers, list(range(LANES)))
        )
        found = builder.call(compress, [lanes, reach, ir.Constant(integers, ir.Undefined)])
        builder.store(found, builder.inttoptr(out, integers.as_pointer()), align=4)
        return builder.zext(builder.ctpop(builder.bitcast(reach, ir.IntType(LANES))), size)

    return types.intp(types.intp, types.float32, types.intp, types.intp), emit


@_compiled
def uncertainty(length: F32, unit: F32, ratio: np.float32, scale: float, size: int, out: F32) -> None:
    """out[g] = scale · √(length² + (unit · ratio)²), the largest of latents g · size … (g + 1) · size − 1."""
    factor = np.float32(scale)
    for g in range(len(out)):
        most = np.float32(0)
        for j in range(g * size, (g + 1) * size):
            other = unit[j] * ratio
            most = max(most, length[j] * length[j] + other * other)
        out[g] = factor * np.sqrt(most)


@_compiled
def candidates(
    scores: F32, best: F32, off: F32, size: int, wanted: int, least: F32, starts: I64, latents: I32
) -> int:  # fmt: skip
    """Latents that may be among the `wanted` largest of each row, or that may reach `least` where that is 0.

    scores: rough pre-activations, (F / GROUP, m, GROUP), lanes next to each other; best: the largest of each
    group, (m, F / GROUP); least: (m,), in the scores' units; size: how many latents are first looked at as
    one, GROUP or 1; off: how much a score of those may be wrong; what is beyond its length is not looked at.
    Written row after row into latents, row i's at starts[i]:starts[i + 1], from starts[0] on. Returns where
    the last end, or −1 without room. What the best of as many groups reach as are wanted, at least as many
    latents surely reach.
    """
    groups = len(off)
    surely, near = np.empty(groups, np.float32), np.empty(groups + LANES, np.int32)
    perhaps = np.full(-(-groups // LANES) * LANES, -np.inf, np.float32)
    groups_at, near_at = perhaps.ctypes.data, near.ctypes.data
    table, out = scores.ctypes.data, latents.ctypes.data
    found = starts[0]
    for i in range(len(starts) - 1):
        for g in range(groups):
            top = best[i, g] if size > 1 else scores[g // GROUP, i, g % GROUP]
            surely[g] = top - off[g]
            perhaps[g] = top + off[g]
        bar = _bar(surely, wanted) if wanted else least[i]
        bar -= np.float32(1e-6) * abs(bar)  # a score may be rounded in two ways
        many = 0
        for g in range(0, groups, LANES):
            many += _reach(groups_at + 4 * g, bar, g, near_at + 4 * many)  # pyright: ignore[reportCallIssue]
        if found + many * size + LANES > len(latents):
            return -1
        if size == 1:
            latents[found : found + many] = near[:many]
            found += many
        else:
            for g in near[:many]:
                keys = table + g * scores.strides[0] + i * scores.strides[1]
                for j in range(0, GROUP, LANES):
                    found += _reach(  # pyright: ignore[reportCallIssue]
                        keys + 4 * j, bar - off[g], g * GROUP + j, out + 4 * found
                    )
        starts[i + 1] = found
    return found


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
def pre_activations(x: F32, W: F32, bias: F32, starts: I64, latents: I32, out: F32) -> None:
    """out[e] = x[row] · W[latent] + bias[latent] of every entry; x: (n, d), W: (F, d), bias: (F,)."""
    for i in range(len(x)):
        mine = slice(starts[i], starts[i + 1])
        _dots(x[i], W, latents[mine], out[mine])
        for e in range(starts[i], starts[i + 1]):
            out[e] += bias[latents[e]]


@_compiled
def entries_by_int8(
    x: F32, W: F32, b_enc: F32, bias: F32, wanted: int, least: F32, sigmas: float, shadow: I32, shift: I32,
    unit: F32, length: F32, tiles: I32, scores: F32, best: F32, off: F32, size: int, starts: I64,
    latents: I32, values: F32,
) -> int:  # fmt: skip
    """Latents that may be among the `wanted` largest of each row of x Wᵀ + bias, or reach `least` (m,) there
    where `wanted` is 0, found by an int8 product; values: their x · W[latent] + b_enc[latent], exact.

    x: (m, d), as many rows at a time as scores has, so that these stay near the core; W: (F, d); b_enc: (F,);
    bias: F numbers and −∞ for the rest of a group; sigmas: standard errors that a score may be wrong by;
    shadow, shift, unit, length: see `quantise_latents`; tiles, scores, best, off: room for what
    `quantise_rows`, `rough_scores` and `uncertainty` find; size, starts, latents and the result as in
    `candidates`.
    """
    rows = scores.shape[1]
    x_unit, x_length = np.ones(rows, np.float32), np.empty(rows, np.float32)
    starts[0] = 0
    for begin in range(0, len(x), rows):
        part = x[begin : begin + rows]
        m = len(part)
        quantise_rows(part, tiles, x_unit, x_length)
        ratio = np.float32(0)
        for i in range(m):
            ratio = max(ratio, x_length[i] / x_unit[i])
            x_unit[i] = np.float32(1) / x_unit[i]
        some = tiles[: -(-m // TILE_ROWS)]
        rough_scores(some, x_unit, shadow, shift, unit, bias, scores, best)
        # Rounding to units of u is off by u/√12; errors of a product add up like independent ones. In units
        # of the row, for the row that is longest in its own.
        uncertainty(length, unit, ratio, sigmas / np.sqrt(12.0), size, off)
        mine, bars = starts[begin : begin + m + 1], least[begin : begin + m] * x_unit[:m]
        if candidates(scores, best, off, size, wanted, bars, mine, latents) < 0:
            return -1
        pre_activations(part, W, b_enc, mine, latents, values)
    return starts[len(x)]


@_compiled
def best_entries(starts: I64, latents: I32, keys: F32, chosen: I32, values: F32) -> None:
    """The k entries of each row that have the largest keys: chosen and values (n, k), filled. A row with too
    few entries holds NaN; its values are NaN. latents and keys are reordered.
    """
    n, k = chosen.shape
    for i in range(n):
        mine, row = keys[starts[i] : starts[i + 1]], latents[starts[i] : starts[i + 1]]
        if len(mine) < k:
            chosen[i] = np.arange(k)
            values[i] = np.nan
            continue
        bar, reach = _bar(mine, k), 0
        for key in mine:
            reach += key >= bar
        if reach == k:
            kept = 0
            for c in range(len(mine)):
                if mine[c] >= bar:
                    chosen[i, kept], values[i, kept] = row[c], mine[c]
                    kept += 1
        else:  # ties, or NaN
            _partition(mine, row, 0, len(mine), k)
            chosen[i], values[i] = row[:k], mine[:k]


@_compiled
def improve(starts: I64, latents: I32, keys: F32, first: int, chosen: I32, values: F32) -> None:
    """Let the entries of each row compete with what it has: chosen and values (n, k), of which none may be
    the same latent as an entry. Latents are numbered from `first`. Rows that hold NaN stay as they are.
    """
    for i in range(len(chosen)):
        least = np.argmin(values[i])
        for e in range(starts[i], starts[i + 1]):
            if keys[e] > values[i, least]:
                chosen[i, least], values[i, least] = first + latents[e], keys[e]
                least = np.argmin(values[i])


@_compiled
def weighted_rows(latents: I64, weights: F32, table: F32, out: F32) -> None:
    """out[i] = Σ weights[i, s] · table[latents[i, s]]; latents and weights: (n, k), out: (n, d)."""
    for i in range(len(latents)):
        out[i] = 0
        _add_rows(weights[i], latents[i], table, out[i])


@_compiled
def row_products(latents: I64, rows: F32, table: F32, out: F32) -> None:
    """out[i, s] = rows[i] · table[latents[i, s]]; latents and out: (n, k), rows: (n, d)."""
    for i in range(len(latents)):
        _dots(rows[i], table, latents[i], out[i])


@_compiled
def sums_by_latent(
    begin: int, end: int, first: I64, rows: I32, entries: I32, weights: F32, table: F32, out: F32
) -> None:
    """out[j] = Σ weight · table[row] over the entries of each latent begin … end − 1; out: (F, d)."""
    for j in range(begin, end):
        mine = slice(first[j], first[j + 1])
        out[j] = 0
        _add_rows(weights[entries[mine]], rows[mine], table, out[j])


@_compiled
def _within(latents: I32, low: int, high: int, place: I64, which: I32) -> int:
    """Which of the latents are low … high − 1, and where they stand; returns how many."""
    many = 0
    for e in range(len(latents)):
        place[many], which[many] = e, latents[e]
        many += low <= latents[e] < high
    return many


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
    most = 0
    for i in range(rows):
        most = max(most, starts[first + i + 1] - starts[first + i])
    place, which = np.empty(most, np.int64), np.empty(most, np.int32)
    weight, product = np.empty(most, np.float32), np.empty(most, np.float32)
    for i in range(rows):
        begin, end = starts[first + i], starts[first + i + 1]
        for m in range(nested):
            row = error[m, i]
            if m == 0:
                for c in range(d):
                    row[c] = b_dec[c] - target[i, c]
            else:
                row[:] = error[m - 1, i]
            many = _within(latents[begin:end], edges[m], edges[m + 1], place, which)
            for e in range(many):
                weight[e] = values[begin + place[e]]
            _add_rows(weight[:many], which[:many], W_dec, row)
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
        for m in range(nested):
            many = _within(latents[begin:end], edges[m], edges[m + 1], place, which)
            _dots(error[m, i], W_dec, which[:many], product[:many])
            for e in range(many):
                gradient[begin + place[e]] = np.float32(scale) * product[e]


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
    shadow: I32,
    shift: I32,
    unit: F32,
    length: F32,
    lr: float,
    unbias: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """Move latents begin … end − 1 by their gradients, in one pass over their rows of every matrix.

    For each latent: Σ gradient · x[row] and scale · Σ value · error[m, row] over its entries, where latent j
    is one of edges[m] … edges[m + 1] − 1; plus row extra[j] of extra_enc and extra_dec where that is not −1;
    with `unit_rows`, what would change the decoder row's length alone is taken out; Adam; with it, too,
    the decoder row's length is set to 1; the encoder row is quantised for the next screen, see
    `quantise_latents`.
    d_bias: (F,), gradients of b_enc; back: (d,), to which Σ d_bias[j] · W_enc[j] is added, with the weights
    from before: what the codes' gradient is in the activations.
    """
    d = x.shape[1]
    enc, dec = np.empty(d, np.float32), np.empty(d, np.float32)
    to_enc, to_dec = np.empty(len(x), np.float32), np.empty(len(x), np.float32)  # no latent fires twice a row
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
        mine, total = slice(first[j], first[j + 1]), np.float32(0)
        for p, e in enumerate(entries[mine]):
            total += gradient[e]
            to_enc[p] = gradient[e]
            to_dec[p] = np.float32(scale) * values[e]
        many = len(rows[mine])
        _add_rows(to_enc[:many], rows[mine], x, enc)
        _add_rows(to_dec[:many], rows[mine], error[m], dec)
        d_bias[j] = total
        for c in range(d):
            back[c] += total * W_enc[j, c]
        if unit_rows:
            along = _dot(dec, W_dec[j])
            for c in range(d):
                dec[c] -= along * W_dec[j, c]
        _adam(W_enc[j], enc, m_enc[j], s_enc[j], lr, unbias, beta1, beta2, eps)
        _adam(W_dec[j], dec, m_dec[j], s_dec[j], lr, unbias, beta1, beta2, eps)
        if unit_rows:
            shrink = np.float32(1) / max(np.sqrt(_dot(W_dec[j], W_dec[j])), np.float32(1e-12))
            for c in range(d):
                W_dec[j, c] *= shrink
    quantise_latents(begin, end, W_enc, shadow, shift, unit, length)
