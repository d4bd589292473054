"""A row of the file of labels, as it stands in a table and as a line of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from unbraid.features.labels.label import Label, Review
from unbraid.manifest.identity import canonical_json, sha256_bytes

TABLES = ("labels", "scores", "reviews", "kept")
NAMES = {"labels": "label", "scores": "scores", "reviews": "review", "kept": "list"}
"""What a row of each table is called in an export."""


@dataclass(frozen=True)
class Row:
    """One thing that was said."""

    table: str
    """One of TABLES."""
    values: Mapping[str, Any]
    """By column."""

    @classmethod
    def of_label(cls, label: Label) -> Row:
        """A proposed label."""
        names = ("sae", "latent", "text", "by", "kind", "model", "at")
        return cls("labels", {"id": label.id, **{name: getattr(label, name) for name in names}})

    @classmethod
    def of_scores(cls, label: str, scores: str, at: str) -> Row:
        """Scores of a label, as canonical JSON."""
        return cls("scores", {"id": _hash(label, scores, at), "label": label, "scores": scores, "at": at})

    @classmethod
    def of_review(cls, review: Review) -> Row:
        """A decision about a label."""
        return cls("reviews", {"id": review.id, **asdict(review)})

    @classmethod
    def of_kept(cls, sae: str, name: str, latent: int, there: bool, at: str) -> Row:
        """A latent put on a list, or taken from it."""
        values = {"sae": sae, "list": name, "latent": latent, "there": int(there), "at": at}
        return cls("kept", {"id": _hash(sae, name, latent, int(there), at), **values})

    @property
    def order(self) -> tuple[int, int, str, str]:
        """Where it stands in an export: by latent, labels before what is said about them, then by time."""
        return (self.values["latent"], TABLES.index(self.table), self.values["at"], self.values["id"])

    def line(self) -> dict[str, Any]:
        """The row as a line of an export: JSON values, with what it is."""
        found = {"what": NAMES[self.table], **self.values}
        if self.table == "scores":
            found["scores"] = json.loads(found["scores"])
        if self.table == "kept":
            found["there"] = bool(found["there"])
        return found


def label_of(row: Mapping[str, Any]) -> Label:
    """The label of a row of `labels` with its scores and its reviews as JSON."""
    reviews = [Review(**review) for review in json.loads(row["reviews"])]
    return Label(
        **{name: row[name] for name in ("sae", "latent", "text", "by", "kind", "model", "at")},
        scores=None if row["scores"] is None else json.loads(row["scores"]),
        reviews=tuple(sorted(reviews, key=lambda review: (review.at, review.id))),
    )


def _hash(*values: Any) -> str:
    return sha256_bytes(canonical_json(values))[:16]
