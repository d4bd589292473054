"""Clusters of latents that fire on the same tokens, as a taxonomy: each level's are parts of the one above.

Average linkage (Sokal and Michener, 1958) on 1 − Jaccard index; pairs that the index does not list as
co-active count as never firing together.  Linkage needs all pairs at once, so a connected piece of more than
PIECE latents is first cut where its links are weakest, until its parts are small enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from unbraid.features.page import Index

PIECE = 2048
"""Latents whose pairs are held at once: 32 MB."""
STEPS = 64
"""Cuts that are tried between the weakest and the strongest link of a piece."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which cluster each latent is in at each level."""

    of: Ints
    """Name of the cluster (d_sae, levels): the lowest latent in it."""
    largest: int
    """Latents in the largest connected piece, before any cut."""

    def members(self, level: int) -> dict[int, list[int]]:
        """The latents of each cluster of two and more at a level, by its name."""
        names, counts = np.unique(self.of[:, level], return_counts=True)
        kept = set(names[counts > 1].tolist())
        found: dict[int, list[int]] = {name: [] for name in sorted(kept)}
        for latent, name in enumerate(self.of[:, level].tolist()):
            if name in kept:
                found[name].append(latent)
        return found


def cluster(index: Index, levels: tuple[float, ...]) -> Clustering:
    """Cluster the latents of an index by its table of co-active ones; levels rise."""
    table = pq.read_table(index.folder / "coactive.parquet", columns=["latent", "neighbour", "jaccard"])
    a, b, weight = (table[name].to_numpy() for name in ("latent", "neighbour", "jaccard"))
    return clusters_of(a, b, weight, index.d_sae, levels)


def clusters_of(
    a: Ints, b: Ints, weight: NDArray[np.floating], n: int, levels: tuple[float, ...]
) -> Clustering:
    """The same of links (m,) between latents a and b, whose Jaccard index is `weight`."""
    links = csr_array(coo_array((weight.astype(np.float64), (a, b)), shape=(n, n)))
    links = links.maximum(links.T).tocsr()  # one of two may list the other alone
    links.setdiag(0)
    links.eliminate_zeros()
    of = np.repeat(np.arange(n)[:, None], len(levels), axis=1)
    largest = 0
    waiting = _pieces(links, np.arange(n))
    largest = max(map(len, waiting), default=1 if n else 0)
    while waiting:
        piece = waiting.pop()
        inner = links[piece][:, piece]
        if len(piece) > PIECE:
            waiting += _split(inner, piece)
            continue
        distance = 1 - inner.toarray()
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), "average")
        for level, least in enumerate(levels):
            names = fcluster(tree, 1 - least + 1e-12, "distance")
            lowest = np.full(names.max() + 1, n)
            np.minimum.at(lowest, names, piece)
            of[piece, level] = lowest[names]
    return Clustering(of, largest)


def _pieces(links: csr_array, latents: Ints) -> list[Ints]:
    """Connected pieces of two and more latents, given the links among them."""
    _, label = connected_components(links, directed=False)
    order = np.argsort(label, kind="stable")
    ends = np.flatnonzero(np.diff(label[order])) + 1
    return [latents[part] for part in np.split(order, ends) if len(part) > 1]


def _split(inner: csr_array, piece: Ints) -> list[Ints]:
    """A piece that is too large, in parts: without its weakest links, as few as make it fall apart."""
    steps = np.quantile(inner.data, np.linspace(0, 1, STEPS + 1))
    for bar in np.unique(steps):
        kept = inner.copy()
        kept.data[kept.data <= bar] = 0
        kept.eliminate_zeros()
        parts = _pieces(kept, piece)
        if max(map(len, parts), default=0) < len(piece) // 2 or not parts:
            return parts
    return []
