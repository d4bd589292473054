"""What keeps the memory of a long pass from growing with it."""

from __future__ import annotations

from typing import Any, TypeVar

import pyarrow as pa
from numpy.typing import NDArray

from unbraid.model import pages

Array = TypeVar("Array", bound=NDArray[Any])


def grown(held: Array, more: Array) -> Array:
    """An array with another behind it.  It grows where it is: a copy would be its memory once more."""
    n = len(held)
    held.resize(n + len(more), refcheck=False)
    held[n:] = more
    return held


def give_back() -> None:
    """Let Arrow and glibc return what was freed to the system.

    They would keep the holes between what lives long, and there would be more of them as a pass goes on.
    """
    pa.default_memory_pool().release_unused()
    pages.give_back()
