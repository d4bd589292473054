"""What an edit is compared with: random latents and directions, difference of means, a keyword filter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from unbraid.activations.documents import Document
from unbraid.causal.probes import Probe
from unbraid.features.rows import read_rows
from unbraid.features.scores import site_means
from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, Positions
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

# A random latent is drawn from this many that are nearest to the target in log frequency.
_NEAREST = 20
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Contrast:
    """Difference of the mean activations of bad and honest replies at one site."""

    site: Site
    """Where it was measured."""
    direction: NDArray[np.float32]
    """Mean of the bad replies less mean of the honest ones (d_in,)."""
    honest: float
    """Mean projection of honest replies on the unit direction."""
    bad: float
    """Mean projection of bad replies on the unit direction."""
    documents: tuple[int, int]
    """Number of bad and of honest replies."""


def difference_of_means(
    lm: LanguageModel,
    bad: Sequence[Document],
    honest: Sequence[Document],
    site: Site,
    *,
    context: int = 512,
) -> Contrast:
    """Contrast of documents at their focus tokens, or at their replies where none names a focus.

    Marks and Tegmark (2023) call it the difference-in-means direction.  Each document counts once,
    however long it is.  Raises UserError when either side is empty or both have the same mean.
    """
    if not bad or not honest:
        raise UserError(
            f"a difference of means needs both kinds of replies, but there are {len(bad)} bad and "
            f"{len(honest)} honest ones; sample more probes"
        )
    bad_means = site_means(lm, bad, site, context=context)
    honest_means = site_means(lm, honest, site, context=context)
    direction = bad_means.mean(axis=0, dtype=np.float64) - honest_means.mean(axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(direction))
    if norm == 0.0:
        raise UserError("bad and honest replies have the same mean activation; choose another focus or site")
    return Contrast(
        site=site,
        direction=direction.astype(np.float32),
        honest=float((honest_means @ (direction / norm)).mean()),
        bad=float((bad_means @ (direction / norm)).mean()),
        documents=(len(bad), len(honest)),
    )


def subtracted(contrast: Contrast, alpha: float, *, positions: Positions = "reply") -> Edit:
    """x − alpha · direction at every token."""
    return _along(contrast, "add", -alpha, positions, f"difference of means × {alpha:g}")


def clipped(contrast: Contrast, fraction: float = 0.0, *, positions: Positions = "reply") -> Edit:
    """x moved back along the direction wherever it lies beyond a bar.

    The bar is the honest mean for `fraction` 0 and the bad mean for 1.
    """
    bar = contrast.honest + fraction * (contrast.bad - contrast.honest)
    return _along(contrast, "clip", bar, positions, f"difference of means clipped at {fraction:g}")


def _along(contrast: Contrast, operation: str, value: float, positions: Positions, name: str) -> Edit:
    return Edit(
        site=contrast.site,
        operation="clip" if operation == "clip" else "add",
        value=value,
        probe=np.zeros((1, len(contrast.direction)), dtype=np.float32),
        bias=np.zeros(1, dtype=np.float32),
        threshold=np.full(1, -np.inf, dtype=np.float32),
        write=contrast.direction[None],
        positions=positions,
        name=name,
    )


def matched_latents(
    densities: NDArray[np.float64], latents: Sequence[int], *, draws: int, seed: int
) -> list[tuple[int, ...]]:
    """For each draw as many random other latents as `latents`, each fired about as often as its
    counterpart.

    `densities` (d_sae,) are firing frequencies.  Dead latents are never drawn: they would change nothing.
    Raises UserError when there are not enough others alive.
    """
    rng = np.random.default_rng(seed)
    alive = np.flatnonzero(densities > 0)
    others = alive[~np.isin(alive, latents)]
    if len(others) < len(latents):
        raise UserError(
            f"only {len(others)} other latents fire on these replies, too few for a control of "
            f"{len(latents)}; sample more probes"
        )
    floor = float(densities[alive].min())
    found: list[tuple[int, ...]] = []
    for _ in range(draws):
        drawn: list[int] = []
        for latent in latents:
            free = others[~np.isin(others, drawn)]
            gap = np.abs(np.log(densities[free]) - np.log(max(float(densities[latent]), floor)))
            nearest = free[np.argsort(gap, kind="stable")[:_NEAREST]]
            drawn.append(int(rng.choice(nearest)))
        found.append(tuple(drawn))
    return found


def random_direction(edit: Edit, *, seed: int) -> Edit:
    """The same edit with its write directions turned at random, all of them together.

    It reads the same activations, fires at the same tokens and moves them just as far, but somewhere
    else: the directions keep their norms and the angles between them.
    """
    rng = np.random.default_rng(seed)
    n, d = edit.write.shape
    if n > d:
        raise UserError(f"{n} latents are more than the {d} dimensions of the site; choose fewer latents")
    orthonormal, triangular = np.linalg.qr(edit.write.astype(np.float64).T)  # (d, n), (n, n)
    turned = np.linalg.qr(rng.standard_normal((d, orthonormal.shape[1])))[0]
    write = (turned @ triangular).T.astype(np.float32)
    return replace(edit, write=write, name=f"{edit.name} turned at random")


def reply_densities(
    sae: SAE, lm: LanguageModel, probes: Sequence[Probe], replies: Sequence[str], site: Site
) -> NDArray[np.float64]:
    """Share of reply tokens at which each latent fires (d_sae,)."""
    documents = [
        Document.of_messages((*probe.messages, {"role": "assistant", "content": reply}), id=probe.id)
        for probe, reply in zip(probes, replies, strict=True)
        if reply
    ]
    counts = np.zeros(sae.config.d_sae)
    tokens = 0
    for rows in read_rows(lm, documents, site, positions="reply", context=1024, batch_tokens=4096):
        with torch.no_grad():
            codes = sae.encode(rows.x)
        fired = (codes.values.cpu().numpy() != 0) & rows.counted[:, None]
        counts += np.bincount(codes.indices.cpu().numpy()[fired], minlength=len(counts))
        tokens += int(rows.counted.sum())
    return counts / max(tokens, 1)


def words_of(text: str) -> set[str]:
    """The different words of a text, in lower case."""
    return set(_WORD.findall(text.lower()))


def learn_keywords(
    incidents: Sequence[str], honest: Sequence[str], *, most: int = 20, least_z: float = 3.0
) -> tuple[str, ...]:
    """The words that mark incident replies most clearly, clearest first.

    A word's log-odds of standing in an incident reply against an honest one (half a reply added to each
    cell), in standard errors, must reach `least_z`.
    """
    in_incidents, in_honest = _document_counts(incidents), _document_counts(honest)
    found: list[tuple[float, str]] = []
    for word, a in in_incidents.items():
        b = in_honest.get(word, 0)
        cells = np.array([a, len(incidents) - a, b, len(honest) - b]) + 0.5
        odds = np.log(cells[0] / cells[1]) - np.log(cells[2] / cells[3])
        z = float(odds / np.sqrt((1 / cells).sum()))
        if z >= least_z:
            found.append((-z, word))
    return tuple(word for _, word in sorted(found)[:most])


def _document_counts(texts: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        for word in words_of(text):
            counts[word] = counts.get(word, 0) + 1
    return counts


def keyword_guardrail(replies: Sequence[str], words: Sequence[str]) -> NDArray[np.bool_]:
    """Which replies (n,) a filter would hold back: those that contain one of the words, in any case."""
    listed = {word.lower() for word in words}
    return np.array([not listed.isdisjoint(words_of(reply)) for reply in replies], dtype=np.bool_)
