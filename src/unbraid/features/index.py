"""Build an index: what every latent does over a corpus, from one streaming pass over its sparse codes.

Memory is bounded by the number of latents and the batch, not by the corpus.  Each token is stored once;
examples refer to it by passage and position and carry only the latent's own activations around it.

The corpus is read in parts.  After a part the state may be saved, and a killed build goes on from there;
which parts one of several workers reads depends on the corpus alone, and `merging` makes one index of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unbraid.activations.documents import Document
from unbraid.features.build import Build, Origin
from unbraid.features.geometry import piece
from unbraid.features.page import Index
from unbraid.features.rows import site_of
from unbraid.features.state import Sizes
from unbraid.features.stretches import Reader, Reading
from unbraid.features.weights import write_effects, write_neighbours
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class IndexConfig:
    """What an index holds and how the corpus is read."""

    tokens: int | None = None
    """Stop after the window in which this many tokens have been counted; none means the whole corpus."""
    context: int = 256
    """Longer documents are read in windows of this many tokens."""
    batch_tokens: int = 4096
    """Tokens, padding included, that go through the model at once."""
    positions: Literal["all", "reply"] = "all"
    """Count all tokens or only those of assistant replies; the others are still stored as context."""
    top: int = 20
    """Strongest examples shown for each latent, at most one a window and one for equal contexts."""
    quantiles: int = 10
    """Groups of about equal numbers of firings, by activation."""
    per_group: int = 5
    """Examples shown of each such group, and of each interval of equal width."""
    reservoir: int = 64
    """Firings sampled uniformly for each latent, from which the quantile groups' examples are."""
    window: int = 16
    """Tokens of activations kept on either side of an example."""
    same_context: int = 5
    """Two top examples are the same when this many tokens on either side of their peaks agree, but for case,
    spaces and digits; of those in which 80 % of them do the strongest is shown."""
    promoted: int = 10
    """Output tokens kept that a latent promotes most, and as many that it suppresses most."""
    neighbours: int = 10
    """Latents kept whose decoder, or encoder, directions have the largest cosine."""
    coactive: int = 20
    """Latents kept that fire on the same tokens, by Jaccard index, and as many by mutual information."""
    coactive_entries: int = 1 << 23
    """Firings in the sample of tokens that co-activation is counted on; a smaller corpus is counted whole."""
    part: int = 1 << 21
    """Characters in a part of the corpus, the unit of saving and of sharing among workers."""
    save_seconds: float = 60.0
    """Save after a part when so many seconds have passed; what is built does not depend on it."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        positive = (
            "context",
            "batch_tokens",
            "top",
            "quantiles",
            "per_group",
            "reservoir",
            "promoted",
            "part",
        )
        for name in (*positive, "neighbours", "coactive", "coactive_entries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens is {self.tokens}; it must be at least 1")
        if self.window < 0 or self.same_context < 0:
            raise UserError("window and same_context must not be negative")

    def recorded(self) -> dict[str, Any]:
        """What the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "save_seconds"}

    @property
    def sizes(self) -> Sizes:
        """What is held of a latent: candidates beyond those that are shown, for some will be alike."""
        return Sizes(self.top * 3 // 2, self.reservoir, self.per_group, self.window, self.coactive_entries)


@dataclass(frozen=True)
class Share:
    """One of several workers' share of the corpus."""

    number: int
    """Which worker, from 1."""
    of: int
    """How many there are."""

    @staticmethod
    def parse(text: str) -> Share:
        """From "2/5"; raises UserError for anything else."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"--share {text} is not a share of the work; give it as 1/4 … 4/4")
        return Share(int(number), int(of))

    def has(self, part: int) -> bool:
        """Whether a part of the corpus is in it."""
        return part % self.of == self.number - 1


ALL = Share(1, 1)


def build_index(
    sae: SAE,
    lm: LanguageModel,
    documents: Iterable[Document],
    config: IndexConfig,
    out: Path,
    *,
    sae_id: str,
    site: Site | None = None,
    beside: Sequence[tuple[SAE, str]] = (),
    share: Share = ALL,
    append: Index | None = None,
    paths: Mapping[str, Path] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Index:
    """Read `documents` once and write the index folder `out`.

    `sae_id` identifies the SAE in the manifest; `paths` says where its inputs live.  With `beside`, other
    autoencoders and their ids, each latent's neighbours in them are found, too.  A `share` of the corpus
    makes an index of its own, for `merging.merge_indexes`.  With `append` the new index holds what that one
    does, which stays as it is, and the documents that it has not read: those after its own, if they come
    first, or else all.

    An interrupted build keeps what it has saved in a hidden folder beside `out`, and a later one with the
    same settings goes on from there to the same bytes.  Raises UserError when `out` exists, when the SAE does
    not fit the model, when no token is counted, and when an unfinished or appended index has other settings.
    """
    site = site_of(sae, lm, site)
    reading = Reading(config.positions, config.context, config.batch_tokens, config.same_context, config.seed)
    origin = Origin(
        inputs={"sae": sae_id, "model": lm.id, "tokenizer": lm.tokenizer_id},
        facts={
            "site": str(site),
            "model_name": lm.name,
            "d_sae": sae.config.d_sae,
            "beside": [identity for _, identity in beside],
            "config": config.recorded(),
        },
        share=(share.number, share.of),
    )
    with building(Path(out)) as folder:
        build = Build(folder, origin, config.sizes, lambda token: piece(lm, token), append)
        if not build.at.tables:
            build.read(
                Reader(lm, sae, site, reading, build.classes),
                documents,
                tokens=config.tokens,
                characters=config.part,
                save_seconds=config.save_seconds,
                mine=share.has,
                progress=progress,
            )
            build.finish(config.coactive)
        # After what depends on the corpus: that needs its memory no more.
        write_effects(folder, sae, lm, config.promoted, progress)
        write_neighbours(folder, sae, beside, config.neighbours)
        build.sign(config.seed, command, paths)
    return Index(out)
