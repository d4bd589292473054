"""Reading a capture while it is being written, so that training can start before it ends.

The writer records every finished shard in shards.jsonl and renames its folder at the end. Rows are dealt out
as `inorder` says, so a run that follows is the run on the finished capture, whoever was faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

from unbraid.activations.inorder import BUFFER_TOKENS, InOrder, Origin
from unbraid.activations.rows import Rows
from unbraid.activations.shards import SETTINGS, read_finished, shard_name
from unbraid.activations.store import KIND, ActivationStore
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import is_held, partial_of
from unbraid.manifest.identity import content_id
from unbraid.manifest.record import MANIFEST, FileEntry, MadeBy, Manifest
from unbraid.manifest.remote import is_url
from unbraid.model.sites import Site


class Stalled(UserError):
    """What was waited for does not come."""


class Following(InOrder):
    """A capture in the order in which it is written, finished or not."""

    ahead = True

    def __init__(
        self,
        folder: Path | str,
        *,
        buffer_tokens: int = BUFFER_TOKENS,
        patience: float = 120.0,
        poll: float = 0.5,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Wait until the capture that ends in `folder` has a first shard; one at a URL has to be finished.

        While nobody writes there, a wait ends after `patience` seconds without a new shard. The folder is
        looked at every `poll` seconds; `say` is told of every wait.

        Raises Stalled, a UserError, when the wait was in vain, UserError for a folder that holds something
        else, and IntegrityError for damage.
        """
        super().__init__(buffer_tokens)
        self.folder = Path(folder)
        self._name = str(folder)
        self.patience, self.poll, self.say = patience, poll, say
        self._store: ActivationStore | None = None
        if is_url(folder):
            self.length = self._take(ActivationStore(folder)).n_tokens
        store = self._wait(1)
        self.sites = store.sites
        self.model_name, self.model_id = store.model_name, store.model_id
        self.tokenizer_id, self.context = store.tokenizer_id, store.context

    def __str__(self) -> str:
        return self._name

    def site(self, site: Site | str) -> Site:
        """The captured site of that name; raises UserError listing what was captured when there is none."""
        return self._now.site(site)

    def d_in(self, site: Site | str) -> int:
        """Width of a site's activations."""
        return self._now.d_in(site)

    @property
    def finished(self) -> bool:
        """Whether the capture has come to its end."""
        return self.length is not None

    def so_far(self, rows: int) -> str:
        """Content id of the capture's settings and of the shards with these rows; waits for them."""
        store = self._wait(rows)
        shards = -(-min(rows, store.n_tokens) // store.shard_tokens)
        files = store.manifest.files
        names = [name for name in (SETTINGS, *map(shard_name, range(shards))) if name in files]
        return content_id({name: files[name].digest[1] for name in names} | {"buffer": self.buffer_tokens})

    def origin(self, rows: int) -> Origin:
        """The finished capture; waits for it."""
        self._cancelled.clear()
        store = self._wait(None)
        facts = {"reading": {"order": "capture", "buffer_tokens": self.buffer_tokens}}
        return Origin({"activations": store.id}, {"activations": store.folder}, facts)

    @property
    def _now(self) -> ActivationStore:
        """The capture as it was when it was last looked at."""
        assert self._store is not None
        return self._store

    def _stored(self) -> str:
        return self._now.dtype

    def _fill(self, first: int, out: Mapping[Site, Rows]) -> int:
        store = self._wait(first + self.buffer_tokens)
        rows = max(0, min(self.buffer_tokens, store.n_tokens - first))
        try:
            return self._read(store, first, rows, out)
        except IntegrityError:
            if self.finished or not self._look():  # it may have been renamed meanwhile
                raise
            return self._read(self._now, first, rows, out)

    def _read(self, store: ActivationStore, first: int, rows: int, out: Mapping[Site, Rows]) -> int:
        size, end = store.shard_tokens, first + rows
        edges = [first, *range((first // size + 1) * size, end, size), end]
        runs = [(a, b - a) for a, b in pairwise(edges) if b > a]
        for site, buffer in out.items():
            store.gather(site, runs, buffer)
        if isinstance(store.folder, str):  # from a URL what follows has a long way
            first = end % store.n_tokens
            count = min(self.buffer_tokens, store.n_tokens - first)
            store.expect(next(iter(out)), [(row, 1) for row in range(first, first + count, size)])
        return rows

    def _wait(self, rows: int | None) -> ActivationStore:
        """The capture with so many rows, or finished; None waits for the latter."""
        since, known, told = monotonic(), -1, False
        while True:
            # Asked before the look: a writer that comes to its end in between has not stopped.
            gone = monotonic() - since > self.patience and not is_held(self.folder)
            if not self.finished:
                self._look()
            store = self._store
            if store is not None and (self.finished or (rows is not None and store.n_tokens >= rows)):
                return store
            there = store.n_tokens if store is not None else 0
            if there > known:
                since, known = monotonic(), there
            elif gone:
                raise Stalled(self._stalled(there))
            if not told and self.say is not None:
                wanted = "its end" if rows is None else f"{rows:,} tokens"
                self.say(f"waiting for {self.folder} to have {wanted}; {there:,} are there")
            told = True
            if self._cancelled.wait(self.poll):
                raise Stalled(f"nobody waits for {self.folder} any more; run the same command again")

    def _stalled(self, there: int) -> str:
        if self._store is None:
            return f"{self.folder} is not being captured, nor finished; start unbraid capture or check it"
        return (
            f"the capture of {self.folder} has stopped after {there:,} tokens; run its command again, and "
            "then this one: both go on where they stopped"
        )

    def _look(self) -> bool:
        """See what is on disk now; returns whether the capture has been finished."""
        if (self.folder / MANIFEST).exists():
            self.length = self._take(ActivationStore(self.folder)).n_tokens
            return True
        try:
            manifest = _so_far(partial_of(self.folder))
            if manifest is not None:
                if self._store is None or manifest.files != self._store.manifest.files:
                    self._take(ActivationStore(partial_of(self.folder), manifest=manifest))
                return False
        except (FileNotFoundError, IntegrityError) as error:
            if (self.folder / MANIFEST).exists():  # renamed between two looks
                return self._look()
            if isinstance(error, IntegrityError):
                raise
        if self.folder.exists() and not (self.folder / MANIFEST).exists():
            ActivationStore(self.folder)  # says what is wrong with it
        return False

    def _take(self, store: ActivationStore) -> ActivationStore:
        """Go on with what is there now, which must hold all that was there before."""
        before = {} if self._store is None else self._store.manifest.files
        if any(store.manifest.files.get(name) != entry for name, entry in before.items()):
            raise UserError(f"{self.folder} was captured anew while it was read; train into another --out")
        self._store = store
        return store


def _so_far(partial: Path) -> Manifest | None:
    """What the manifest would say if the capture ended now; None where nothing is finished yet."""
    records = read_finished(partial)
    if not records:
        return None
    settings: dict[str, Any] = json.loads((partial / SETTINGS).read_bytes())
    entries = {r["file"]: FileEntry(r["bytes"], blake3=r["blake3"]) for r in records}
    entries[SETTINGS] = FileEntry.of(partial / SETTINGS)
    widths = dict(zip(settings["sites"], settings["widths"], strict=True))
    facts = {name: settings[name] for name in ("d_in", "context", "positions", "dtype")} | {
        "model": settings["name"],
        "sites": list(widths),
        "widths": widths,
        "tokens": sum(record["rows"] for record in records),
        "documents": 0,  # their lines are written again by every run, so there may be fewer than once were
        "shard_tokens": settings["shard_tokens"],
    }
    return Manifest(
        kind=KIND,
        made_by=MadeBy("", "", None),
        inputs={name: settings[name] for name in ("model", "tokenizer")},
        files=entries,
        facts=facts,
        id="",  # it has none before its end
    )
