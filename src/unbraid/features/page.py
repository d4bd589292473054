"""Read an index: one latent as a page, or any question as SQL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unbraid.features.geometry import TokenEffect
from unbraid.features.groups import Edges, intervals_of, quantiles_of
from unbraid.features.tables import LAYOUT, SCHEMAS, Passages, Table
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import Manifest, check_sizes, read_manifest

if TYPE_CHECKING:  # building an index does without its memory
    import duckdb

TOKENS = 50
"""Tokens on a page, of those that a latent fires on."""


@dataclass(frozen=True)
class Example:
    """A place in the corpus where a latent fires, with the tokens around it."""

    document: str
    """Id of the document."""
    position: int
    """Token position of the firing in the whole document."""
    value: float
    """Activation at that position."""
    start: int
    """Token position in the document of the first token shown."""
    tokens: tuple[str, ...]
    """The tokens around the firing, as text."""
    activations: tuple[float, ...]
    """The latent's activation at each of these tokens."""
    token_ids: tuple[int, ...] = ()
    """Their numbers in the vocabulary."""
    passage: int = 0
    """The window of the text that they are from."""


@dataclass(frozen=True)
class Group:
    """The firings with activations in [low, high), and a uniform sample of them."""

    low: float
    """Least activation."""
    high: float
    """Where the next group begins; the largest activation for the last group, which holds it."""
    count: int
    """Exact number of firings in it."""
    share: float
    """Their share of all the latent's firings."""
    examples: tuple[Example, ...]
    """A uniform sample of its firings, strongest first."""

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


@dataclass(frozen=True)
class TokenUse:
    """A token that a latent fires on, counted over all firings."""

    token: str
    """The token as text."""
    id: int
    """Its number in the vocabulary."""
    firings: int
    """How often the latent fired on it."""
    share: float
    """Share of the latent's firings."""
    of_token: float
    """Share of the token's occurrences."""


@dataclass(frozen=True)
class PositionUse:
    """Where in a window of text a latent fires; position 0 is the window's first token."""

    mean: float
    """Mean position of its firings."""
    sd: float
    """Their standard deviation."""
    first: float
    """Share of its firings that are on a window's first counted token."""
    octaves: tuple[int, ...]
    """Firings at positions 0, 1, 2–3, 4–7, 8–15 …"""


@dataclass(frozen=True)
class StratumUse:
    """How often a latent fires in one kind of document."""

    name: str
    """The documents' stratum; empty for those that have none."""
    tokens: int
    """Counted tokens of this stratum."""
    firings: int
    """On how many of them it fires."""
    frequency: float
    """Their share."""


@dataclass(frozen=True)
class Neighbour:
    """Another latent that is like this one."""

    kind: str
    """decoder, encoder: by the cosine of their weights. coactive: they fire on the same tokens."""
    latent: int
    """Its number."""
    sae: str | None
    """Content id of the autoencoder that it belongs to; None for this one."""
    value: float
    """Cosine; for coactive latents the Jaccard index of the tokens on which they fire."""
    pmi: float | None = None
    """Pointwise mutual information of firing on a token, in nats (coactive only)."""
    together: int | None = None
    """Sampled tokens on which both fire (coactive only; the index's facts say how many were sampled)."""
    own: int | None = None
    """Sampled tokens on which this latent fires."""
    other: int | None = None
    """Sampled tokens on which the neighbour fires."""


@dataclass(frozen=True)
class LogitHistogram:
    """Direct effects on the logits of all output tokens."""

    counts: tuple[int, ...]
    """Output tokens in bins of equal width."""
    low: float
    """Lower edge of the first bin: the least effect."""
    high: float
    """Upper edge of the last bin: the greatest effect."""


@dataclass(frozen=True)
class LatentPage:
    """Everything that an index knows about one latent."""

    latent: int
    """Number of the latent."""
    count: int
    """Tokens on which it fired."""
    documents: int
    """Documents in which it fired."""
    density: float
    """Share of the counted tokens on which it fired."""
    max: float
    """Largest activation."""
    mean: float
    """Mean of the nonzero activations."""
    histogram: tuple[int, ...]
    """Exact counts of nonzero activations in bins of equal width from 0 to `histogram_top`."""
    histogram_top: float
    """Upper edge of the last bin."""
    promoted: tuple[TokenEffect, ...]
    """Output tokens that the decoder direction raises most."""
    suppressed: tuple[TokenEffect, ...]
    """Output tokens that it lowers most."""
    logits: LogitHistogram | None
    """How its effects on all output tokens are distributed."""
    top: tuple[Example, ...]
    """Strongest examples in different windows and contexts, strongest first."""
    quantiles: tuple[Group, ...]
    """Firings cut at their quantiles into groups of about equal numbers, weakest first."""
    intervals: tuple[Group, ...]
    """Firings cut into intervals of equal width of activation, weakest first; empty ones are left out."""
    distinct_tokens: int
    """How many different tokens it fires on."""
    tokens: tuple[TokenUse, ...]
    """Those that it fires on most often."""
    positions: PositionUse | None
    """Where in a window it fires; None if it never does."""
    strata: tuple[StratumUse, ...]
    """How often it fires in each stratum of the corpus; empty where documents have none."""
    neighbours: tuple[Neighbour, ...]
    """Latents that are like it, by kind, nearest first."""

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return _plain(self)


class Index:
    """An index folder, open for reading by any number of threads.

    Raises UserError when the folder holds no index, or one that an earlier version made, and IntegrityError
    when one of its files is missing or not as long as it was.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, kind="index")
        if self.manifest.facts.get("layout") != LAYOUT:
            raise UserError(f"{self.folder} was made by another version of unbraid; index the corpus again")
        check_sizes(self.folder, self.manifest)
        self.passages = Passages(self.folder)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.manifest.facts["d_sae"])

    @property
    def n_tokens(self) -> int:
        """Number of counted tokens."""
        return int(self.manifest.facts["tokens"])

    @cached_property
    def densities(self) -> NDArray[np.float64]:
        """Share of the counted tokens on which each latent fires (d_sae,)."""
        return pq.read_table(self.folder / "latents.parquet", columns=["density"])["density"].to_numpy()

    @cached_property
    def vocabulary(self) -> dict[int, tuple[str, int]]:
        """Each token of the corpus by its number: its text, and how often it was counted."""
        table = pq.read_table(self.folder / "vocabulary.parquet")
        columns = (table[name].to_pylist() for name in ("token", "text", "occurrences"))
        return {token: (text, count) for token, text, count in zip(*columns, strict=True)}

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return {name: Table(self.folder, name) for name in SCHEMAS}

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
        """Rows of a DuckDB query over the views passages, vocabulary, latents, weights, examples, tokens,
        neighbours and coactive (see `tables`).

        Raises UserError when the query is not valid.
        """
        import duckdb

        # A cursor each, so that several threads may ask at once.
        with self._connection.cursor() as cursor:
            try:
                cursor.execute(sql, parameters or [])
                names = [column[0] for column in cursor.description or []]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
            except duckdb.Error as error:
                raise UserError(f"the index could not answer the query: {error}") from error

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        connection = duckdb.connect()
        for table in (*SCHEMAS, "vocabulary"):
            connection.read_parquet(str(self.folder / f"{table}.parquet")).create_view(table)
        connection.from_arrow(self.passages.all()).create_view("passages")
        return connection

    def latent(self, latent: int) -> LatentPage:
        """All that is known about one latent; raises UserError when there is no such latent."""
        if not 0 <= latent < self.d_sae:
            raise UserError(f"latent {latent} does not exist; this index holds latents 0 to {self.d_sae - 1}")
        facts, weights = (self._tables[name].rows(latent)[0] for name in ("latents", "weights"))
        examples = self._tables["examples"].rows(latent)
        top = [row for row in examples if row["kind"] == "top" and row["rank"] >= 0]
        config = self.manifest.facts["config"]
        count = facts["count"]
        return LatentPage(
            latent=latent,
            **{name: facts[name] for name in ("count", "documents", "density", "max", "mean")},
            histogram=tuple(facts["histogram"]),
            histogram_top=facts["histogram_top"],
            promoted=_effects(weights["promoted"], weights["promoted_logits"]),
            suppressed=_effects(weights["suppressed"], weights["suppressed_logits"]),
            logits=LogitHistogram(tuple(weights["logits"]), weights["logits_low"], weights["logits_high"]),
            top=tuple(map(self._example, sorted(top, key=lambda row: row["rank"]))),
            quantiles=self._groups(
                quantiles_of(facts, config["quantiles"]),
                [row for row in examples if row["kind"] == "sample"],
                count,
            ),
            intervals=self._groups(
                intervals_of(facts), [row for row in examples if row["kind"] == "interval"], count
            ),
            distinct_tokens=facts["distinct_tokens"],
            tokens=self.tokens_of(latent, count)[:TOKENS],
            positions=_positions(facts),
            strata=self._strata(facts["strata"]),
            neighbours=self._neighbours(latent),
        )

    def _groups(self, edges: Sequence[Edges], sample: list[dict[str, Any]], count: int) -> tuple[Group, ...]:
        """Groups with at most `per_group` examples each: those that were drawn first."""
        per_group = int(self.manifest.facts["config"]["per_group"])
        sample = sorted(sample, key=lambda row: row["rank"])
        groups: list[Group] = []
        for number, (low, high, n) in enumerate(edges):
            last = number == len(edges) - 1
            inside = [r for r in sample if low <= r["value"] and (r["value"] < high or last)][:per_group]
            shown = sorted(inside, key=lambda row: -row["value"])
            groups.append(Group(low, high, n, n / count, tuple(map(self._example, shown))))
        return tuple(groups)

    def tokens_of(self, latent: int, count: int) -> tuple[TokenUse, ...]:
        """Every token that a latent, which fired `count` times, fires on, the most frequent first."""
        found: list[TokenUse] = []
        for row in self._tables["tokens"].rows(latent):
            text, occurrences = self.vocabulary[row["token"]]
            n = row["firings"]
            found.append(TokenUse(text, row["token"], n, n / count, n / occurrences))
        return tuple(found)

    def _strata(self, firings: list[int]) -> tuple[StratumUse, ...]:
        known = self.manifest.facts["strata"]
        return tuple(
            StratumUse(s["name"], s["tokens"], n, n / max(s["tokens"], 1))
            for s, n in zip(known, firings, strict=True)
        )

    def _neighbours(self, latent: int) -> tuple[Neighbour, ...]:
        by_weights = [
            Neighbour(row["kind"], row["neighbour"], row["sae"], row["cosine"])
            for row in self._tables["neighbours"].rows(latent)
        ]
        coactive = [
            Neighbour(
                "coactive", r["neighbour"], None, r["jaccard"], r["pmi"], r["together"], r["own"], r["other"]
            )
            for r in self._tables["coactive"].rows(latent)
        ]
        return (*by_weights, *coactive)

    def _example(self, row: dict[str, Any]) -> Example:
        activations, position = row["activations"], row["position"]
        window = len(activations) // 2
        start = max(position - window, 0)
        document, first, tokens = self.passages.cut(row["passage"], start, position + window + 1)
        offset = start - (position - window)
        return Example(
            document=document,
            position=first + position,
            value=row["value"],
            start=first + start,
            tokens=tuple([self.vocabulary[token][0] for token in tokens]),
            activations=tuple(activations[offset : offset + len(tokens)]),
            token_ids=tuple(tokens),
            passage=row["passage"],
        )


def _plain(value: Any) -> Any:
    """As dataclasses.asdict, of values that are never changed; a tuple's items are all of one kind."""
    # A page holds thousands of numbers, each of which asdict would copy: most of a page's time.
    if isinstance(value, tuple):
        return tuple(map(_plain, value)) if value and is_dataclass(value[0]) else value
    return {name: _plain(v) for name, v in vars(value).items()} if is_dataclass(value) else value


def _positions(facts: dict[str, Any]) -> PositionUse | None:
    n, total, squares = facts["count"], facts["position_total"], facts["position_squares"]
    if not n:
        return None
    # Whole numbers throughout, so that nothing cancels.
    variance = (n * squares - total * total) / (n * n)
    return PositionUse(
        total / n, variance**0.5, facts["position_first"] / n, tuple(facts["position_octaves"])
    )


def _effects(tokens: list[str], logits: list[float]) -> tuple[TokenEffect, ...]:
    return tuple(TokenEffect(token, logit) for token, logit in zip(tokens, logits, strict=True))
