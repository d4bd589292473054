"""Whether latents look as if they meant something, without a label: alike contexts, few output tokens.

Both are proxies: a latent may mean something without them, and one that fires on a single token has both.
They are taken over latents drawn by the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.corpus import Batch
from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.model.load import LanguageModel
from unbraid.model.unembed import direct_effects
from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes
from unbraid.stats.bootstrap import Interval, mean_of_runs

SAMPLE, TOP, LEAST, BEFORE, STRONGEST = 256, 10, 5, 7, 10
"""Latents drawn; documents of each latent's strongest firings, and how few of them will do; tokens of a
context before the one that fires; output tokens of the strongest effects."""

DEFINITIONS: Mapping[str, Definition] = {
    "coherence": Definition(
        "how alike the contexts of a latent's strongest firings are, above chance",
        f"mean over those of {SAMPLE} drawn latents that fire in {LEAST} documents or more of: mean"
        f" pairwise cosine of the contexts of its strongest firings in each of the {TOP} documents where it"
        " fires strongest, less the same at tokens drawn from these windows; a context is the set of"
        f" distinct tokens from {BEFORE} before to the one that fires, weighted by log(tokens / occurrences)",
        "higher",
    ),
    "logit_sparsity": Definition(
        "share of a latent's effect on the logits that few output tokens carry",
        f"mean over {SAMPLE} drawn latents with a decoder row other than 0 of: share that the {STRONGEST} "
        "largest |e| have in Σe², e its direct effect on all logits through the final norm's scale, less "
        "their mean",
        "higher",
    ),
}


def drawn(d_sae: int, seed: int) -> NDArray[np.int64]:
    """The latents that stand for all, in order."""
    return np.sort(np.random.default_rng(seed).permutation(d_sae)[:SAMPLE]).astype(np.int64)


@dataclass(frozen=True)
class _Firing:
    """A latent's strongest firing in one unit."""

    value: float
    batch: int
    row: int
    column: int


class Contexts:
    """Where the drawn latents fire most strongly, one place a unit of documents."""

    def __init__(self, latents: NDArray[np.int64], d_sae: int) -> None:
        self.latents = latents
        self.slot = torch.full((d_sae,), -1, dtype=torch.int64)
        self.slot[torch.from_numpy(latents)] = torch.arange(len(latents))
        self.best: list[dict[int, _Firing]] = [{} for _ in latents]

    def add(self, number: int, batch: Batch, codes: SparseCodes) -> None:
        """Look through the codes of the chosen tokens of batch number `number`."""
        rows, columns = batch.chosen.nonzero(as_tuple=True)
        indices, values = codes.indices.cpu(), codes.values.float().cpu()
        slots = torch.where(values != 0, self.slot[indices], -1)
        token, place = (slots >= 0).nonzero(as_tuple=True)
        if not len(token):
            return
        slot, value = slots[token, place].numpy(), values[token, place].numpy()
        row, column = rows[token].numpy(), columns[token].numpy()
        unit = batch.blocks[rows[token]].numpy()
        # The strongest of each latent and unit: the first of its group in this order.
        order = np.lexsort((column, -value, unit, slot))
        first = np.ones(len(order), np.bool_)
        s, u = slot[order], unit[order]
        first[1:] = (s[1:] != s[:-1]) | (u[1:] != u[:-1])
        for i in order[first]:
            self._keep(
                int(slot[i]), int(unit[i]), _Firing(float(value[i]), number, int(row[i]), int(column[i]))
            )

    def _keep(self, slot: int, unit: int, firing: _Firing) -> None:
        best = self.best[slot]
        if unit in best:
            if firing.value > best[unit].value:
                best[unit] = firing
        elif len(best) < TOP:
            best[unit] = firing
        else:
            weakest = min(best, key=lambda u: (best[u].value, -u))
            if (firing.value, -unit) > (best[weakest].value, -weakest):
                del best[weakest]
                best[unit] = firing

    def coherence(self, batches: Sequence[Batch], seed: int) -> NDArray[np.float64]:
        """Of every latent that fires in enough documents, how alike its contexts are above chance: (n,)."""
        counts: Counter[int] = Counter()
        # (B, T) each: ids with −1 for padding, and which tokens are chosen.
        read = [
            (b.input_ids.masked_fill(~b.attention_mask.bool(), -1).numpy(), b.chosen.numpy()) for b in batches
        ]
        for ids, _ in read:
            counts.update(ids[ids >= 0].tolist())
        tokens = counts.total()
        weights = {token: float(np.log(tokens / count)) for token, count in counts.items()}
        found: list[float] = []
        for latent, best in zip(self.latents, self.best, strict=True):
            if len(best) < LEAST:
                continue
            here: list[frozenset[int]] = []
            elsewhere: list[frozenset[int]] = []
            for unit in sorted(best):
                firing = best[unit]
                ids, chosen = (part[firing.row] for part in read[firing.batch])
                columns = np.flatnonzero(chosen)
                at = np.random.default_rng([seed, int(latent), unit]).integers(len(columns))
                here.append(_context(ids, firing.column))
                elsewhere.append(_context(ids, int(columns[at])))
            found.append(alike(here, weights) - alike(elsewhere, weights))
        return np.array(found)


def _context(ids: NDArray[np.int64], column: int) -> frozenset[int]:
    return frozenset(ids[max(0, column - BEFORE) : column + 1].tolist()) - {-1}


def alike(contexts: Sequence[frozenset[int]], weights: Mapping[int, float]) -> float:
    """Mean over pairs of the cosine of two sets whose tokens have these weights; 0 with a set of weight 0."""
    lengths = [sum(weights[t] ** 2 for t in context) ** 0.5 for context in contexts]
    cosines = [
        sum(weights[t] ** 2 for t in contexts[i] & contexts[j]) / (lengths[i] * lengths[j])
        if lengths[i] * lengths[j] > 0
        else 0.0
        for i in range(len(contexts))
        for j in range(i)
    ]
    return float(np.mean(cosines))


def concentration(effects: Tensor) -> Tensor:
    """Share that the STRONGEST largest squares of each row, less the row's mean, have in their sum: (n,), NaN
    for rows that do not vary."""
    squares = (effects.double() - effects.double().mean(dim=1, keepdim=True)).square()
    top = squares.topk(min(STRONGEST, squares.shape[1]), dim=1).values.sum(dim=1)
    return top / squares.sum(dim=1)


def metrics(
    contexts: Contexts, sae: SAE, lm: LanguageModel, batches: Sequence[Batch], seed: int
) -> dict[str, Interval | Undefined]:
    """The metrics of `DEFINITIONS`, with Student's intervals over latents."""
    found: dict[str, Interval | Undefined] = {
        "coherence": Undefined(f"no drawn latent fires in {LEAST} documents or more"),
        "logit_sparsity": Undefined("the decoder does not write into the residual stream"),
    }
    values = contexts.coherence(batches, seed)
    if len(values):
        found["coherence"] = mean_of_runs(values)
    directions = sae.W_dec.detach()
    if directions.shape == (len(contexts.slot), lm.d_in):
        rows = directions[torch.from_numpy(contexts.latents).to(directions.device)]
        shares = torch.cat([concentration(direct_effects(lm, part)) for part in rows.split(32)]).numpy()
        shares = shares[np.isfinite(shares)]
        found["logit_sparsity"] = mean_of_runs(shares) if len(shares) else Undefined("the decoder is 0")
    return found
