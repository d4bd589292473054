"""Splits that a document keeps for ever: decided by its own hash, not by its place in a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def split_of(text_or_id: str, shares: Mapping[str, float]) -> str:
    """Return the name of the split that a document belongs to.

    The first 64 bits of the SHA-256 of the text pick a point in [0, 1); `shares`, end to end in the order
    of their names, decide whose it is. The answer depends on nothing else: other documents may come and go.
    Raises ValueError unless the shares are not negative and sum to 1.
    """
    if (
        not shares
        or min(shares.values()) < 0
        or not math.isclose(math.fsum(shares.values()), 1, abs_tol=1e-9)
    ):
        raise ValueError("the shares of the splits must not be negative and must sum to 1")
    point = int.from_bytes(hashlib.sha256(text_or_id.encode()).digest()[:8], "big") / 2**64
    names = sorted(name for name, share in shares.items() if share > 0)
    end = 0.0
    for name in names:
        end += shares[name]
        if point < end:
            return name
    return names[-1]  # the sum fell a rounding error short of 1
