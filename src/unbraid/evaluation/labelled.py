"""Documents with labels: three splits, tasks with as many positives as negatives, and one pass over the model
that leaves a mean code for each document.

A split follows from a document's content and the seed, so a text that comes twice is never on both sides. On
`select` latents are chosen, on `fit` whatever reads them is fitted, and every number comes from `test`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.stats import norm
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.plan import Piece, Plan
from unbraid.activations.text import Positions
from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import canonical_json
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes
from unbraid.stats.bootstrap import Interval
from unbraid.stats.splits import split_of

SHARES: Mapping[str, float] = {"select": 0.35, "fit": 0.3, "test": 0.35}
"""The share of the documents that each split gets."""
LEAST = 10
"""Documents that each class needs in each split before anything is measured on a label."""
Split = NDArray[np.str_]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """Where and how documents are read."""

    site: Site
    """The site whose activations are read."""
    positions: Positions = "all"
    """Which of their tokens."""
    context: int = 256
    """Tokens the model reads at once."""
    batch_tokens: int = 4096
    """Tokens in a batch; no influence on the results beyond rounding."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations of the wanted tokens of a batch of windows; n is their number."""

    x: Tensor
    """Activations (n, d_in), float32."""
    document: Rows
    """Number of each token's document (n,)."""
    pieces: list[Piece]
    """The windows, in the order of the rows."""

    def concepts(self) -> list[frozenset[str]]:
        """The concepts that stand at each token (n,)."""
        none: frozenset[str] = frozenset()
        return [
            piece.window.concepts[position] if piece.window.concepts else none
            for piece in self.pieces
            for position in np.flatnonzero(piece.keep)
        ]


@dataclass(frozen=True, eq=False)
class Pooled:
    """Means over each document's tokens."""

    raw: Matrix
    """Mean activation (n_docs, d_in)."""
    latents: Mapping[str, Any]
    """For each autoencoder by name the mean codes, a sparse (n_docs, d_sae) array."""
    fired: Mapping[str, Matrix]
    """For each autoencoder by name how many tokens each latent fires at (d_sae,)."""
    tokens: Rows
    """Tokens read of each document (n_docs,), at least one."""


@dataclass(frozen=True, eq=False)
class Task:
    """A yes-or-no question about documents, with as many of either answer in every split."""

    name: str
    """Label and value, such as topic=refund."""
    rows: Mapping[str, Rows]
    """For each split the numbers of its documents."""
    positive: Mapping[str, Flags]
    """For each split whether the answer is yes, beside `rows`."""


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """What a suite measured: for every autoencoder and every baseline the same metrics."""

    suite: str
    """Name of the suite."""
    rows: Mapping[str, Mapping[str, Interval]]
    """Intervals by name of the autoencoder or baseline and by name of the metric."""
    baselines: tuple[str, ...]
    """Which of the rows are baselines."""
    detectable: Mapping[str, float | None] = field(default_factory=dict[str, "float | None"])
    """Smallest difference of two rows that so many documents would show, by metric; None where none would."""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else is worth knowing, as JSON values."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""
    site: str = ""
    """Where the autoencoders read."""

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured, in the rows' order."""
        return list(dict.fromkeys(metric for row in self.rows.values() for metric in row))

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = {name: {m: i.as_dict() for m, i in row.items()} for name, row in self.rows.items()}
        return {
            **vars(self), "rows": rows, "baselines": list(self.baselines), "notes": list(self.notes)
        }  # fmt: skip


def detectable(rows: Mapping[str, Mapping[str, Interval]]) -> dict[str, float | None]:
    """For each metric the difference between two rows that a test at 5 % would notice with a power of 80 %.

    (1.96 + 0.84) · √2 · s, with s the half-width of the widest 95 % interval by 1.96, as if the rows had been
    measured on different documents; on the same ones less is noticed. None where some row has no interval.
    """
    found: dict[str, float | None] = {}
    for metric in sorted({metric for row in rows.values() for metric in row}):
        here = [row[metric] for row in rows.values() if metric in row]
        wide = max((i.high - i.low) / 2 for i in here)
        z = float(norm.ppf(0.975))
        point = any(i.n < 2 for i in here)
        found[metric] = None if point else (z + float(norm.ppf(0.8))) * 2**0.5 * wide / z
    return found


def sample(lm: LanguageModel, documents: Iterable[Document], reading: Reading, tokens: int = 4096) -> Tensor:
    """Activations of the first `tokens` wanted tokens or a batch more (n, d_in), to scale baselines by.

    The batch is of `tokens` as well, so that the caller's size has no influence.
    """
    parts: list[Tensor] = []
    for batch in read_tokens(lm, documents, replace(reading, batch_tokens=tokens)):
        parts.append(batch.x)
        if sum(map(len, parts)) >= tokens:
            break
    if not parts:
        raise UserError(
            f"the text has no token to read at --positions {reading.positions}; give another --text"
        )
    return torch.cat(parts)


def split_documents(documents: Sequence[Document], seed: int) -> Split:
    """The split of each document (n_docs,): select, fit or test."""
    return np.array([split_of(f"{seed}\n{_content(document)}", SHARES) for document in documents], np.str_)


def in_fixed_order(documents: Sequence[Document]) -> list[Document]:
    """The same documents ordered by a hash of content and labels, so that no draw depends on their order."""

    def key(document: Document) -> str:
        return hashlib.sha256(canonical_json([_content(document), dict(document.labels)])).hexdigest()

    return sorted(documents, key=key)


def _content(document: Document) -> str:
    if document.messages is None:
        return document.text or ""
    return canonical_json([[m["role"], m["content"]] for m in document.messages]).decode()


def tasks(documents: Sequence[Document], splits: Split, seed: int, least: int = LEAST) -> list[Task]:
    """One task for each label's value: that value against the others (one task where there are but two).

    Of the larger class only as many documents are drawn as the smaller has, in each split. Raises UserError
    when no value has `least` documents, and as many without it, in each split.
    """
    names = sorted({name for document in documents for name in document.labels})
    found: list[Task] = []
    for name in names:
        labelled = np.array([name in document.labels for document in documents])
        values = np.array([document.labels.get(name, "") for document in documents])
        kinds = sorted(set(values[labelled].tolist()))
        for value in kinds if len(kinds) > 2 else kinds[1:]:
            task = _balanced(f"{name}={value}", labelled, values == value, splits, seed, least)
            found += [task] if task else []
    if not found:
        known = f"labels found: {', '.join(names)}" if names else "no document has the field labels"
        raise UserError(
            f"no label divides the {len(documents)} documents ({known}); a label needs two values with at"
            f" least {least} documents each in each of the three splits, which takes about"
            f" {round(least / 0.3) * 2}"
        )
    return found


def _balanced(
    name: str, labelled: Flags, positive: Flags, splits: Split, seed: int, least: int
) -> Task | None:
    generator = np.random.default_rng(seed)
    rows: dict[str, Rows] = {}
    for split in SHARES:
        there = labelled & (splits == split)
        yes, no = (generator.permutation(np.flatnonzero(there & side)) for side in (positive, ~positive))
        size = min(len(yes), len(no))
        if size < least:
            return None
        rows[split] = np.sort(np.r_[yes[:size], no[:size]]).astype(np.int64)
    return Task(name, rows, {split: positive[chosen] for split, chosen in rows.items()})


def read_tokens(
    lm: LanguageModel, documents: Iterable[Document], reading: Reading, device: torch.device | None = None
) -> Iterator[Tokens]:
    """Activations of the wanted tokens, a batch at a time. Raises UserError for any that is not finite."""
    plan = Plan(lm, documents, reading.context, reading.batch_tokens, reading.positions, None)
    for group in plan:
        for pieces in group.batches:
            lengths = [len(piece.window.input_ids) for piece in pieces]
            ids = torch.full((len(pieces), max(lengths)), lm.pad_id, dtype=torch.long)
            real, keep = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
            for row, piece in enumerate(pieces):
                ids[row, : lengths[row]] = torch.tensor(piece.window.input_ids)
                real[row, : lengths[row]] = True
                keep[row, : lengths[row]] = torch.from_numpy(piece.keep)
            if not keep.any():
                continue
            states = read_sites(lm, ids.to(lm.device), real.long().to(lm.device), [reading.site])
            x = states[reading.site][keep.to(states[reading.site].device)].float()
            if not bool(torch.isfinite(x).all()):
                raise UserError(
                    f"model {lm.name} gives activations that are not finite at {reading.site}; load it in"
                    f" float32"
                )
            document = np.repeat([piece.document for piece in pieces], [piece.rows for piece in pieces])
            yield Tokens(x, document.astype(np.int64), pieces)


@torch.no_grad()
def encode(name: str, sae: SAE, x: Tensor) -> SparseCodes:
    """Codes of activations x (n, d_in); raises UserError, naming the autoencoder, unless they are finite."""
    codes = sae.encode(x)
    if not bool(torch.isfinite(codes.values).all()):
        raise UserError(f"the codes of autoencoder {name} are not finite; its weights are damaged")
    return codes


def pool(
    lm: LanguageModel,
    documents: Sequence[Document],
    saes: Mapping[str, SAE],
    reading: Reading,
    progress: Progress | None = None,
) -> Pooled:
    """Mean activation and mean codes of each document, in one pass over the model.

    Memory holds a batch, the means and, of each document, the latents that fired in it. Raises UserError when
    there are no documents, or one has no token to read.
    """
    if not documents:
        raise UserError("there are no documents; give a --text that holds some")
    raw = np.zeros((len(documents), lm.layout.width(reading.site)))
    count = np.zeros(len(documents), dtype=np.int64)
    sums = {name: DocumentSums(len(documents), sae.config.d_sae) for name, sae in saes.items()}
    for batch in read_tokens(lm, documents, reading):
        np.add.at(raw, batch.document, batch.x.double().cpu().numpy())
        count += np.bincount(batch.document, minlength=len(documents))
        for name, sae in saes.items():
            sums[name].add(encode(name, sae, batch.x), batch.document)
        if progress is not None:
            progress(int(batch.document.max()) + 1, len(documents), "reading")
    if (count == 0).any():
        empty = documents[int(np.argmin(count))].id
        raise UserError(
            f"document {empty} has no token to read at --positions {reading.positions}; leave it out"
        )
    means = {name: _divided(total.sparse(), count) for name, total in sums.items()}
    return Pooled(raw / count[:, None], means, {name: total.fired for name, total in sums.items()}, count)


class DocumentSums:
    """Sums of codes over each document's tokens, as sparse as the codes are."""

    def __init__(self, documents: int, d_sae: int) -> None:
        self.shape = (documents, d_sae)
        self.fired = np.zeros(d_sae)
        self.parts: list[tuple[Rows, Matrix]] = []

    def add(self, codes: SparseCodes, document: Rows) -> None:
        """Add the codes of n tokens and the document (n,) of each."""
        values = codes.values.double().cpu().numpy()
        place = document[:, None] * self.shape[1] + codes.indices.cpu().numpy()
        fired = values != 0
        self.fired += np.bincount(place[fired] % self.shape[1], minlength=self.shape[1])
        places, inverse = np.unique(place[fired], return_inverse=True)
        sums = np.bincount(inverse, weights=values[fired], minlength=len(places))
        self.parts.append((places, sums.astype(np.float64)))

    def sparse(self) -> Any:
        """The sums, a sparse (documents, d_sae) array."""
        places = np.concatenate([p for p, _ in self.parts]) if self.parts else np.zeros(0, np.int64)
        values = np.concatenate([v for _, v in self.parts]) if self.parts else np.zeros(0)
        where = (places // self.shape[1], places % self.shape[1])
        return csr_array(coo_array((values, where), shape=self.shape))


def _divided(sums: Any, count: Rows) -> Any:
    """A sparse (n, m) array with each row divided by its count."""
    out = cast(Any, csr_array(sums, copy=True))
    out.data /= np.repeat(count, np.diff(out.indptr))
    return out
