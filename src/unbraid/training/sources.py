"""What a run reads: the site or sites of one or more captures, and those to be reconstructed from them.

Sites stand side by side in one matrix. Captures of the same tokens are read in the same shuffled order, so
rows of different sites, and of different models, belong to the same token. A source that is read in the order
of capture (`activations.inorder`) stands alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.activations.inorder import InOrder, Origin
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches, check_aligned
from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site
from unbraid.sae.base import Reads

Activations = ActivationStore | InOrder
Names = Site | str | Sequence[Site | str] | None


class Source(NamedTuple):
    """One captured site."""

    store: Activations
    site: Site

    @property
    def d(self) -> int:
        """Its width."""
        return self.store.d_in(self.site)


@dataclass(frozen=True)
class Sources:
    """Inputs and targets, each some sites side by side."""

    inputs: tuple[Source, ...]
    """What is encoded."""
    targets: tuple[Source, ...]
    """What is reconstructed; the inputs themselves but for transcoders."""

    @property
    def stores(self) -> tuple[Activations, ...]:
        """The captures that are read, or what stands for one."""
        return tuple(dict.fromkeys(source.store for source in (*self.inputs, *self.targets)))

    @property
    def at_hand(self) -> int:
        """Rows that can be looked at before training; more may follow."""
        first = self.stores[0]
        if isinstance(first, InOrder):
            return first.first_group([source.site for source in self.parts])
        return first.n_tokens

    def so_far(self, rows: int) -> str:
        """Content ids of what the first `rows` rows of the stream came from; of whole captures where their
        order depends on all of them."""
        return ",".join(
            store.so_far(rows) if isinstance(store, InOrder) else store.id for store in self.stores
        )

    def origin(self, rows: int) -> Origin:
        """What the first `rows` rows of the stream came from, for the manifest of what learned from them."""
        first = self.stores[0]
        if isinstance(first, InOrder):
            return first.origin(rows)
        return Origin({"activations": self.so_far(rows)}, {"activations": first.folder})

    @property
    def across(self) -> bool:
        """Whether targets are other sites than inputs."""
        return self.inputs != self.targets

    @property
    def parts(self) -> tuple[Source, ...]:
        """All that is read, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    def batches(
        self, batch_size: int, *, seed: int, steps: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled (inputs (n, d_in), targets (n, d_out)) in float32, the same tensor where one."""
        for found in stream(self.parts, batch_size, seed=seed, steps=steps, start=start):
            yield self.of(found)

    def of(self, found: Mapping[Source, Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs and targets out of one batch of `stream`."""
        x = _side_by_side([found[source] for source in self.inputs])
        return x, _side_by_side([found[source] for source in self.targets]) if self.across else x


def stream(
    sources: Iterable[Source], batch_size: int, *, seed: int, steps: int, start: int = 0
) -> Generator[dict[Source, Tensor], None, None]:
    """Shuffled batches (n, d) in float32 of every source, the same tokens in all of them; see
    `activations.stream.batches`."""
    sources = list(sources)
    first = sources[0].store
    if isinstance(first, InOrder):
        found = first.batches(
            [source.site for source in sources], batch_size, seed=seed, steps=steps, start=start
        )
        return ({source: parts[source.site] for source in sources} for parts in found)
    streams = [
        batches(store, site, batch_size, seed=seed, steps=steps, start=start)
        for store, site in sources
        if isinstance(store, ActivationStore)
    ]
    return (dict(zip(sources, parts, strict=True)) for parts in zip(*streams, strict=True))


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def names(sources: Sequence[Source]) -> str:
    """The sites' names with commas."""
    return ",".join(str(source.site) for source in sources)


def choose_sources(
    stores: Sequence[Activations], site: Names, target_site: Names, reads: Reads, architecture: str
) -> Sources:
    """The sources that an architecture reads, by the sites' names (None: what was captured).

    Raises UserError for sites that are missing, too many or not captured, and for captures of other tokens.
    """
    for other in stores[1:]:
        if isinstance(stores[0], InOrder) or isinstance(other, InOrder):
            raise UserError(f"{stores[0]} and {other} cannot be read together; finish the captures first")
        check_aligned(stores[0], other)
    inputs = tuple(Source(store, s) for store in stores for s in _sites(store, site, reads))
    if reads in ("site", "sites"):
        if _listed(target_site):
            raise UserError(
                f"architecture {architecture} reconstructs what it reads; leave out --target-site"
            )
        if reads == "site" and len(inputs) > 1:
            raise UserError(
                f"architecture {architecture} reads one site of one capture, not {names(inputs)}; give one "
                "--site and one folder, or train a crosscoder"
            )
        if reads == "sites" and len(inputs) < 2:
            raise UserError(f"architecture {architecture} reads several sites; give --site at least two")
        return Sources(inputs, inputs)
    if len(stores) > 1:
        raise UserError(f"architecture {architecture} reads one capture; give one folder of activations")
    targets = tuple(Source(stores[0], stores[0].site(s)) for s in _listed(target_site))
    if len(targets) != len(inputs):
        raise UserError(
            f"architecture {architecture} reads {len(inputs)} site{'s' * (len(inputs) > 1)} and predicts "
            f"{len(targets)}; give --target-site one site for each --site"
        )
    return Sources(inputs, targets)


def _listed(site: Names) -> list[Site | str]:
    if site is None:
        return []
    return [site] if isinstance(site, Site | str) else list(site)


def _sites(store: Activations, site: Names, reads: Reads) -> tuple[Site, ...]:
    wanted = tuple(store.site(s) for s in _listed(site))
    if wanted:
        return wanted
    if len(store.sites) > 1 and reads != "sites":
        known = ", ".join(map(str, store.sites))
        raise UserError(f"{store} holds several sites; choose one with --site: {known}")
    return store.sites
