"""The building of an index: what is done is saved, a killed build goes on, a finished one is signed.

Beside the tables the folder of a build holds `work.json`, which says how far it is and names the file with
the state of then.  It is replaced in one step, so a build is always at some save, whenever it was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.activations.documents import Document
from unbraid.features.finish import Places, read_state, write_tables
from unbraid.features.memory import give_back
from unbraid.features.page import Index
from unbraid.features.state import VERSION, Seen, Sizes, State
from unbraid.features.stretches import Classes, Part, Reader, Stretch, parts_of
from unbraid.features.tables import LAYOUT, PASSAGES, Passages, PassageWriter, part_name
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_json
from unbraid.manifest.identity import canonical_json
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest

WORK = "work.json"


@dataclass(frozen=True)
class Origin:
    """What an index is made of and how: besides the documents nothing decides what is in it."""

    inputs: dict[str, str]
    """Ids of the autoencoder, the model, the tokenizer."""
    facts: dict[str, Any]
    """Site, sizes and settings."""
    share: tuple[int, int] = (1, 1)
    """Which worker's share of the corpus it is, and of how many."""


@dataclass
class Reached:
    """How far the corpus was read, whoever's share the parts were."""

    part: int = 0
    """Number of the next part."""
    documents: int = 0
    """Number of its first document, those of an appended index counted."""
    read: int = 0
    """Documents of the text before it, without those."""
    ids: str = ""
    """SHA-256 of the documents' ids, chained; of those of an appended index, too."""
    first: str = ""
    """Id of the corpus's first document."""
    counted: int = 0
    """Counted tokens of the text before it."""
    ended: bool = False
    """Whether there is nothing more to read."""
    tables: bool = False
    """Whether the tables are written."""

    def pass_over(self, documents: Sequence[Document]) -> None:
        """Count documents as read."""
        self.documents += len(documents)
        self.read += len(documents)
        self.first = self.first or (documents[0].id if documents else "")
        self.ids = chained(self.ids, documents)


def chained(ids: str, documents: Iterable[Document]) -> str:
    """A hash of the ids of documents after others, of which `ids` is the hash."""
    for document in documents:
        ids = hashlib.sha256(f"{ids}\n{document.id}".encode()).hexdigest()
    return ids


class Build:
    """An index in `folder` that is not finished yet, or not signed."""

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        sizes: Sizes,
        words: Callable[[int], str],
        append: Index | None = None,
    ) -> None:
        """Begin, or go on where a killed build of the same was; raises UserError where it was of another.

        `words` gives a token's text.
        """
        self.folder, self.origin, self.append, self.words = folder, origin, append, words
        self.classes = Classes(words)
        self.at = Reached()
        self.state = State(origin.facts["d_sae"], sizes, folder)
        if append is not None:
            require_same(origin, append)
        self.request = {
            "inputs": origin.inputs,
            "facts": origin.facts,
            "share": list(origin.share),
            "append": None if append is None else append.manifest.id,
            "state": VERSION,
        }
        if (folder / WORK).is_file():
            self._go_on(json.loads((folder / WORK).read_text()))
        else:
            self.clear()
            if append is not None:
                self._begin_with(append)

    def clear(self) -> None:
        """Drop whatever is in the folder."""
        for left in self.folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _go_on(self, work: Mapping[str, Any]) -> None:
        if work["request"] != self.request:
            raise UserError(
                f"{self.folder} holds an unfinished index with other settings or inputs; choose another "
                "--out, or delete it"
            )
        self.at = Reached(**work["at"])
        if not self.at.tables:
            self.state.load(self.folder / work["file"], work["state"])
            self._tidy(work["file"])

    def _begin_with(self, index: Index) -> None:
        facts = index.manifest.facts
        for number in index.passages.numbers:
            take_passages(index, number, self.folder)
        load(index, self.state)
        self.at = Reached(
            part=1 + max(map(int, facts["parts"])),
            documents=facts["read"],
            ids=facts["ids"],
            first=facts["first_document"],
        )

    def read(
        self,
        reader: Reader,
        documents: Iterable[Document],
        *,
        tokens: int | None,
        characters: int,
        save_seconds: float,
        mine: Callable[[int], bool],
        progress: Progress | None,
    ) -> None:
        """Read the corpus from where the last save left it; `mine` says which parts to take."""
        if self.at.ended:
            return
        saved = time.monotonic()
        for part in parts_of(self._unread(documents), characters, self.at.part, self.at.documents):
            budget = None if tokens is None else tokens - self.at.counted
            if budget is not None and budget <= 0:
                break
            taken = mine(part.number)
            if taken:
                counted, read = self._take(reader, part, budget, tokens or 0, progress)
            else:
                counted, read = reader.extent(part, budget)
            self.at.counted += counted
            self.at.part += 1
            self.at.pass_over(part.documents[:read])
            if taken and time.monotonic() - saved >= save_seconds:
                self.save()
                saved = time.monotonic()
        if not self.state.seen.tokens:
            raise UserError("the corpus holds no token to index; give more text, or read all positions")
        self.at.ended = True
        self.save()

    def _unread(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that were not read; raises UserError if those that were are not there."""
        stream = iter(documents)
        if self.append is not None:
            facts = self.append.manifest.facts
            first = next(stream, None)
            stream = stream if first is None else chain([first], stream)
            # A text that begins otherwise is another one, and all of it is new.
            if first is not None and first.id == facts["first_document"]:
                before = facts["read"]
                if chained("", islice(stream, before)) != facts["ids"]:
                    raise UserError(
                        f"the text does not go on from what {self.append.folder} has read: its first "
                        f"{before} documents are others; give the same ones with new ones after them, or the "
                        "new ones alone"
                    )
        known = "" if self.append is None else self.append.manifest.facts["ids"]
        if chained(known, islice(stream, self.at.read)) != self.at.ids:
            raise UserError(
                f"the text has changed since the index in {self.folder} was begun; choose another --out, or "
                "delete that folder"
            )
        return stream

    def _take(
        self, reader: Reader, part: Part, budget: int | None, total: int, progress: Progress | None
    ) -> tuple[int, int]:
        """Take in a part; returns its counted tokens and how many of its documents were read."""
        state, seen, before = self.state, self.state.seen, self.state.seen.tokens
        digest, windows, last = hashlib.sha256(), PassageWriter(), -1
        for stretch in reader.stretches(part, budget, lambda d: state.stratum(d.stratum or "")):
            give_back()
            for piece in stretch.pieces:
                document = part.documents[piece.document - part.first]
                if piece.document != last:
                    seen.strata[document.stratum or ""][1] += 1
                    seen.documents += 1
                    last = piece.document
                tokens = np.asarray(piece.window.input_ids, "<i8")
                first = piece.window.positions[-1] - len(piece.window.positions) + 1
                windows.add(piece.document, document.id, document.stratum, first, tokens.astype(np.int32))
                digest.update(f"{document.id}\n".encode())
                digest.update(tokens.tobytes())
            state.add(stretch.starts, stretch.latents, stretch.values, stretch.rows)
            self._count_strata(stretch)
            seen.windows += len(stretch.pieces)
            give_back()
            if progress is not None:
                progress(self.at.counted + seen.tokens - before, total, "tokens")
        seen.parts[str(part.number)] = digest.hexdigest()
        windows.write(self.folder, part.number)
        counted = seen.tokens - before
        whole = budget is None or counted < budget
        return counted, len(part.documents) if whole else last - part.first + 1

    def _count_strata(self, stretch: Stretch) -> None:
        numbers = {number: name for name, (number, _, _) in self.state.seen.strata.items()}
        for number, n in enumerate(np.bincount(stretch.rows["stratum"]).tolist()):
            if n:
                self.state.seen.strata[numbers[number]][2] += n

    def save(self) -> None:
        """Save the state; the file of the save before goes afterwards."""
        file = f"state-{self.at.part:06d}{'-end' if self.at.ended else ''}.npz"
        rest = self.state.save(self.folder / file)
        self._write_work({"file": file, "state": rest})
        self._tidy(file)

    def _write_work(self, more: Mapping[str, Any]) -> None:
        write_json(self.folder / WORK, {"request": self.request, "at": asdict(self.at), **more})

    def _tidy(self, keep: str) -> None:
        for path in self.folder.glob("state-*.npz"):
            if path.name != keep:
                path.unlink()
        self.state.tokens.tidy()

    def finish(self, coactive: int) -> None:
        """Write the tables that depend on the corpus, after which the state is not needed."""
        width = self.origin.facts["config"]["same_context"]
        places = Places(Passages(self.folder), self.classes, width)
        write_tables(self.folder, self.state, self.words, places, coactive)
        self.at.tables = True
        self._write_work({"facts": self._facts()})
        del self.state
        for path in (*self.folder.glob("state-*.npz"), *self.folder.glob("run-*.bin")):
            path.unlink()

    def _facts(self) -> dict[str, Any]:
        seen, together = self.state.seen, self.state.together
        strata = self.state.strata()
        return {
            **self.origin.facts,
            "layout": LAYOUT,
            "tokens": seen.tokens,
            "documents": seen.documents,
            "windows": seen.windows,
            "strata": [
                {"name": n, "documents": seen.strata[n][1], "tokens": seen.strata[n][2]} for n in strata
            ],
            "position_octaves": seen.octaves,
            "coactive": {"tokens": len(together), "level": together.level, "exact": together.level == 0},
            "parts": seen.parts,
            "read": self.at.documents,
            "ids": self.at.ids,
            "first_document": self.at.first,
            "share": list(self.origin.share),
        }

    def sign(
        self,
        seed: int,
        command: str,
        paths: Mapping[str, Path] | None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Write the manifest."""
        facts = json.loads((self.folder / WORK).read_text())["facts"]
        parts = [facts["parts"][number] for number in sorted(facts["parts"], key=int)]
        documents = {"documents": hashlib.sha256(canonical_json(parts)).hexdigest()}
        grown = {} if self.append is None else {"index": self.append.manifest.id}
        if self.append is not None:
            paths = {**(paths or {}), "index": self.append.folder}
        write_manifest(
            self.folder,
            kind="index",
            command=command,
            seed=seed,
            inputs={**self.origin.inputs, **documents, **grown, **(inputs or {})},
            facts=facts,
            paths=paths,
            without=WORK,
        )
        (self.folder / WORK).unlink()


def require_same(origin: Origin, index: Index) -> None:
    """Raise UserError, naming what differs, unless an index was made of the same with the same settings."""
    facts, inputs = index.manifest.facts, index.manifest.inputs
    wanted = {**origin.facts, **origin.facts["config"], **origin.inputs}
    found = {**facts, **facts["config"], **inputs}
    for name in (
        *origin.inputs,
        "site",
        "d_sae",
        "beside",
        *sorted(set(origin.facts["config"]) - {"tokens"}),
    ):
        if found.get(name) != wanted[name]:
            raise UserError(
                f"{index.folder} was made with {name} {found.get(name)!r:.40} and not {wanted[name]!r:.40}; "
                "an index goes on with the same settings"
            )
    if facts["share"] != [1, 1]:
        raise UserError(f"{index.folder} is one worker's share of an index; merge the shares first")


def load(index: Index, state: State) -> None:
    """Fill an empty state with what an index holds."""
    facts = index.manifest.facts
    strata = facts["strata"] or [{"name": "", "documents": facts["documents"], "tokens": facts["tokens"]}]
    state.seen = Seen(
        tokens=facts["tokens"],
        documents=facts["documents"],
        windows=facts["windows"],
        strata={str(s["name"]): [n, int(s["documents"]), int(s["tokens"])] for n, s in enumerate(strata)},
        octaves=list(facts["position_octaves"]),
        parts=dict(facts["parts"]),
    )
    classes = Classes(lambda token: index.vocabulary[token][0])
    places = Places(index.passages, classes, facts["config"]["same_context"])
    read_state(index.folder, state, places, facts["config"]["seed"], facts["coactive"]["level"])


def take_passages(index: Index, number: int, folder: Path) -> None:
    """A part's passages of another index, as a link where the disk allows."""
    source, target = index.passages.folder / part_name(number), folder / PASSAGES / part_name(number)
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
