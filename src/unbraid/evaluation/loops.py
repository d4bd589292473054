"""Compiled loops over rows of logits: cross-entropy and KL divergence in few passes over near memory.

Rows of logits are (V,) float32. Terms are float32, added up in blocks whose sums are float64. What is written
here in loops is `scoring.plain` in PyTorch.
"""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

import unbraid.sae.kernels.loops as _numba  # how Numba compiles for this machine is set there

__all__ = ["compare", "normalise", "normalisers"]
_ = _numba

P = ParamSpec("P")
R = TypeVar("R")
F32, F64, I32, I64 = NDArray[np.float32], NDArray[np.float64], NDArray[np.int32], NDArray[np.int64]

BLOCK = 512
"""Terms that are added up in float32."""
_LOWEST = np.float32(-87)
"""Below this, exp(x) is no ordinary float32; it is taken as 0."""
_LOG2_E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.4426950408889634),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720, 5040))
_ONE, _ZERO = np.float32(1), np.float32(0)


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    fast = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity keep their meaning
    return cast(
        "Callable[P, R]", numba.njit(nogil=True, cache=True, fastmath=fast, error_model="numpy")(function)
    )


@_compiled
def _largest(x: F32) -> np.float32:
    """The largest entry, NaN if that is one: floats are in the order of these integers."""
    bits, most = x.view(np.int32), np.int32(-(2**31))
    for c in range(len(x)):
        b = bits[c]
        most = max(most, b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    found = np.empty(1, np.int32)
    found[0] = most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return found.view(np.float32)[0]


@_compiled
def _exponentials(x: F32, top: np.float32, out: F32) -> np.float64:
    """Fill out (V,) with exp(x − top), of which none is above 1, and return their sum."""
    total = np.float64(0)
    power = np.empty(BLOCK, np.int32)
    factor = power.view(np.float32)
    for start in range(0, len(x), BLOCK):
        size = min(BLOCK, len(x) - start)
        part, to = x[start : start + size], out[start : start + size]
        for c in range(size):
            y = part[c] - top
            z = _LOWEST if y < _LOWEST else y
            n = np.floor(z * _LOG2_E + np.float32(0.5))
            r = (z - n * _LN2_HIGH) - n * _LN2_LOW
            # exp(x) = 2ⁿ exp(r) with |r| ≤ ln 2 / 2
            s = _C5 + r * (_C6 + r * _C7)
            s = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * s))))
            to[c] = _ZERO if y < _LOWEST else s
            power[c] = (np.int32(n) + np.int32(127)) << np.int32(23)
        block = _ZERO
        for c in range(size):
            to[c] *= factor[c]
            block += to[c]
        total += block
    return total


@_compiled
def _weighted_difference(p: F32, a: F32, b: F32) -> np.float64:
    """Σ p (a − b), where p = 0 adds nothing."""
    total = np.float64(0)
    for start in range(0, len(p), BLOCK):
        block = _ZERO
        for c in range(start, min(start + BLOCK, len(p))):
            block += p[c] * (a[c] - b[c]) if p[c] != _ZERO else _ZERO
        total += block
    return total


@_compiled
def normalise(logits: F32, p: F32, mass: F64, lse: F64) -> None:
    """Of rows of logits (n, V): exp(logits − largest) in p (n, V), their sums in mass (n,), and in lse (n,)
    the logarithms of the rows' sums of exponentials."""
    for i in range(len(logits)):
        top = _largest(logits[i])
        mass[i] = _exponentials(logits[i], top, p[i])
        lse[i] = top + np.log(mass[i])


@_compiled
def normalisers(logits: F32, lse: F64) -> None:
    """`normalise` where only lse is wanted."""
    p = np.empty(logits.shape[1], np.float32)
    for i in range(len(logits)):
        top = _largest(logits[i])
        lse[i] = top + np.log(_exponentials(logits[i], top, p))


@_compiled
def compare(
    clean: F32, p: F32, mass: F64, lse_clean: F64, new: F32, lse_new: F64, which: I64, kl: F64
) -> None:
    """KL(clean ‖ new) in kl (n,), not below 0 by rounding: clean, p, mass and lse_clean as `normalise` has
    them, new (m, V) with lse_new (m,), of which row which[i] goes with row i."""
    for i in range(len(clean)):
        w = which[i]
        mean = _weighted_difference(p[i], clean[i], new[w]) / mass[i]
        found = mean - lse_clean[i] + lse_new[w]
        kl[i] = 0.0 if found < 0 else found
