"""How well a stream is shuffled, beside batches drawn at random from the whole corpus.

Rows of one document are alike, and so are documents that stand close together. For batches of b rows of N,
of which N_c are of document c, drawing without replacement gives

    pairs of one document in a batch:   C(b, 2) · Σ N_c (N_c − 1) / (N (N − 1))
    documents in a batch:               Σ (1 − C(N − N_c, b) / C(N, b))
    variance of a batch's mean place:   σ² / b · (N − b) / (N − 1)        σ² = that of a row's place

and what a stream has is divided by it: 1 is a perfect shuffle in all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from unbraid.activations.inorder import order_of
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import Group, Shuffle


@dataclass(frozen=True)
class Mixing:
    """Means over the batches, as multiples of chance."""

    same_document: float
    """Pairs of rows of the same document in a batch; NaN where no document has two rows."""
    documents: float
    """Different documents in a batch."""
    drift: float
    """Root mean square distance of a batch's mean place in the corpus from the corpus' middle: far above 1
    where the stream wanders along the corpus, below 1 where every batch takes from all of it evenly."""
    batches: int
    """Full batches that were looked at."""


def measure(order: NDArray[np.int64], documents: NDArray[np.int64], batch_size: int) -> Mixing:
    """Measure one epoch: `order` (N,) has the number of each row as it is dealt out, and `documents` (N,) the
    document of each row by its number. Raises ValueError for less than one full batch of at least two rows.
    """
    n, b = len(order), batch_size
    if not 2 <= b <= n or len(documents) != n:
        raise ValueError("needs a batch_size of 2 to as many rows as there are, and a document for each")
    batches = order[: n // b * b].reshape(-1, b)
    _, names, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    pairs, different = 0.0, 0
    for batch in batches:
        counts = np.unique(names[batch], return_counts=True)[1]
        pairs += float((counts * (counts - 1)).sum()) / 2
        different += len(counts)
    chance_pairs = b * (b - 1) / 2 * float((sizes * (sizes - 1.0)).sum()) / (n * (n - 1.0))
    rest = n - sizes[n - sizes >= b]  # of these documents a batch may have no row
    missed = gammaln(rest + 1) - gammaln(rest - b + 1) - gammaln(n + 1) + gammaln(n - b + 1)
    chance_different = len(sizes) - float(np.exp(missed).sum())
    spread = (n * n - 1) / 12 / b * (n - b) / max(n - 1, 1)
    distance = float(((batches.mean(axis=1) - (n - 1) / 2) ** 2).mean())
    return Mixing(
        same_document=pairs / len(batches) / chance_pairs if chance_pairs else float("nan"),
        documents=different / len(batches) / chance_different,
        drift=(distance / spread) ** 0.5 if spread else float("nan"),
        batches=len(batches),
    )


def documents_of(store: ActivationStore) -> NDArray[np.int64]:
    """The document of every row, (n_tokens,)."""
    parts = [store.columns(shard).documents.numpy() for shard in range(len(store.shards))]
    return np.concatenate(parts).astype(np.int64)


def order_of_store(rows: int, shard_tokens: int, *, seed: int, buffer_shards: int) -> NDArray[np.int64]:
    """Numbers of the rows (rows,) as `stream.batches` deals them out in the first epoch."""
    shuffle, dealt = Shuffle.over(rows, shard_tokens, seed, buffer_shards), list[NDArray[np.int64]]()
    for index in range(-(-len(shuffle.starts) // shuffle.per_group)):
        group = Group(0, index)
        runs = [np.arange(first, first + length) for first, length in shuffle.runs(group)]
        dealt.append(np.concatenate(runs)[shuffle.order(group)])
    return np.concatenate(dealt)


def order_of_capture(rows: int, *, seed: int, buffer_tokens: int) -> NDArray[np.int64]:
    """Numbers of the rows (rows,) as `inorder` deals them out in the first epoch."""
    starts = range(0, rows, buffer_tokens)
    sizes = [min(buffer_tokens, rows - start) for start in starts]
    return np.concatenate(
        [start + order_of(seed, 0, g, n) for g, (start, n) in enumerate(zip(starts, sizes, strict=True))]
    )
