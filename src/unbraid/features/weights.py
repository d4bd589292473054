"""What the weights say of each latent: tokens that it promotes, effects on logits, neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from unbraid.features import lists
from unbraid.features.geometry import logit_effects, strongest
from unbraid.features.tables import LATENTS, SCHEMAS, TableWriter
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

LOGIT_BINS = 50
ROWS, COLUMNS = 128, 16384
"""Cosines that exist at the same time."""


def write_effects(
    folder: Path, sae: SAE, lm: LanguageModel, tokens: int, progress: Progress | None = None
) -> None:
    """The table weights: `tokens` output tokens that each latent promotes most and suppresses most, and a
    histogram of its effects on all of them."""
    d_sae, per = sae.config.d_sae, LATENTS["weights"]
    with TableWriter(folder, "weights") as writer:
        for begin in range(0, d_sae, per):
            latents = range(begin, min(begin + per, d_sae))
            effects = logit_effects(sae, lm, latents)
            counts = np.zeros((len(latents), LOGIT_BINS), np.int64)
            low, high = np.empty(len(latents), np.float32), np.empty(len(latents), np.float32)
            lists.effect_histogram(effects.numpy(), counts, low, high)
            columns: dict[str, Any] = {"latent": list(latents)}
            for name, sign in (("promoted", 1), ("suppressed", -1)):
                words, logits = strongest(lm, effects, tokens, sign)
                columns[name], columns[f"{name}_logits"] = words, logits
            columns |= {"logits": counts.tolist(), "logits_low": low, "logits_high": high}
            writer.write(columns)
            if progress is not None:
                progress(latents.stop, d_sae, "latents read through the unembedding")


def _directions(sae: SAE) -> dict[str, Tensor]:
    """Rows (d_sae, d) of the decoder, and of the encoder where there is one."""
    rows = {"decoder": sae.W_dec, "encoder": sae.encoder_rows()}
    return {kind: weights.detach() for kind, weights in rows.items() if weights is not None}


def write_neighbours(folder: Path, sae: SAE, beside: Sequence[tuple[SAE, str]], k: int) -> None:
    """The table neighbours: the k latents with the largest cosines, in this autoencoder and those beside it.

    Raises UserError where another one's weights have another width.
    """
    found: list[tuple[str, str | None, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for kind, own in _directions(sae).items():
        found.append((kind, None, *nearest(own, None, k)))
        for other, its in beside:
            theirs = _directions(other).get(kind)
            if theirs is None:
                continue
            if theirs.shape[1] != own.shape[1]:
                raise UserError(
                    f"the autoencoder {its[:12]}… of --beside has directions of {theirs.shape[1]} dimensions "
                    f"and this one of {own.shape[1]}, so they have no cosines; leave it out"
                )
            found.append((kind, its, *nearest(own, theirs, k)))
    d_sae, per = sae.config.d_sae, LATENTS["neighbours"]
    with TableWriter(folder, "neighbours") as writer:
        for begin in range(0, d_sae, per):
            blocks: list[pa.Table] = []
            for kind, its, near, cosine in found:
                m, n = near[begin : begin + per].shape
                blocks.append(
                    pa.table(
                        {
                            "latent": np.repeat(np.arange(begin, begin + m), n),
                            "kind": [kind] * (m * n),
                            "sae": [its] * (m * n),
                            "rank": np.tile(np.arange(n), m),
                            "neighbour": near[begin : begin + per].ravel(),
                            "cosine": cosine[begin : begin + per].ravel(),
                        }
                    ).cast(SCHEMAS["neighbours"])
                )
            block = pa.concat_tables(blocks)
            order = np.argsort(block["latent"].to_numpy(), kind="stable")
            writer.write(block.take(pa.array(order)))


@torch.no_grad()
def nearest(own: Tensor, theirs: Tensor | None, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Numbers and cosines (F, k) of the rows of `theirs` (G, d) nearest to each row of `own` (F, d), nearest
    first; of the other rows of `own` if None.  Never more than ROWS × COLUMNS cosines at a time.
    """
    a = own.float() / own.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
    b = a if theirs is None else theirs.float() / theirs.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
    k = min(k, len(b) - (theirs is None))
    numbers, cosines = torch.empty(len(a), k, dtype=torch.long), torch.empty(len(a), k)
    for begin in range(0, len(a), ROWS):
        rows = a[begin : begin + ROWS]
        best, at = (
            rows.new_zeros(len(rows), 0),
            torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device),
        )
        for first in range(0, len(b), COLUMNS):
            some = rows @ b[first : first + COLUMNS].T
            if theirs is None:
                own_column = torch.arange(begin - first, begin - first + len(rows), device=rows.device)
                inside = (own_column >= 0) & (own_column < some.shape[1])
                some[inside, own_column[inside]] = -torch.inf
            value, column = some.topk(min(k, some.shape[1]), dim=1)
            best, at = torch.cat([best, value], dim=1), torch.cat([at, column + first], dim=1)
            best, chosen = best.topk(min(k, best.shape[1]), dim=1)
            at = at.gather(1, chosen)
        numbers[begin : begin + ROWS], cosines[begin : begin + ROWS] = at.cpu(), best.cpu()
    return numbers.numpy(), cosines.numpy()
