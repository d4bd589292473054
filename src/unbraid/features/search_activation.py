"""Which latents fire on a pasted text, fast also for an autoencoder with a million of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.features.rows import read_rows, site_of
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes
from unbraid.sae.kernels import cpu, loops
from unbraid.sae.topk import TopKSAE

Order = Literal["surprise", "activation"]
CONTEXT = 256
"""Tokens of a pasted text that the model reads at once; each such window begins with the BOS token."""
MOST_TOKENS = 4096
"""Tokens of a pasted text that are read at all."""
PART = 32_768
"""Latents that one rough product looks at; its scores for 128 tokens take 16 MB."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The sparse codes of a text, n tokens long."""

    tokens: tuple[str, ...]
    """Its tokens as text."""
    latent: NDArray[np.int64]
    """Which latent fired, one entry a firing (m,), special tokens left out."""
    token: NDArray[np.int64]
    """At which token (m,)."""
    value: NDArray[np.float32]
    """How strongly (m,)."""

    def ranked(
        self,
        scale: tuple[NDArray[np.float64], NDArray[np.float64]],
        order: Order,
        limit: int,
    ) -> Iterator[tuple[int, float, str, tuple[float, ...]]]:
        """(latent, score, why, activation at each token) of the `limit` best latents.

        `scale` is each latent's largest activation, or 0, and its density over the corpus, (d_sae,) each.
        """
        if not len(self.latent):
            return
        latents, place = np.unique(self.latent, return_inverse=True)
        largest = np.zeros(len(latents), dtype=np.float32)
        np.maximum.at(largest, place, self.value)
        score = largest.astype(np.float64)
        if order == "surprise":
            top, density = (column[latents] for column in scale)
            score = score / np.where(top > 0, top, score) * -np.log10(density)
        for best in np.argsort(-score, kind="stable")[:limit].tolist():
            mine = np.flatnonzero(place == best)
            values = np.zeros(len(self.tokens), dtype=np.float32)
            values[self.token[mine]] = self.value[mine]
            peak = int(values.argmax())
            why = f"fires {largest[best]:.3g} on {self.tokens[peak]!r}"
            yield int(latents[best]), float(score[best]), why, tuple(values.tolist())


class Reader:
    """An autoencoder made ready to encode short texts: its rough copy is kept between them."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self._screen = Screens(sae) if type(sae) is TopKSAE and cpu.fits(sae.W_enc, sae.b_enc) else None

    def read(self, lm: LanguageModel, text: str) -> Reading:
        """Run the model over `text` and encode what it says at the autoencoder's site.

        Raises UserError when the text has no token, or more than MOST_TOKENS.
        """
        if not text.strip():
            raise UserError("the text is empty; give some words")
        site = site_of(self.sae, lm, None)
        tokens: list[str] = []
        latent: list[NDArray[np.int64]] = []
        token: list[NDArray[np.int64]] = []
        value: list[NDArray[np.float32]] = []
        for rows in read_rows(
            lm, [Document.of_text(text)], site, positions="all", context=CONTEXT, batch_tokens=CONTEXT
        ):
            codes = self.encode(rows.x)
            fired = codes.values.cpu().numpy() * rows.counted[:, None]
            row, slot = np.nonzero(fired)
            latent.append(codes.indices.cpu().numpy()[row, slot])
            token.append(row + len(tokens))
            value.append(fired[row, slot].astype(np.float32))
            tokens += [str(lm.tokenizer.decode([i])) for window in rows.windows for i in window.input_ids]
            if len(tokens) > MOST_TOKENS:
                raise UserError(f"the text has more than {MOST_TOKENS} tokens; give a shorter one")
        return Reading(tuple(tokens), np.concatenate(latent), np.concatenate(token), np.concatenate(value))

    def encode(self, x: Tensor) -> SparseCodes:
        """The autoencoder's own codes of x (n, d_in), found faster where they can be."""
        with torch.no_grad():
            if self._screen is None:
                return self.sae.encode(x.to(self.sae.W_dec.device))
            return self._screen.encode(x)


class Screens:
    """A TopK encoder in parts, each with a rough copy, so that threads can share the work on few tokens.

    What a part has is looked for only where it exceeds the best of the parts before.
    """

    def __init__(self, sae: TopKSAE) -> None:
        self.sae = sae
        W_enc, b_enc = cpu.array(sae.W_enc.T), cpu.array(sae.b_enc)
        # Enough groups of latents in each that their best say what its k best surely reach.
        size = max(PART, 2 * loops.GROUP * sae.config.k)
        self.edges = list(range(0, len(b_enc), size))
        self.screens = [cpu.Screen(W_enc[e : e + size], b_enc[e : e + size]) for e in self.edges]
        # Parts are worked on one after the other in a thread, and can write to the same memory.
        shared = threading.local()
        for screen in self.screens[: len(b_enc) // size]:
            screen.local = shared

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of x (n, d_in), the same as `sae.encode`."""
        x, k = self.sae.centred(x).detach().contiguous(), self.sae.config.k
        found = [self._top(x[rows : rows + cpu.CHUNK_ROWS], k) for rows in range(0, len(x), cpu.CHUNK_ROWS)]
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return SparseCodes(indices, values.relu())

    def _top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and latents (n, k) of the k largest pre-activations of x (n, d_in), n ≤ CHUNK_ROWS."""

        def some(parts: range) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
            first = self.screens[parts[0]]
            most = min(k, len(first.b_enc))
            latents, values = np.empty((len(x), most), np.int32), np.empty((len(x), most), np.float32)
            first.top_k(x, latents, values)
            latents += np.int32(self.edges[parts[0]])
            for part in parts[1:]:
                self.screens[part].improve(x, self.edges[part], latents, values)
            return values, latents

        threads = min(torch.get_num_threads(), len(self.screens))
        shares = [range(t, len(self.screens), threads) for t in range(threads)]
        found = cpu.side_by_side(some, shares)
        values = torch.from_numpy(np.concatenate([v for v, _ in found], axis=1))
        latents = torch.from_numpy(np.concatenate([j for _, j in found], axis=1).astype(np.int64))
        best = values.topk(k, dim=1)
        return best.values, latents.gather(1, best.indices)
