"""Evidence about latents: windows of text on which they fire, and windows on which they are known not to.

Each window is a piece of a passage on a fixed grid, so no two overlap, and its activations are computed anew
over all of its tokens: a negative is inactive because it was looked at, not because an index is silent about
it.  Train and test are disjoint by document, decided by the document's own content, and no window of the one
holds the same tokens as a window of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from unbraid.features.labels.passages import Passage, Passages, Place
from unbraid.features.labels.words import Words
from unbraid.features.page import Index
from unbraid.features.rows import site_of
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.splits import split_of

SHARES: Mapping[str, float] = {"train": 0.5, "test": 0.5}


@dataclass(frozen=True)
class ContextConfig:
    """How much text a label is made of and scored on."""

    length: int = 32
    """Tokens of a window."""
    train: int = 40
    """Windows on which the latent fires that an explainer sees, and as many on which it does not."""
    positives: int = 50
    """Windows for scoring on which the latent fires."""
    negatives: int = 50
    """Windows for scoring on which it does not; half of them hard."""
    neighbours: int = 5
    """Latents with the most similar decoder rows, on whose examples hard negatives are looked for."""
    passages: int = 300
    """Passages drawn from the whole index for the other negatives; one draw for all latents."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        for name in ("length", "train", "positives", "negatives", "passages"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.neighbours < 0:
            raise UserError(f"neighbours is {self.neighbours}; it must not be negative")


@dataclass(frozen=True, eq=False)
class Window:
    """A window of text and what one latent does on it; T is its number of tokens."""

    document: str
    """Hash of the document's content; equal documents are one."""
    passage: int
    """Number of the passage in the index."""
    start: int
    """First token, counted in the passage."""
    tokens: tuple[int, ...]
    """Token numbers (T,)."""
    pieces: tuple[str, ...]
    """The tokens as text (T,); special ones are empty."""
    activations: NDArray[np.float32]
    """The latent's activation at each token (T,); 0 at special ones."""
    hard: bool = False
    """Whether a neighbour of the latent fires here."""

    @property
    def max(self) -> float:
        """Largest activation."""
        return float(self.activations.max())

    @property
    def text(self) -> str:
        """What stands there."""
        return "".join(self.pieces)

    @property
    def words(self) -> Words:
        """The same as words."""
        return Words.of(self.pieces)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Windows about one latent."""

    latent: int
    """Its number."""
    train: tuple[Window, ...]
    """On which it fires, for the explainer: the strongest first, then a fair sample."""
    train_negatives: tuple[Window, ...]
    """On which it does not, for the explainer."""
    positives: tuple[Window, ...]
    """On which it fires, for scoring: a fair sample as far as there is one, never chosen by strength."""
    negatives: tuple[Window, ...]
    """On which it does not, for scoring."""
    notes: tuple[str, ...] = ()
    """Where there were fewer than asked for, with the numbers."""


class Contexts:
    """Finds evidence in an index, with the autoencoder and the model that it was made of.

    Raises UserError where these do not belong to the index.
    """

    def __init__(
        self, index: Index, sae: SAE, lm: LanguageModel, config: ContextConfig | None = None
    ) -> None:
        if sae.config.d_sae != index.d_sae:
            raise UserError(
                f"the index in {index.folder} is of {index.d_sae} latents, the SAE has {sae.config.d_sae};"
                " name the SAE that the index was made of"
            )
        if index.manifest.inputs["model"] != lm.id:
            raise UserError(
                f"the index in {index.folder} was made with weights {index.manifest.inputs['model'][:12]}…,"
                f" but model {lm.name} has {lm.id[:12]}…; name the model that it was made with"
            )
        self.index, self.sae, self.lm = index, sae, lm
        self.config = config or ContextConfig()
        self.site = site_of(sae, lm, Site.parse(index.manifest.facts["site"]))
        self.passages = Passages(index, sae, lm, self.site)
        self._random = self.passages.drawn(self.config.passages, self.config.seed)

    def evidence(self, latents: Sequence[int]) -> list[Evidence]:
        """Evidence about some latents, whose passages are encoded once for all of them."""
        for latent in latents:
            if not 0 <= latent < self.index.d_sae:
                raise UserError(
                    f"latent {latent} does not exist; this index holds latents 0 to {self.index.d_sae - 1}"
                )
        neighbours = self._neighbours(latents)
        wanted = sorted({*latents, *(n for some in neighbours.values() for n in some)})
        places = self.passages.examples(wanted)
        used = {place.passage for some in places.values() for place in some} | set(self._random)
        read = self.passages.read(sorted(used), latents)
        return [
            self._one(latent, column, places, neighbours[latent], read)
            for column, latent in enumerate(latents)
        ]

    def _neighbours(self, latents: Sequence[int]) -> dict[int, list[int]]:
        count = min(self.config.neighbours, self.index.d_sae - 1)
        rows = self.sae.W_dec.detach().float()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found: dict[int, list[int]] = {}
        for latent in latents:
            cosine = rows @ rows[latent]
            cosine[latent] = -torch.inf
            found[latent] = cosine.topk(count).indices.tolist()
        return found

    def _one(
        self,
        latent: int,
        column: int,
        places: Mapping[int, Sequence[Place]],
        neighbours: Sequence[int],
        read: Mapping[int, Passage],
    ) -> Evidence:
        config = self.config
        length = config.length
        own = places.get(latent, ())
        top = [(p.passage, p.position // length) for p in own if p.kind == "top"]
        fair = [(p.passage, p.position // length) for p in own if p.kind == "sample"]
        rest = [(p.passage, p.position // length) for p in own if p.kind != "sample"]
        near = [(p.passage, p.position // length) for n in neighbours for p in places.get(n, ())]
        anywhere = [
            (number, w) for number in self._random for w in range(-(-len(read[number].tokens) // length))
        ]

        pool = _Pool(read, column, length, f"{config.seed}/{latent}")
        # The explainer is shown the strongest windows and, for half of its train, what is usual.
        half = -(-config.train // 2)
        train = pool.take("train", True, [top], half, ranked=True)
        train += pool.take("train", True, [fair, anywhere, near, rest], config.train - len(train))
        train_negatives = pool.take("train", False, [near], config.train // 2, hard=True)
        train_negatives += pool.take("train", False, [anywhere], config.train - len(train_negatives))
        positives = pool.take("test", True, [fair, anywhere, near, rest], config.positives)
        negatives = pool.take("test", False, [near], config.negatives // 2, hard=True)
        negatives += pool.take("test", False, [anywhere], config.negatives - len(negatives))
        asked = {
            "train windows": (train, config.train),
            "test positives": (positives, config.positives),
            "test negatives": (negatives, config.negatives),
        }
        notes = [f"{len(some)} of {n} {what}" for what, (some, n) in asked.items() if len(some) < n]
        hard = sum(window.hard for window in negatives)
        if hard < config.negatives // 2:
            notes.append(f"{hard} of {config.negatives // 2} hard negatives")
        return Evidence(
            latent, tuple(train), tuple(train_negatives), tuple(positives), tuple(negatives), tuple(notes)
        )


class _Pool:
    """Windows that are still free, for one latent."""

    def __init__(self, read: Mapping[int, Passage], column: int, length: int, salt: str) -> None:
        self._read, self._column, self._length, self._salt = read, column, length, salt
        self._taken: set[tuple[int, ...]] = set()
        self._columns: dict[int, NDArray[np.float32]] = {}

    def take(
        self,
        split: str,
        active: bool,
        sources: Sequence[Sequence[tuple[int, int]]],
        count: int,
        *,
        hard: bool = False,
        ranked: bool = False,
    ) -> list[Window]:
        """Up to `count` windows of the split, earlier sources first, one a document before two of one.

        Within that a hash decides, so that neither strength nor place does, unless the source is `ranked`.
        """
        found: list[Window] = []
        for source in sources:
            windows = [
                window
                for place in dict.fromkeys(source)
                if (window := self._window(place, split, active, hard)) is not None
            ]
            for window in _spread_out(windows if ranked else sorted(windows, key=self._hash)):
                if len(found) < count and window.tokens not in self._taken:
                    self._taken.add(window.tokens)
                    found.append(window)
        return found

    def _window(self, place: tuple[int, int], split: str, active: bool, hard: bool) -> Window | None:
        number, which = place
        passage = self._read[number]
        if _split(passage.document) != split:
            return None
        start = which * self._length
        rows = slice(start, start + self._length)
        if number not in self._columns:
            self._columns[number] = passage.column(self._column)
        activations = self._columns[number][rows]
        if bool((activations > 0).any()) != active or not any(passage.pieces[rows]):
            return None
        return Window(
            passage.document, number, start, passage.tokens[rows], passage.pieces[rows], activations, hard
        )

    def _hash(self, window: Window) -> str:
        return hashlib.sha256(f"{self._salt}/{window.passage}/{window.start}".encode()).hexdigest()


@lru_cache(maxsize=65_536)
def _split(document: str) -> str:
    return split_of(document, SHARES)


def _spread_out(windows: Sequence[Window]) -> list[Window]:
    """The first window of each document, then the second ones, and so on, otherwise in the given order."""
    seen: dict[str, int] = {}
    rounds: list[list[Window]] = []
    for window in windows:
        nth = seen.get(window.document, 0)
        seen[window.document] = nth + 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(window)
    return [window for one in rounds for window in one]
