"""One pass over the model: everything that does not depend on an autoencoder, kept for all that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from unbraid.activations.corpus import Batch, Corpus
from unbraid.evaluation.reconstruction import RUN
from unbraid.evaluation.scoring import States
from unbraid.evaluation.stash import Stash
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import collected, read_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import Site
from unbraid.model.tail import Tail

SAMPLED = 4096
"""Activations that an untrained autoencoder is scaled by."""


class Place:
    """A site: what was read there, and how the model goes on from it."""

    def __init__(self, lm: LanguageModel, site: Site, runs: int) -> None:
        self.lm, self.site = lm, site
        self.tail = Tail(lm, site)
        self.stash = Stash()
        d = lm.layout.width(site)
        self.tokens = 0
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.products = torch.zeros(d, d, dtype=torch.float64)
        self.run_sums = torch.zeros(runs, d, dtype=torch.float64)
        self.run_tokens = torch.zeros(runs, dtype=torch.float64)
        self.sample: list[Tensor] = []
        self._ablated: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def see(self, stream: Tensor, x: Tensor, runs: Tensor) -> None:
        """Take in a batch: the stream (B, T, d) to resume from, chosen activations x (n, d), their runs."""
        if self.tail.resumes:
            self.stash.add(stream)
        wide = x.double().cpu()
        if not bool(wide.isfinite().all()):
            raise UserError(
                f"model {self.lm.name} puts out activations at {self.site} that are NaN or infinite, so "
                "nothing was measured; load it with --dtype float32 or check its weights"
            )
        self.tokens += len(wide)
        self.sum += wide.sum(dim=0)
        self.products += wide.T @ wide
        self.run_sums.index_add_(0, runs, wide)
        self.run_tokens.index_add_(0, runs, torch.ones(len(wide), dtype=torch.float64))
        if sum(map(len, self.sample)) < SAMPLED:
            self.sample.append(x.float().cpu())

    @property
    def mean(self) -> Tensor:
        """E x, (d,) float64."""
        return self.sum / self.tokens

    def spread(self, x: Tensor, runs: Tensor) -> Tensor:
        """‖x − x̄‖² of activations x (n, d), x̄ the mean of the run (n,) of each: (n,) float64."""
        means = self.run_sums[runs] / self.run_tokens[runs, None]
        return (x.double().cpu() - means).square().sum(dim=1)

    def components(self, k: int) -> Tensor:
        """The k principal components about the mean, orthonormal rows (k, d)."""
        covariance = self.products / self.tokens - torch.outer(self.mean, self.mean)
        return (
            torch.linalg.eigh(covariance).eigenvectors[:, -k:].T.float() if k else self.products[:0].float()
        )

    def clean(self, number: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a batch the states after the site, the chosen activations (n, d) there, and the kept stream."""
        stream = self.stash[number] if self.tail.resumes else None
        if stream is not None:
            stream = stream.to(self.lm.device)
        with collected(self.lm.layout, [self.site]) as found:
            states = self.tail.states(batch.input_ids, batch.attention_mask, stream)
        x = found[self.site]
        return states, x[batch.chosen.to(x.device)].float(), stream

    def spliced(self, batch: Batch, stream: Tensor | None, new: Tensor) -> Tensor:
        """States after the site when the chosen activations are `new` (n, d)."""
        with replaced(self.lm, self.site, lambda _: new, batch.chosen):
            return self.tail.states(batch.input_ids, batch.attention_mask, stream)

    def ablated(self, name: str, value: Tensor, batch: Batch, stream: Tensor | None) -> States:
        """States at the scored tokens (see `scored`) when each chosen activation is value (d,).

        Where all information passes through the site, and rows are alike but for what was replaced, a token's
        state depends on its column alone, and one row stands for all.
        """
        rows, columns = scored(batch)
        lead = _lead(batch) if self.tail.whole and self.lm.generates else None
        if lead is None:
            count = int(batch.chosen.sum())
            states = self.spliced(batch, stream, value.expand(count, -1))
            return States.each(states[rows.to(states.device), columns.to(states.device)])
        known = self._ablated.get((name, lead))
        if known is None or len(known) < batch.input_ids.shape[1]:
            one = int(batch.attention_mask.sum(dim=1).argmax())
            part = slice(one, one + 1)
            alone = Batch(
                batch.input_ids[part], batch.attention_mask[part], batch.chosen[part], batch.scored[part],
                batch.blocks[part], batch.first[part],
            )  # fmt: skip
            new = value.expand(int(alone.chosen.sum()), -1)
            known = self.spliced(alone, None if stream is None else stream[part], new)[0]
            self._ablated[name, lead] = known
        return States(known, columns)


def _lead(batch: Batch) -> tuple[int, ...] | None:
    """The tokens before the first chosen one, where these are the same in every row and from then on all
    tokens are chosen up to the row's last; else None."""
    start = batch.chosen.int().argmax(dim=1)
    ends = batch.chosen.shape[1] - batch.chosen.flip(1).int().argmax(dim=1)
    begin = int(start[0])
    lead = batch.input_ids[:, :begin]
    gapless = bool((batch.chosen.sum(dim=1) == ends - start).all())
    if not (gapless and bool((start == begin).all()) and bool((lead == lead[0]).all())):
        return None
    return tuple(lead[0].tolist())


def scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns of the scored tokens, column after column, so that equal states stand together."""
    columns, rows = batch.scored.T.nonzero(as_tuple=True)
    return rows, columns


class Reading:
    """A text that was read once, at some sites of a model."""

    def __init__(
        self, lm: LanguageModel, corpus: Corpus, sites: Sequence[Site], progress: Progress | None = None
    ) -> None:
        """Raises UserError for sites that the model lacks and for activations that are no numbers."""
        self.lm, self.corpus = lm, corpus
        self._open = ExitStack()
        runs = -(-corpus.tokens // RUN)
        self.places = {site: Place(lm, site, runs) for site in sites}
        for place in self.places.values():
            self._open.enter_context(place.stash)
        wanted = [site for place in self.places.values() for site in (place.site, place.tail.entry)]
        for number, batch in enumerate(corpus.batches):
            read = read_sites(lm, batch.input_ids, batch.attention_mask, wanted)
            for place in self.places.values():
                x = read[place.site]
                place.see(read[place.tail.entry], x[batch.chosen.to(x.device)], run_of(batch))
            if progress is not None:
                progress(number + 1, len(corpus.batches), "reading")

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """The batches with their numbers."""
        yield from enumerate(self.corpus.batches)


def run_of(batch: Batch) -> Tensor:
    """The run of RUN tokens, in the documents' order, that each chosen token belongs to: (n,) int64."""
    place = batch.first[:, None] + batch.chosen.cumsum(dim=1) - 1
    return place[batch.chosen] // RUN
