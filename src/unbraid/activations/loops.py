"""Compiled loops that round rows of activations to float16, and to int8 with the sums that tell its error.

Each row is read from memory once, in the caller's own thread.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import codegen, config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
F32, F64, I8 = NDArray[np.float32], NDArray[np.float64], NDArray[np.int8]
F16, U16 = NDArray[np.float16], NDArray[np.uint16]

_HIGHEST = np.float32(127)
_PIECE = 64
"""Rows whose sum is float32."""


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # Sums may be reordered; quotients may not be replaced by products, so that rounding is PyTorch's.
    fast = {"reassoc", "contract", "nsz"}
    return cast(
        "Callable[P, R]", numba.njit(nogil=True, cache=True, fastmath=fast, error_model="numpy")(function)
    )


def _halves() -> bool:
    """Whether the processor rounds to float16 by itself; else LLVM would want a library that is not there."""
    features = cast(Any, config).CPU_FEATURES or codegen.get_host_cpu_features()
    return platform.machine().lower() in ("arm64", "aarch64") or "+f16c" in features.split(",")


HALVES = _halves()


def _half(_: Any, __: Any) -> Any:
    """A float32 as the bits of the nearest float16."""

    def emit(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.bitcast(builder.fptrunc(given[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


_to_half = cast("Callable[[np.float32], np.uint16]", intrinsic(_half))


@_compiled
def _halve(x: F32, out: U16) -> None:
    for i in range(len(x)):
        for c in range(x.shape[1]):
            out[i, c] = _to_half(x[i, c])


def halve(x: F32, out: F16) -> None:
    """Fill out (n, d) with x (n, d) rounded to float16, as PyTorch and NumPy do it, which need more time."""
    if HALVES:
        _halve(x, out.view(np.uint16))
    else:
        np.copyto(out, x, casting="same_kind")


@_compiled
def round_rows(x: F32, least: np.float32, values: I8, scale: F32, sums: F64) -> tuple[float, float]:
    """Fill values (n, d) and scale (n,) with x (n, d) rounded, and add Σ x to sums (d,).

    Returns Σ of squares of what rounding changed and of x. A row's sums are float32, those of rows float64.
    """
    lost = squares = np.float64(0)
    found, part = np.empty(1, np.int32), np.zeros(x.shape[1], np.float32)
    for i in range(len(x)):
        row, to = x[i], values[i]
        # Without their sign, floats are in the order of these integers.
        bits, most = row.view(np.int32), np.int32(0)
        for c in range(len(row)):
            most = max(most, bits[c] & np.int32(0x7FFFFFFF))
        found[0] = most
        s = max(found.view(np.float32)[0] / _HIGHEST, least)
        scale[i] = s
        off, square = np.float32(0), np.float32(0)
        for c in range(len(row)):
            q = np.rint(row[c] / s)
            to[c] = np.int8(np.int32(q))
            e = q * s - row[c]
            off += e * e
            square += row[c] * row[c]
            part[c] += row[c]
        if i % _PIECE == _PIECE - 1 or i == len(x) - 1:
            sums += part
            part[:] = 0
        lost += off
        squares += square
    return float(lost), float(squares)
