"""What decoder directions say by themselves: opposites, parts of a latent in a wider autoencoder, a map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE

BLOCK = 1024
"""Rows of one decoder that are compared with all of another at a time."""
MOST_PAIRS = 1_000_000
"""Antonyms that are kept at most, the most opposite ones."""


def unit_rows(sae: SAE) -> Tensor:
    """Decoder rows of length one (d_sae, d_out), float32; a row of zeros stays."""
    with torch.no_grad():
        rows = sae.W_dec.detach().float()
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def antonyms(sae: SAE, index: Index, bar: float) -> list[dict[str, Any]]:
    """Pairs a < b of decoder cosine `bar` or less, the most opposite first, of latents that ever fire.

    `tokens` are those that one promotes and the other suppresses, of the few that the index lists.
    """
    alive = np.flatnonzero(index.densities > 0)
    rows = unit_rows(sae)[torch.from_numpy(alive).to(sae.W_dec.device)]
    found: list[tuple[float, int, int]] = []
    for first in range(0, len(rows), BLOCK):
        # Only pairs that have not been seen from the other side.
        cosines = rows[first : first + BLOCK] @ rows[first:].T
        a, b = (cosines <= bar).nonzero(as_tuple=True)
        upper = b > a
        a, b = a[upper], b[upper]
        values = cosines[a, b].tolist()
        pairs = zip(
            alive[(a + first).cpu().numpy()].tolist(), alive[(b + first).cpu().numpy()].tolist(), strict=True
        )
        found += [(value, i, j) for value, (i, j) in zip(values, pairs, strict=True)]
        if len(found) > 2 * MOST_PAIRS:
            found = sorted(found)[:MOST_PAIRS]
    found = sorted(found)[:MOST_PAIRS]
    words = _words(index, {latent for _, i, j in found for latent in (i, j)})
    none: tuple[set[str], set[str]] = set(), set()
    return [
        {
            "a": a,
            "b": b,
            "cosine": value,
            "tokens": sorted(
                words.get(a, none)[0] & words.get(b, none)[1] | words.get(b, none)[0] & words.get(a, none)[1]
            ),
        }
        for value, a, b in found
    ]


def _words(index: Index, latents: set[int]) -> dict[int, tuple[set[str], set[str]]]:
    """Promoted and suppressed tokens of some latents."""
    if not latents:
        return {}
    rows = index.query(
        "SELECT latent, promoted, suppressed FROM weights WHERE latent IN (SELECT unnest(?))",
        [sorted(latents)],
    )
    return {row["latent"]: (set(row["promoted"]), set(row["suppressed"])) for row in rows}


def children(sae: SAE, wider: SAE, bar: float, most: int) -> list[dict[str, Any]]:
    """For each latent those of a wider autoencoder whose decoder cosine is `bar` or more, nearest first.

    Raises UserError when the other one is not wider or writes to a space of another size.
    """
    if wider.W_dec.shape[1] != sae.W_dec.shape[1]:
        raise UserError(
            f"decoder rows have {sae.W_dec.shape[1]} entries but the wider SAE's have {wider.W_dec.shape[1]};"
            " name one of the same model and site"
        )
    if wider.config.d_sae <= sae.config.d_sae:
        raise UserError(
            f"the other SAE has {wider.config.d_sae} latents, which is no more than {sae.config.d_sae}; "
            "name a wider one"
        )
    rows, others = unit_rows(sae), unit_rows(wider)
    found: list[dict[str, Any]] = []
    for first in range(0, len(rows), BLOCK):
        best = (rows[first : first + BLOCK] @ others.T).topk(min(most, len(others)), dim=1)
        for latent, (values, places) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            found += [
                {"latent": first + latent, "rank": rank, "child": child, "cosine": value}
                for rank, (value, child) in enumerate(zip(values, places, strict=True))
                if value >= bar
            ]
    return found


def map_of(sae: SAE, alive: NDArray[np.bool_], spread: int, seed: int) -> tuple[NDArray[np.float32], str]:
    """Two coordinates for each latent (d_sae, 2), zeros for dead ones, and how they were found.

    t-SNE (van der Maaten and Hinton, 2008) of the directions' 50 first principal components, for at most
    `spread` live latents; it takes minutes for ten thousand.  Of more, the two first components themselves.
    """
    found = np.zeros((len(alive), 2), dtype=np.float32)
    chosen = np.flatnonzero(alive)
    if len(chosen) < 4:
        return found, "none"
    rows = unit_rows(sae)[torch.from_numpy(chosen).to(sae.W_dec.device)].cpu()
    wanted = min(50 if len(chosen) <= spread else 2, *rows.shape)
    components = _principal(rows, wanted)
    if len(chosen) > spread or wanted < 3:
        found[chosen, : components.shape[1]] = components[:, :2]
        return found, "principal components"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(chosen) - 1) / 3)
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(
        components
    )
    found[chosen] = embedding
    return found, "t-SNE"


def _principal(rows: Tensor, wanted: int) -> NDArray[np.float32]:
    """The first principal components (n, wanted) of rows (n, d), by the covariance's eigenvectors."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in rows.split(BLOCK):
        centred = block.double() - mean
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance)
    chosen = vectors.flip(1)[:, :wanted]
    # An eigenvector may come with either sign; the largest entry shall be positive.
    chosen = chosen * chosen.gather(0, chosen.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.cat([((block.double() - mean) @ chosen).float() for block in rows.split(BLOCK)]).numpy()
