"""Many tests at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Return the q-value of each p-value (n,): taking all with q ≤ α keeps the false discovery rate at α.

    Benjamini & Hochberg (1995), for independent or positively dependent tests. Raises ValueError unless each
    p lies in [0, 1].
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails both comparisons
        raise ValueError("p-values are one-dimensional and lie between 0 and 1")
    if values.size == 0:
        return values
    return np.asarray(false_discovery_control(values, method="bh"), dtype=np.float64)
