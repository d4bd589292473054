"""Going on from a finished capture: a new one holds its rows first, then those of documents it had not read.

The finished one stays as it is, with its own id, since autoencoders may have been trained on it. Its full
shards are hard links in the new one. What it has read is recognised by going through its documents.jsonl and
the text side by side: ids, numbers of tokens and of wanted ones must agree. A text whose first document is
another one is another corpus, and all of it is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from unbraid.activations.documents import Document
from unbraid.activations.plan import Plan
from unbraid.activations.shards import DOCUMENTS, SETTINGS
from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.progress import Progress

MAY_DIFFER = {"tokens", "batch_tokens", "device", "torch", "appended"}
"""Settings on which no more than the last bits of a value depend, or how many values there are."""


class Earlier:
    """A finished capture that another one begins with."""

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError where the folder holds no capture of ours, IntegrityError where it is damaged."""
        self.store = ActivationStore(folder)
        if SETTINGS not in self.store.manifest.files:
            raise UserError(
                f"{self.store.folder} was not made by `unbraid capture`, so how to go on is not known; choose"
                " another --append"
            )
        try:
            self.settings: dict[str, Any] = json.loads(self.store.file(SETTINGS).read_bytes())
        except ValueError as error:
            raise IntegrityError(
                f"{self.store.folder}/{SETTINGS} is not JSON; restore it or capture again"
            ) from error
        facts = self.store.manifest.facts
        told: dict[str, Any] = facts.get("appended", {"corpora": [0], "before": {}})
        self._corpora: list[int] = told["corpora"]
        self._before: dict[str, Any] = told["before"]

    @property
    def norms(self) -> dict[str, Any] | None:
        """Its medians and how many tokens it skipped by them, if it did."""
        return self.store.manifest.facts.get("skip_norm_above")

    def require(self, settings: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless rows of these settings belong beside its own."""
        other = [
            f"{name} {_short(self.settings.get(name))} and not {_short(settings.get(name))}"
            for name in sorted((self.settings.keys() | settings.keys()) - MAY_DIFFER)
            if self.settings.get(name) != settings.get(name)
        ]
        if other:
            raise UserError(
                f"{self.store.folder} was captured with {', '.join(other)}; give what it was captured with to"
                " append to it"
            )

    def pass_over(self, plan: Plan, progress: Progress | None) -> None:
        """Take from the plan's documents those that were read then, in constant memory and without the model.

        A last document that a budget of tokens had cut stays, for its rest. Raises UserError where the text
        is that of then at its beginning but not all along.
        """
        documents = iter(plan.documents)
        first = next(documents, None)
        if first is None:
            raise UserError("the corpus holds no documents; give a file with at least one")
        documents = chain([first], documents)
        size = plan.measure(first)[0]
        same = False
        for number, record in enumerate(self.store.documents()):
            if number in self._corpora and (record["id"], record["tokens"]) == (first.id, size):
                if number != self._corpora[-1]:
                    raise UserError(
                        f"{self.store.folder} holds the beginning of this text from document {number + 1} on,"
                        " but another one after it; give the part of the text that it does not hold"
                    )
                same = True
            if same and self._goes_on(plan, document := next(documents, None), number, record):
                assert document is not None
                documents, plan.begun = chain([document], documents), record
                break
            plan.count(record["id"])
            if progress is not None and number % 256 == 0:
                progress(0, plan.tokens or 0, f"{number + 1} documents passed over")
        plan.documents = documents
        if not same:  # counts of this corpus begin anew
            facts = self.store.manifest.facts
            self._before = {name: facts[name] for name in ("strata", "scrub") if name in facts}
            self._corpora = [*self._corpora, self.store.n_documents]

    def _goes_on(self, plan: Plan, document: Document | None, number: int, record: dict[str, Any]) -> bool:
        """Whether of the document, which must be the one on record, wanted tokens are left at its end."""
        line = f"line {number + 1} of {self.store.folder}/{DOCUMENTS}"
        advice = "give all of the text that was captured there and more, or only what is new"
        if document is None:
            raise UserError(f"the text ends where {line} has document {record['id']}; {advice}")
        length, wanted = plan.measure(document)
        taken: int = record["captured"] + record.get("skipped", 0)
        last = number == self.store.n_documents - 1
        same = (document.id, length) == (record["id"], record["tokens"])
        if not same or wanted < taken or (wanted > taken and not last):
            raise UserError(
                f"document {document.id} ({length} tokens, {wanted} wanted) stands where {line} has"
                f" {record['id']} ({record['tokens']}, {taken}); {advice}"
            )
        return wanted > taken

    def documents(self, plan: Plan) -> Iterator[dict[str, Any]]:
        """The records of its documents, but of one that goes on."""
        return islice(self.store.documents(), plan.read)

    def facts(self, counts: Mapping[str, Any]) -> dict[str, Any]:
        """For the manifest: `counts` of the corpus that was read with those of the corpora before it; the
        earlier capture's size, the documents at which corpora begin, and the counts before the last of them.
        """
        appended = {
            "tokens": self.store.n_tokens,
            "documents": self.store.n_documents,
            "skipped": self.norms["skipped"] if self.norms else 0,
            "corpora": self._corpora,
            "before": self._before,
        }
        return {"appended": appended} | {n: _sum(count, counts[n]) for n, count in self._before.items()}


def _sum(one: Any, other: Any) -> Any:
    """Two nested records of counts added up; what is no count is the same in both."""
    if isinstance(one, dict):
        common = {name: _sum(one[name], other[name]) for name in one.keys() & other.keys()}
        return one | other | common
    return one + other if isinstance(one, int) else other


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) != 64 else f"{text[:12]}…"  # an id
