"""Leaving out tokens whose activations are extremely large, such as attention sinks, and counting them.

A token is skipped when at any captured site its norm is more than `times` the site's median. The medians are
measured once, on the first group of batches, and written down with what every batch skipped: a resumed run
then knows how many rows a batch gave without reading it again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.plan import Piece
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.files import write_text

SKIPPED = "skipped.jsonl"
Read = Callable[[list[Piece]], Mapping[str, Tensor]]
"""Activations (n, d) by site of a batch's n wanted tokens."""


class NormLimit:
    """The medians, and for every batch in order how many rows it gives and what it skips."""

    def __init__(
        self, folder: Path, times: float, finished: int, earlier: dict[str, Any] | None = None
    ) -> None:
        """`finished` rows lie in finished shards; lines about batches beyond them are written again.
        `earlier` are the facts of a capture that this one goes on from: its medians hold.
        """
        self.path = folder / SKIPPED
        self.times = times
        self.medians: dict[str, float] = {}
        self.measured = 0
        """Tokens that the medians were measured on."""
        self.skipped: int = earlier["skipped"] if earlier else 0
        """Tokens skipped so far."""
        self._of: Counter[int] = Counter()
        self._known = self._read(finished)
        self._batch = 0
        if earlier and not self.medians:
            self._begin(earlier["medians"], earlier["measured_on_tokens"])

    def measure(self, batches: list[list[Piece]], read: Read) -> None:
        """Measure the medians on these batches, unless that has been done."""
        if self.medians or not batches:
            return
        norms: dict[str, list[Tensor]] = {}
        for batch in batches:
            for site, rows in read(batch).items():
                norms.setdefault(site, []).append(_norms(rows).cpu())
        medians = {site: float(np.median(torch.cat(n).numpy())) for site, n in norms.items()}
        self._begin(medians, sum(piece.rows for batch in batches for piece in batch))

    def _begin(self, medians: dict[str, float], measured: int) -> None:
        self.medians, self.measured = medians, measured
        write_text(self.path, _line({"medians": self.medians, "measured": self.measured}))

    def rows(self) -> int | None:
        """Rows of the next batch, if an earlier run has read it."""
        return self._known[self._batch]["rows"] if self._batch < len(self._known) else None

    def small(self, values: Mapping[str, Tensor]) -> Tensor:
        """Mask (n,) of the rows to keep. Values that are not finite are kept, so that they are refused."""
        large = [
            (norms := _norms(rows)).isfinite() & (norms > self.times * self.medians[site])
            for site, rows in values.items()
        ]
        return ~torch.stack([mask.cpu() for mask in large]).any(dim=0)

    def record(self, batch: list[Piece], small: Tensor | None) -> None:
        """Count what the next batch skips; `small` is None where an earlier run has read it."""
        if self._batch < len(self._known):
            skipped = {int(document): n for document, n in self._known[self._batch]["skipped"]}
        else:
            assert small is not None
            documents = np.repeat([p.document for p in batch], [p.rows for p in batch])
            skipped = Counter(documents[~small.numpy()].tolist())
            line = {"rows": int(small.sum()), "skipped": sorted(skipped.items())}
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(_line(line))
        self.skipped += sum(skipped.values())
        self._of.update(skipped)
        self._batch += 1

    def take(self, document: int) -> int:
        """Tokens skipped of the document of that number, all of whose batches have been recorded."""
        return self._of.pop(document, 0)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "times": self.times,
            "medians": self.medians,
            "measured_on_tokens": self.measured,
            "skipped": self.skipped,
        }

    def _read(self, finished: int) -> list[dict[str, Any]]:
        """The lines of an earlier run that its finished shards vouch for; the others are removed."""
        there = finished and self.path.exists()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if there else []
        try:
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise IntegrityError(
                f"{self.path} is damaged; delete {self.path.parent} and capture again"
            ) from error
        kept: list[dict[str, Any]] = []
        rows = 0
        for record in records[1:]:
            rows += record["rows"]
            if rows > finished:
                break
            kept.append(record)
        if not records:
            self.path.unlink(missing_ok=True)
            return []
        self.medians, self.measured = records[0]["medians"], records[0]["measured"]
        write_text(self.path, "".join(map(_line, [records[0], *kept])))
        return kept


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norms (n,) of rows (n, d), in float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"
