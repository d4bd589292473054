"""Numbers that look random and depend on what they are made of alone, compiled (Numba)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I16 = NDArray[np.int16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A loop without the interpreter's lock. Sums are not reordered: what rounding leaves out is kept."""
    return cast("Callable[P, R]", numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@compiled
def mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = np.uint64(x + np.uint64(0x9E3779B97F4A7C15))
    x = np.uint64((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    x = np.uint64((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(x ^ (x >> np.uint64(31)))


@compiled
def keys_of(seed: np.uint64, document: I64, place: I64, out: U64) -> None:
    """A random number for each place in each document."""
    for i in range(len(out)):
        out[i] = mix(mix(seed ^ np.uint64(document[i])) ^ np.uint64(place[i]))


@compiled
def mixed(key: U64, latent: U64) -> U64:
    """The priorities of firings (n,) at places with these keys, as `take_in` draws them."""
    out = np.empty(len(key), np.uint64)
    for i in range(len(key)):
        out[i] = mix(key[i] ^ latent[i])
    return out


@compiled
def contexts_of(classes: U64, begins: I64, ends: I64, width: int, out: U64) -> None:
    """Hash of the classes of the `width` tokens to either side of each token, and its own.

    classes, out: (n,), of windows one after another that are begins[w]:ends[w].
    """
    for w in range(len(begins)):
        for i in range(begins[w], ends[w]):
            found = np.uint64(0)
            for j in range(i - width, i + width + 1):
                inside = begins[w] <= j < ends[w]
                found = mix(found ^ (classes[j] if inside else np.uint64(1)))
            out[i] = found
