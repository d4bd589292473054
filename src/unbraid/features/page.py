"""Read an index: one latent as a page, or any question as SQL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unbraid.features.geometry import TokenEffect
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import Manifest, read_manifest

TABLES = ("passages", "vocabulary", "latents", "examples")


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
    top: tuple[Example, ...]
    """Strongest examples in different windows and contexts, strongest first."""
    quantiles: tuple[tuple[Example, ...], ...]
    """Sampled examples in groups of equal probability, weakest group first."""

    def intervals(self, groups: int = 5) -> tuple[tuple[Example, ...], ...]:
        """The same examples in `groups` intervals of equal width between 0 and the maximum, weakest first."""
        found: list[list[Example]] = [[] for _ in range(groups)]
        seen: set[tuple[str, int]] = set()
        for example in sorted(
            (*self.top, *(e for group in self.quantiles for e in group)), key=lambda e: -e.value
        ):
            if (example.document, example.position) not in seen:
                seen.add((example.document, example.position))
                found[min(int(example.value / self.max * groups), groups - 1)].append(example)
        return tuple(tuple(group) for group in found)


class Index:
    """An index folder.  Raises UserError when the folder holds no index."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, kind="index")

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
    def _vocabulary(self) -> dict[int, str]:
        table = pq.read_table(self.folder / "vocabulary.parquet")
        return dict(zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True))

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
        """Rows of a DuckDB query over the views passages, vocabulary, latents and examples.

        Raises UserError when the query is not valid.
        """
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
        connection = duckdb.connect()
        for table in TABLES:
            connection.read_parquet(str(self.folder / f"{table}.parquet")).create_view(table)
        return connection

    def latent(self, latent: int) -> LatentPage:
        """All that is known about one latent; raises UserError when there is no such latent."""
        if not 0 <= latent < self.d_sae:
            raise UserError(f"latent {latent} does not exist; this index holds latents 0 to {self.d_sae - 1}")
        facts = self.query("SELECT * FROM latents WHERE latent = ?", [latent])[0]
        rows = self.query(
            "SELECT e.*, p.id, p.first, p.tokens FROM examples e JOIN passages p USING (passage) "
            "WHERE e.latent = ? ORDER BY e.kind, e.quantile, e.rank",
            [latent],
        )
        groups = int(self.manifest.facts["config"]["quantiles"])
        return LatentPage(
            latent=latent,
            count=facts["count"],
            documents=facts["documents"],
            density=facts["density"],
            max=facts["max"],
            mean=facts["mean"],
            histogram=tuple(facts["histogram"]),
            histogram_top=facts["histogram_top"],
            promoted=_effects(facts["promoted"], facts["promoted_logits"]),
            suppressed=_effects(facts["suppressed"], facts["suppressed_logits"]),
            top=tuple(self._example(row) for row in rows if row["kind"] == "top"),
            quantiles=tuple(
                tuple(self._example(row) for row in rows if row["kind"] == "sample" and row["quantile"] == q)
                for q in range(groups)
            ),
        )

    def _example(self, row: dict[str, Any]) -> Example:
        tokens, activations, position = row["tokens"], row["activations"], row["position"]
        window = len(activations) // 2
        start, stop = max(position - window, 0), min(position + window + 1, len(tokens))
        offset = start - (position - window)
        return Example(
            document=row["id"],
            position=row["first"] + position,
            value=row["value"],
            start=row["first"] + start,
            tokens=tuple(self._vocabulary[token] for token in tokens[start:stop]),
            activations=tuple(activations[offset : offset + stop - start]),
        )


def _effects(tokens: list[str], logits: list[float]) -> tuple[TokenEffect, ...]:
    return tuple(TokenEffect(token, logit) for token, logit in zip(tokens, logits, strict=True))
