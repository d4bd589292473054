"""Activations straight from the model while training goes on, without a disk.

The corpus is read in the order and the batches of a capture, and values pass through the type in which a
capture would store them, so the rows are those that `follow` reads from a capture of the same text with the
same settings. Memory is one buffer and what a capture holds without its shard, whatever the corpus. Every
epoch reads the corpus again; rows that an earlier run has dealt out are tokenised, but not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.inorder import BUFFER_TOKENS, InOrder, Origin
from unbraid.activations.plan import Piece
from unbraid.activations.reading import (
    CaptureConfig,
    check_fits,
    check_range,
    plan_of,
    read_batch,
    settings_of,
)
from unbraid.activations.rows import Rows
from unbraid.activations.scrub import Scrubber
from unbraid.activations.strata import Strata
from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import content_id
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site


class Live(InOrder):
    """A model's activations on a corpus, computed as they are wanted; several sites in one pass."""

    # The model would fight with the training for the same processors, and what MKL computes would depend on
    # how many threads the training has at that moment.
    ahead = False

    def __init__(
        self,
        lm: LanguageModel,
        documents: Callable[[], Iterable[Document]],
        config: CaptureConfig,
        *,
        buffer_tokens: int = BUFFER_TOKENS,
        seed: int = 0,
    ) -> None:
        """`documents` gives the corpus from its start, the same each time; `seed` decides what `per_document`
        and `per_stratum` draw. `shard_tokens` means nothing here.

        Raises UserError for a site or context that does not fit the model, and for `skip_norm_above`, which
        cannot tell how many rows a batch has without reading it.
        """
        super().__init__(buffer_tokens)
        check_fits(lm, config)
        if config.skip_norm_above is not None:
            raise UserError("skip_norm_above needs a capture on disk; leave it out or capture first")
        self.lm, self.documents, self.config, self.seed = lm, documents, config, seed
        self.sites, self.context = config.sites, config.context
        self.model_name, self.model_id, self.tokenizer_id = lm.name, lm.id, lm.tokenizer_id
        self._scrubber = Scrubber(config.scrub_model) if config.scrub else None
        self._pass: _Pass | None = None
        self._threads = 0
        self._furthest: tuple[int, Origin] | None = None

    def __str__(self) -> str:
        return f"the corpus read by {self.lm.name}"

    def site(self, site: Site | str) -> Site:
        """The site of that name; raises UserError for one that is not read."""
        found = Site.parse(site)
        if found not in self.sites:
            raise UserError(f"site {found} is not read; choose one of {', '.join(map(str, self.sites))}")
        return found

    def d_in(self, site: Site | str) -> int:
        """Width of a site's activations."""
        return self.lm.layout.width(self.site(site))

    def so_far(self, rows: int) -> str:
        """Content id of the settings and of what was tokenised for these rows."""
        return content_id({**self._settings, "read": self.origin(rows).facts["reading"]["read"]})

    def origin(self, rows: int) -> Origin:
        """Model, tokenizer and the documents that were read for so many rows."""
        if self.length is not None:
            rows = min(rows, self.length + 1)  # one more than there are: as far as the end
        wanted = -(-rows // self.buffer_tokens) * self.buffer_tokens
        if self._furthest is None or self._furthest[0] != wanted:
            self._note(wanted, self._upto(wanted))
        assert self._furthest is not None
        return self._furthest[1]

    @property
    def _settings(self) -> dict[str, Any]:
        settings = settings_of(self.lm, self.config, self.seed, self._scrubber)
        # What only shards on disk have; a file of the same settings may be read by a moved model.
        left_out = ("shard_tokens", "skip_norm_above", "name")
        return {k: v for k, v in settings.items() if k not in left_out} | {"buffer": self.buffer_tokens}

    def _begin(self) -> _Pass:
        return _Pass(self.lm, self.documents(), self.config, self.seed, self._scrubber)

    def _upto(self, rows: int) -> _Pass:
        """A pass that has got as far as so many rows take it, without reading the model."""
        found = self._begin()
        found.skip(rows)
        return found

    def _note(self, rows: int, read: _Pass) -> None:
        """Remember where the first `rows` rows, a number of whole groups, came from."""
        plan, settings = read.plan, self._settings
        inputs = {"model": self.model_id, "tokenizer": self.tokenizer_id, "corpus": plan.corpus}
        for name in ("model", "tokenizer", "buffer"):
            del settings[name]
        facts = {"order": "capture", "buffer_tokens": self.buffer_tokens, **settings}
        facts |= {"documents": plan.read, "read": plan.digest}
        self._furthest = (rows, Origin(inputs, facts={"reading": facts}))

    def _stored(self) -> str:
        return self.config.dtype

    def _fill(self, first: int, out: Mapping[Site, Rows]) -> int:
        # Sums of floats depend on the number of threads, so all is read with as many as the first rows were.
        self._threads = self._threads or torch.get_num_threads()
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._pass is None or self._pass.row > first:
            self._pass = self._begin()
        self._pass.skip(first)
        rows, wanted = self._pass.read(out), first + self.buffer_tokens
        if rows < self.buffer_tokens:
            self.length = self._pass.row
        if self._furthest is None or wanted > self._furthest[0]:
            self._note(wanted, self._pass)
        return rows


class _Pass:
    """One pass through the corpus from its start."""

    def __init__(
        self, lm: LanguageModel, documents: Iterable[Document], config: CaptureConfig, seed: int,
        scrubber: Scrubber | None,
    ) -> None:  # fmt: skip
        self.lm, self.config = lm, config
        strata = None if config.per_stratum is None else Strata(config.per_stratum, seed)
        self.plan = plan_of(lm, documents, config, seed, strata, scrubber)
        self.row = 0
        """Rows that have been passed."""
        self._batches = (batch for group in self.plan for batch in group.batches)
        self._batch: list[Piece] = []
        self._values: dict[str, Tensor] = {}  # the batch's rows (n, d) by site, once they are wanted
        self._size = self._done = 0  # of the batch, in rows

    def skip(self, row: int) -> None:
        """Go on to the row of that number, or to the end; the model is not run."""
        while self.row < row and (left := self._left()):
            self._go_on(min(left, row - self.row))

    def read(self, out: Mapping[Site, Rows]) -> int:
        """Fill out (m, d) of each site with the next rows; returns how many there were."""
        filled, size = 0, min(map(len, out.values()))
        while filled < size and (left := self._left()):
            take = min(left, size - filled)
            values = self._read()
            for site, buffer in out.items():
                buffer.put(filled, values[str(site)][self._done : self._done + take].float().cpu())
            self._go_on(take)
            filled += take
        return filled

    def _left(self) -> int:
        """Rows left of the batch at hand, or of the next one; 0 at the end."""
        while self._done == self._size:
            batch = next(self._batches, None)
            if batch is None:
                return 0
            self._batch, self._values, self._done = batch, {}, 0
            self._size = sum(piece.rows for piece in batch)
        return self._size - self._done

    def _go_on(self, rows: int) -> None:
        self._done += rows
        self.row += rows

    def _read(self) -> dict[str, Tensor]:
        if not self._values:
            self._values, columns = read_batch(self.lm, self._batch, self.config)
            for site, rows in self._values.items():
                check_range(rows, site, self.config, columns["documents"], self._batch)
        return self._values
