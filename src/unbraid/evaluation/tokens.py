"""What two passes over labelled tokens leave: how often latents and concepts meet, then what a few candidate
latents are at every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array, vstack

from unbraid.activations.documents import Document
from unbraid.evaluation.absorption import absorbed, cosines
from unbraid.evaluation.labelled import Flags, Matrix, Reading, Rows, encode, read_tokens
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

Array = Any
"""A sparse array of SciPy's."""
RIDGE = 1e-3
"""Of the mean variance, added along every direction before a covariance is inverted."""


class Counts:
    """How often latents fire, alone and where concepts stand, and how high they come in each document."""

    def __init__(self, concepts: int, d_sae: int) -> None:
        self.both = np.zeros((concepts, d_sae))
        self.fired = np.zeros(d_sae)
        self.parts: list[tuple[Rows, Matrix]] = []

    def add(self, values: Matrix, indices: Rows, labels: Flags, document: Rows) -> None:
        """Add codes (n, k), the concepts (n, C) at their tokens and the tokens' documents (n,)."""
        on, d_sae = values > 0, len(self.fired)
        self.fired += np.bincount(indices[on], minlength=d_sae)
        for c in np.flatnonzero(labels.any(axis=0)):
            self.both[c] += np.bincount(indices[on & labels[:, c, None]], minlength=d_sae)
        places, inverse = np.unique((document[:, None] * d_sae + indices)[on], return_inverse=True)
        highest = np.zeros(len(places))
        np.maximum.at(highest, inverse, values[on])
        self.parts.append((places, highest))

    def highest(self, documents: int) -> Array:
        """The highest value of each latent in each document, sparse by column (documents, d_sae)."""
        places = np.concatenate([p for p, _ in self.parts])
        values = np.concatenate([v for _, v in self.parts])
        order = np.lexsort((values, places))  # the highest of a place comes last
        places, values = places[order], values[order]
        last = np.r_[places[1:] != places[:-1], np.ones(min(1, len(places)), dtype=np.bool_)]
        where = (places[last] // len(self.fired), places[last] % len(self.fired))
        return csc_array((values[last], where), shape=(documents, len(self.fired)))


@dataclass(eq=False)
class Sums:
    """Sums over tokens, from which each concept's direction comes."""

    tokens: int
    """Tokens in all."""
    tokens_with: Matrix
    """Tokens with each concept (C,)."""
    x: Matrix
    """Σ x over all tokens (d_in,)."""
    x_with: Matrix
    """Σ x over the tokens with each concept (C, d_in)."""
    xx: Matrix
    """Σ x xᵀ over all tokens (d_in, d_in)."""

    @property
    def centre(self) -> Matrix:
        """E x (d_in,)."""
        return self.x / max(self.tokens, 1)

    def directions(self) -> Matrix:
        """Unit difference of the means of tokens with and without each concept (C, d_in)."""
        return _unit(self._differences())

    def probes(self) -> Matrix:
        """Fisher's (1936) linear discriminant of each concept, of unit length (C, d_in).

        The covariance is that of all tokens, which gives the same direction as the one within both kinds; a
        thousandth of its mean variance is added along every direction.
        """
        d_in = len(self.x)
        covariance = self.xx / max(self.tokens, 1) - np.outer(self.centre, self.centre)
        ridge = max(RIDGE * float(np.trace(covariance)) / d_in, 1e-300)
        solved = np.linalg.solve(covariance + ridge * np.eye(d_in), self._differences().T)
        return _unit(np.asarray(solved.T, dtype=np.float64))

    def _differences(self) -> Matrix:
        with_ = np.maximum(self.tokens_with, 1)[:, None]
        without = np.maximum(self.tokens - self.tokens_with, 1)[:, None]
        return self.x_with / with_ - (self.x - self.x_with) / without


def _unit(rows: Matrix) -> Matrix:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


@dataclass(frozen=True, eq=False)
class Columns:
    """What candidate latents are at all tokens of one split."""

    values: Array
    """Sparse by column (n, m), one column a candidate."""
    labels: Flags
    """Which concepts stand at each token (n, C)."""
    document: Rows
    """Each token's document (n,)."""
    taken: Flags
    """Where a concept stands, whether another latent than the concept's own would have to carry it (n, C):
    the firing latent with the largest projection on its direction meets the conditions of `absorption`."""
    projection: NDArray[np.float32]
    """(x − E x)·p of each concept's direction p (n, C)."""
    probed: NDArray[np.float32]
    """The same of each concept's linear probe (n, C)."""


def count_tokens(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    documents: Sequence[Document],
    reading: Reading,
    names: Sequence[str],
    progress: Progress | None = None,
) -> tuple[dict[str, Counts], Sums]:
    """The first pass, over the documents that latents are chosen on."""
    d_in, count = lm.layout.width(reading.site), len(names)
    sums = Sums(0, np.zeros(count), np.zeros(d_in), np.zeros((count, d_in)), np.zeros((d_in, d_in)))
    counts = {name: Counts(count, sae.config.d_sae) for name, sae in saes.items()}
    for batch in read_tokens(lm, documents, reading):
        labels = flags(batch.concepts(), names)
        x = batch.x.double().cpu().numpy()
        sums.tokens += len(x)
        sums.tokens_with += labels.sum(axis=0)
        sums.x += x.sum(axis=0)
        sums.xx += x.T @ x
        sums.x_with += labels.T.astype(np.float64) @ x
        for name, sae in saes.items():
            codes = encode(name, sae, batch.x)
            values, indices = codes.values.double().cpu().numpy(), codes.indices.cpu().numpy()
            counts[name].add(values, indices, labels, batch.document)
        if progress is not None:
            progress(int(batch.document.max()) + 1, len(documents), "choosing latents")
    return counts, sums


def candidate_columns(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    documents: Sequence[Document],
    reading: Reading,
    splits: NDArray[np.str_],
    names: Sequence[str],
    wanted: Mapping[str, Rows],
    sums: Sums,
    progress: Progress | None = None,
) -> dict[str, dict[str, Columns]]:
    """The second pass, over all documents: by autoencoder and split what its `wanted` latents (m,), in
    ascending order, are at every token."""
    directions, probes, centre = sums.directions(), sums.probes(), sums.centre
    aligned = {name: cosines(sae, directions) for name, sae in saes.items()}
    shared: dict[str, list[tuple[Any, ...]]] = {}
    parts: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for batch in read_tokens(lm, documents, reading):
        labels, split = flags(batch.concepts(), names), splits[batch.document]
        centred = batch.x.double().cpu().numpy() - centre
        projection = centred @ directions.T
        both = projection.astype(np.float32), (centred @ probes.T).astype(np.float32)
        of_split = {part: split == part for part in np.unique(split).tolist()}
        for part, at in of_split.items():
            shared.setdefault(part, []).append((labels[at], batch.document[at], both[0][at], both[1][at]))
        for name, sae in saes.items():
            codes = encode(name, sae, batch.x)
            values, indices = codes.values.double().cpu().numpy(), codes.indices.cpu().numpy()
            array = _columns(values, indices, wanted[name])
            taken = np.zeros(labels.shape, dtype=np.bool_)
            for c in np.flatnonzero(labels.any(axis=0)):
                on = labels[:, c]
                taken[on, c] = absorbed(projection[on, c], values[on], indices[on], aligned[name][:, c])
            for part, at in of_split.items():
                parts.setdefault((name, part), []).append((array[at], taken[at]))
        if progress is not None:
            progress(int(batch.document.max()) + 1, len(documents), "measuring")
    common = {
        part: [np.concatenate(each) for each in zip(*some, strict=True)] for part, some in shared.items()
    }
    found: dict[str, dict[str, Columns]] = {name: {} for name in saes}
    for (name, part), some in parts.items():
        arrays, taken = zip(*some, strict=True)
        labels, document, projection, probed = common[part]
        found[name][part] = Columns(
            csc_array(vstack(arrays)), labels, document, np.concatenate(taken), projection, probed
        )
    return found


def flags(concepts: Sequence[frozenset[str]], names: Sequence[str]) -> Flags:
    """Which of the named concepts stand at each token (n, C)."""
    place = {name: c for c, name in enumerate(names)}
    labels = np.zeros((len(concepts), len(names)), dtype=np.bool_)
    for row, here in enumerate(concepts):
        labels[row, [place[name] for name in here if name in place]] = True
    return labels


def _columns(values: Matrix, indices: Rows, wanted: Rows) -> Array:
    """The wanted latents (m,) of codes (n, k), sparse by row (n, m)."""
    at = np.minimum(np.searchsorted(wanted, indices), len(wanted) - 1)
    keep = (wanted[at] == indices) & (values > 0)
    row = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    return csr_array((values[keep], (row[keep], at[keep])), shape=(len(values), len(wanted)))
