"""Stability: how much of a dictionary another seed finds again.

The mean over matched latents of |cos| between two decoders, for every pair of autoencoders that differ in
their seed alone (PW-MCC; Paulo and Belrose 2025, arXiv 2501.16615, and the mean correlation of independent
component analysis before it). Latents are matched one to one, by the assignment with the largest sum;
where that would take too long each latent takes its nearest, which is another metric under another name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, logit
from scipy.stats import t as student
from torch import Tensor

from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import SuiteResult, detectable
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, jackknife_error, mean_of_runs

MATCHED_WIDTH = 4096
"""The widest dictionaries that are matched one to one: 16 million products, some 20 seconds a pair."""
ROWS_AT_ONCE = 2048
"""Latents whose products with all others exist at the same time, beyond that width."""
FLOOR_PAIRS = 3
"""Pairs of random dictionaries behind the floor."""

_PAIRS = (
    "mean over pairs of autoencoders of the same site, architecture, width and k; decoder rows of unit"
    " length, dead latents included; interval by Student's t about the logit, its error the"
    " jackknife's over autoencoders; with two autoencoders a point"
)
DEFINITIONS: dict[str, Definition] = {
    "pw_mcc": Definition(
        "|cosine| of matched decoder directions over seeds",
        f"mean over latents of |cos| under the one-to-one assignment with the largest sum; {_PAIRS}",
        "higher",
    ),
    "pw_max_cosine": Definition(
        "largest |cosine| of a decoder direction with another seed's",
        f"mean over the latents of both of the largest |cos| with any of the other's, not one to one;"
        f" {_PAIRS}",
        "higher",
    ),
}


def stability(saes: Mapping[str, SAE], seed: int) -> SuiteResult:
    """One row for each set of autoencoders that differ in their seed alone, and a floor for each shape.

    Raises UserError when no two of them have site, architecture, width and k in common, and when a decoder is
    not finite.
    """
    groups: dict[str, list[str]] = {}
    for name, sae in saes.items():
        c = sae.config
        if not bool(torch.isfinite(sae.W_dec).all()):
            raise UserError(f"the decoder of autoencoder {name} is not finite; its weights are damaged")
        kind = (
            f"{c.architecture} {c.d_in}→{c.d_sae}"
            + (f" k={c.k}" if c.k else "")
            + (f" at {c.site}" * bool(c.site))
        )
        groups.setdefault(kind, []).append(name)
    rows: dict[str, dict[str, Interval]] = {}
    row_of: dict[str, str] = {}
    baselines: list[str] = []
    for kind, names in groups.items():
        if len(names) < 2:
            continue
        decoders = [saes[name].W_dec.detach().float().cpu() for name in names]
        metric = "pw_mcc" if decoders[0].shape[0] <= MATCHED_WIDTH else "pw_max_cosine"
        rows[f"{kind}, {len(names)} seeds"] = {metric: over_seeds(decoders, metric)}
        row_of |= dict.fromkeys(names, f"{kind}, {len(names)} seeds")
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            [torch.randn(decoders[0].shape, generator=generator) for _ in range(2)]
            for _ in range(FLOOR_PAIRS)
        ]
        floor = f"random dictionaries {decoders[0].shape[1]}→{decoders[0].shape[0]}"
        rows[floor] = {metric: mean_of_runs([similarity(a, b, metric) for a, b in drawn])}
        baselines += [floor] if floor not in baselines else []
    if not rows:
        raise UserError(
            "stability compares autoencoders that differ in their seed alone, and no two of these"
            f" {len(saes)} do; give two or more of the same site, architecture, width and k"
        )
    alone = [names[0] for names in groups.values() if len(names) < 2]
    notes = (f"nothing to compare with: {', '.join(alone)}",) if alone else ()
    return SuiteResult("stability", rows, tuple(baselines), detectable(rows), {"row_of": row_of}, notes)


def over_seeds(decoders: Sequence[Tensor], metric: str) -> Interval:
    """The mean over pairs of decoders, each (d_sae, d_in), with a jackknife interval over decoders."""
    pairs = {(i, j): similarity(decoders[i], decoders[j], metric)
             for i, j in combinations(range(len(decoders)), 2)}  # fmt: skip
    value, n = float(np.mean(list(pairs.values()))), len(decoders)
    if n == 2:
        return Interval(value, value, value, 1)
    without = [np.mean([v for pair, v in pairs.items() if i not in pair]) for i in range(n)]
    # On the logit's scale, where a lucky seed pulls no further up than an unlucky one pulls down.
    inside = np.clip(np.array([value, *without], dtype=np.float64), 1e-9, 1 - 1e-9)
    scaled: NDArray[np.float64] = logit(inside)
    middle = float(scaled[0])
    half = float(student.ppf(0.975, n - 1)) * jackknife_error(scaled[1:], middle)
    low, high = expit(middle - half), expit(middle + half)
    return Interval(value, min(float(low), value), max(float(high), value), n)


def similarity(a: Tensor, b: Tensor, metric: str) -> float:
    """One pair's number, from decoders (F, d_in) and (G, d_in)."""
    a, b = (w / w.norm(dim=1, keepdim=True).clamp(min=1e-30) for w in (a.float(), b.float()))
    if metric == "pw_mcc":
        cosines = (a @ b.T).abs().numpy()
        return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean(dtype=np.float64))
    most_b = torch.zeros(len(b))
    total = 0.0
    for rows in a.split(ROWS_AT_ONCE):
        cosines = (rows @ b.T).abs()
        total += float(cosines.amax(dim=1).double().sum())
        most_b = torch.maximum(most_b, cosines.amax(dim=0))
    return (total / len(a) + float(most_b.double().mean())) / 2
