"""How much of a planted world an autoencoder found, between what needs no learning and the most there is.

Rows of every table, with as many latents as the autoencoders that are judged but where it says otherwise:

* *predict none*: the mean, and no latent that fires. *untrained*: the same architecture before its first
  step. *random directions*: random unit rows that encode and decode, as many of them firing as latents do.
  *neurons* and *PCA*: the coordinates and the principal components, two latents each, the farthest from the
  mean firing. *DiffMean*: for each of the most frequent features the difference of the means of samples with
  and without it.
* *true dictionary*: the most frequent features' own directions, used by matching pursuit with the same L0.
  *logistic probes*: one for each of these features, fit on the truth.

Probes are fit, thresholds set and everything reported on different streams of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from torch import Tensor

from unbraid.evaluation.baselines import without_training
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.synthetic import BLOCK, Planted, Stream
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import SparseCodes
from unbraid.sae.registry import build
from unbraid.sae.scaling import Scaling
from unbraid.stats.bootstrap import Interval, mean_of_runs
from unbraid.training.run import first_weights

Floats = NDArray[np.float64]

MATCH = "the feature whose direction has the largest |cosine| with the latent's decoder row"
DEFINITIONS: dict[str, Definition] = {
    "f1": Definition(
        "firing against the nearest true feature's, F1",
        f"mean over latents of 2TP / (2TP + FP + FN), 0 where that is 0/0; TP: latent != 0 and {MATCH} > 0",
        "higher",
    ),
    "precision": Definition(
        "share of a latent's firing at which its feature is there",
        f"mean over all latents of TP / (TP + FP), 0 for a latent that never fires; TP as {MATCH} > 0",
        "higher",
    ),
    "recall": Definition(
        "share of the feature's firing at which its latent fires",
        f"mean over all latents of TP / (TP + FN), 0 where the feature never fires; TP as {MATCH} > 0",
        "higher",
    ),
    "mcc": Definition(
        "mean cosine of latents and features, paired one to one",
        "mean |cosine| of decoder rows and true directions over the min(d_sae, F) pairs of the one-to-one "
        "matching that makes it largest",
        "higher",
    ),
    "uniqueness": Definition(
        "different features that are nearest to a latent, of all latents",
        f"number of different features that are, for some latent, {MATCH}; divided by d_sae",
        "higher",
    ),
    "ev": Definition(
        "variance explained, about the mean",
        "1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2), each E over all samples, in float64",
        "higher",
    ),
    "l0": Definition("latents that fire", "mean over samples of the number of latents != 0"),
    "dead": Definition(
        "latents that never fire", "share of the latents that are 0 at all samples", "lower"
    ),
    "l2_ratio": Definition(
        "length of the reconstruction; below 1 where it shrinks",
        "mean over samples with |x| > 0 of |x_hat| / |x|",
    ),
}  # fmt: skip

DRAWS = 3
"""Seeds of each floor."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    """Whose numbers these are."""
    kind: str
    """floor, judged or ceiling."""
    metrics: Mapping[str, Interval]
    """Mean over seeds with Student's 95 % interval, a point where `n` is 1; by the names of `DEFINITIONS`."""


@dataclass(frozen=True)
class Verdict:
    """Autoencoders between floor and ceiling of one world."""

    rows: tuple[Row, ...]
    """Floors, each autoencoder, their mean where there are several, ceilings."""
    samples: int
    """Samples that all are judged on, in no one's training stream."""
    active: float
    """Features that fire at a sample, on average."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the definitions and their hashes."""
        rows = [
            {"name": r.name, "kind": r.kind, "metrics": {k: v.as_dict() for k, v in r.metrics.items()}}
            for r in self.rows
        ]
        definitions = {name: asdict(d) | {"id": d.id} for name, d in DEFINITIONS.items()}
        return {
            "samples": self.samples, "active": self.active, "rows": rows, "definitions": definitions,
        }  # fmt: skip


def judge(
    saes: Mapping[str, SAE],
    world: Planted,
    *,
    samples: int = 32_768,
    fitted_on: int = 262_144,
    progress: Progress | None = None,
) -> Verdict:
    """Hold autoencoders, by name, against the truth of the world that they learned from.

    Several are taken as seeds of one setting. Floors that are drawn have `DRAWS` seeds of their own. Raises
    UserError when their architecture, width or k differ, or the width of an activation is not the world's.
    """
    first = _one_setting(saes, world)
    total, done = len(saes) + 2 * DRAWS + 6, 0
    found: dict[str, dict[str, float]] = {}

    def add(name: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        nonlocal done
        found[name] = work()
        done += 1
        if progress is not None:
            progress(done, total, name)
        return found[name]

    for name, sae in saes.items():
        add(name, lambda sae=sae: measure(sae, world, samples))
    l0 = float(np.mean([found[name]["l0"] for name in saes]))
    width = first.config.d_sae
    random = SAEConfig("topk", world.config.d_in, width, min(max(1, round(l0)), width))
    start = torch.from_numpy(next(world.batches("fit", BLOCK))[0])
    fixed = {
        "predict none": lambda: _nothing(world, samples),
        **{
            name: lambda sae=sae: measure(sae, world, samples)
            for name, sae in without_training(first, _sample(world)).items()
        },
        "DiffMean": lambda: difference_of_means(world, width, samples, fitted_on),
    }
    rows = [Row(name, "floor", _over_seeds([add(name, work)])) for name, work in fixed.items()]
    for name, config, shift in (("untrained", first.config, 0), ("random directions", random, DRAWS)):

        def begin(seed: int, config: SAEConfig = config) -> dict[str, float]:
            return measure(_untrained(config, start, first_weights(seed)), world, samples)

        drawn = [add(f"{name} {i}", lambda seed=shift + i: begin(seed)) for i in range(DRAWS)]
        rows.append(Row(name, "floor", _over_seeds(drawn)))
    rows += [Row(name, "judged", _over_seeds([found[name]])) for name in saes]
    if len(saes) > 1:
        rows.append(Row(f"mean of {len(saes)}", "judged", _over_seeds([found[name] for name in saes])))
    ceilings = {
        "true dictionary": lambda: measure(_pursuing(world, width, l0), world, samples),
        "logistic probes": lambda: probe(world, width, samples, fitted_on),
    }
    rows += [Row(name, "ceiling", _over_seeds([add(name, work)])) for name, work in ceilings.items()]
    return Verdict(tuple(rows), samples, world.l0(samples))


@torch.no_grad()
def measure(sae: SAE, world: Planted, samples: int, stream: Stream = "report") -> dict[str, float]:
    """Every metric of `DEFINITIONS` for one autoencoder, on the first `samples` of a stream."""
    cosines = _cosines(sae.W_dec.detach().double().cpu().numpy(), world)
    match = cosines.argmax(axis=1)
    d_in, d_sae = world.config.d_in, sae.config.d_sae
    hits, fired, there = np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae)
    sum_x, square, error, ratio, counted = np.zeros(d_in), 0.0, 0.0, 0.0, 0
    for x, truth in world.batches(stream, samples):
        output = sae(torch.from_numpy(x))
        fires, present = _fires(output.codes, d_sae), truth[:, match] > 0
        hits += (fires * present).sum(axis=0)
        fired += fires.sum(axis=0)
        there += present.sum(axis=0)
        x, x_hat = x.astype(np.float64), output.x_hat.double().cpu().numpy()
        lengths = np.linalg.norm(x, axis=1)
        sum_x += x.sum(axis=0)
        square += float((lengths**2).sum())
        error += float(np.square(x - x_hat).sum())
        ratio += float((np.linalg.norm(x_hat, axis=1)[lengths > 0] / lengths[lengths > 0]).sum())
        counted += int((lengths > 0).sum())
    return _detection(hits, fired, there) | {
        **_directions(cosines),
        "ev": 1 - error / (square - float(sum_x @ sum_x) / samples),
        "l0": float(fired.sum()) / samples,
        "dead": float((fired == 0).mean()),
        "l2_ratio": ratio / counted,
    }


def _cosines(rows: Floats, world: Planted) -> Floats:
    """|cosine| of rows (m, d_in) with the true directions, (m, F)."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.abs(rows @ world.directions.T.astype(np.float64))


def _directions(cosines: Floats) -> dict[str, float]:
    """MCC and uniqueness of directions whose |cosines| with the true ones are (m, F)."""
    return {
        "mcc": float(cosines[linear_sum_assignment(cosines, maximize=True)].mean()),
        "uniqueness": len(np.unique(cosines.argmax(axis=1))) / len(cosines),
    }


def _sample(world: Planted) -> Tensor:
    """Activations that are in no stream that is trained or judged on, (8 · BLOCK, d_in)."""
    return torch.from_numpy(np.concatenate([x for x, _ in world.batches("fit", 8 * BLOCK)]))


def _nothing(world: Planted, samples: int) -> dict[str, float]:
    """Of an autoencoder without a latent that fires, which says the mean; it has no direction to match."""
    sae = build(SAEConfig("topk", world.config.d_in, 1, 1)).requires_grad_(False)
    sae.W_enc.zero_()
    sae.b_dec.copy_(_sample(world).double().mean(dim=0))
    found = measure(sae, world, samples)
    return {name: value for name, value in found.items() if name not in ("mcc", "uniqueness")}


def probe(world: Planted, width: int, samples: int, fitted_on: int) -> dict[str, float]:
    """F1, precision and recall of one logistic regression for each of the `width` most frequent features.

    Fit by Adam on `fitted_on` samples, each seen once; the threshold with the best F1 is taken on a stream of
    its own.
    """
    features = min(width, world.config.features)
    W = torch.from_numpy(world.directions[:features].T.copy()).requires_grad_()  # as near as one can begin
    b = torch.full((features,), -4.0, requires_grad=True)
    steps = max(1, fitted_on // BLOCK)
    optimizer = torch.optim.Adam([W, b], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for x, truth in world.batches("fit", steps * BLOCK):
        target = torch.from_numpy(truth[:, :features].toarray() > 0).float()
        logits = torch.from_numpy(x) @ W + b
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        (loss * features).backward()
        optimizer.step()
        decay.step()
    return _at_best_threshold(world, W.detach(), b.detach(), np.linspace(-4.0, 4.0, 33), samples)


def difference_of_means(world: Planted, width: int, samples: int, fitted_on: int) -> dict[str, float]:
    """F1, precision and recall of the difference of means of each of the `width` most frequent features, its
    threshold taken as a probe's is; MCC and uniqueness of these directions.

    Means are of `fitted_on` samples. A score is 0 at the mean without the feature and 1 at the mean with it.
    """
    features, steps = min(width, world.config.features), max(1, fitted_on // BLOCK)
    x_sum, x_with, count = np.zeros(world.config.d_in), 0.0, np.zeros(features)
    for x, truth in world.batches("fit", steps * BLOCK):
        there = truth[:, :features] > 0
        x_sum += x.sum(axis=0, dtype=np.float64)
        x_with = x_with + there.T.astype(np.float64) @ x.astype(np.float64)
        count += there.sum(axis=0)
    others = np.maximum(steps * BLOCK - count, 1)[:, None]
    without = (x_sum - x_with) / others
    gap = np.where(count[:, None] > 0, x_with / np.maximum(count, 1)[:, None] - without, 0.0)
    scale = np.maximum(np.square(gap).sum(axis=1), 1e-300)
    W, b = (gap / scale[:, None]).T, -(gap * without).sum(axis=1) / scale
    found = _at_best_threshold(
        world, torch.from_numpy(W).float(), torch.from_numpy(b).float(), np.linspace(0.0, 2.0, 33), samples
    )
    cosines = _cosines(gap, world)
    return found | _directions(cosines)


def _at_best_threshold(world: Planted, W: Tensor, b: Tensor, bars: Floats, samples: int) -> dict[str, float]:
    """What x W + b above the bar (m,) with the best F1 on the stream for thresholds detects on the other."""
    tried = _at_thresholds(world, W, b, bars[:, None], samples, "threshold")  # 3 × (bars, features)
    best = bars[_f1(*tried).argmax(axis=0)]
    hits, fired, there = (counts[0] for counts in _at_thresholds(world, W, b, best[None], samples, "report"))
    return _detection(hits, fired, there)


def _at_thresholds(
    world: Planted, W: Tensor, b: Tensor, bars: Floats, samples: int, stream: Stream
) -> tuple[Floats, Floats, Floats]:
    """Hits, firing and presence, each (bars, features), of logits x W + b above each of `bars`, (bars, 1) or
    (1, features)."""
    hits, fired, there = (np.zeros((len(bars), W.shape[1])) for _ in range(3))
    for x, truth in world.batches(stream, samples):
        logits, present = (torch.from_numpy(x) @ W + b).numpy(), truth[:, : W.shape[1]].toarray() > 0
        for number, bar in enumerate(bars):
            fires = logits > bar
            hits[number] += (fires & present).sum(axis=0)
            fired[number] += fires.sum(axis=0)
        there += present.sum(axis=0)
    return hits, fired, there


def _f1(hits: Floats, fired: Floats, there: Floats) -> Floats:
    return 2 * hits / np.maximum(fired + there, 1)


def _detection(hits: Floats, fired: Floats, there: Floats) -> dict[str, float]:
    """Means over latents of counts (n,): what fired and was there, what fired, what was there."""
    return {
        "f1": float(_f1(hits, fired, there).mean()),
        "precision": float((hits / np.maximum(fired, 1)).mean()),
        "recall": float((hits / np.maximum(there, 1)).mean()),
    }


def _fires(codes: SparseCodes, d_sae: int) -> csr_array:
    """1 where a latent fires: (n, d_sae)."""
    rows, places = codes.values.nonzero(as_tuple=True)
    latents = codes.indices[rows, places].cpu().numpy()
    ones = np.ones(len(latents), dtype=np.float32)
    return csr_array((ones, (rows.cpu().numpy(), latents)), shape=(len(codes.values), d_sae))


@torch.no_grad()
def _untrained(config: SAEConfig, x: Tensor, generator: torch.Generator) -> SAE:
    """An autoencoder as it begins to learn from x (n, d_in)."""
    scaling = Scaling.of(x, [config.d_in])
    if scaling is None:
        raise UserError("all samples of this world are the same; plant more features")
    sae = build(config)
    scaled = scaling(x)
    sae.initialise(scaled, scaled, generator)
    sae.fold(scaling, scaling)
    return sae.calibrated([x]).requires_grad_(False)


@torch.no_grad()
def _pursuing(world: Planted, width: int, l0: float) -> SAE:
    """Matching pursuit with the directions of the most frequent features; the others enter as their mean."""
    d_sae = min(width, world.config.features)
    config = SAEConfig("matching_pursuit", world.config.d_in, d_sae, min(max(1, round(l0)), d_sae))
    sae = build(config).requires_grad_(False)
    sae.W_dec.copy_(torch.from_numpy(world.directions[:d_sae]))
    mean = np.zeros(world.config.features)
    for _, truth in world.batches("fit", 8 * BLOCK):
        mean += truth.sum(axis=0) / (8 * BLOCK)
    sae.b_dec.copy_(torch.from_numpy(mean[d_sae:] @ world.directions[d_sae:]))
    return sae


def _one_setting(saes: Mapping[str, SAE], world: Planted) -> SAE:
    """The first of them, all being alike; UserError where they are not, or do not fit the world."""
    first, name = next(iter(saes.values())), next(iter(saes))
    for other, sae in saes.items():
        if sae.config.d_in != world.config.d_in or sae.config.d_out not in (0, sae.config.d_in):
            raise UserError(
                f"{other} reads {sae.config.d_in} dimensions but this world has {world.config.d_in}; name an "
                "autoencoder that was trained on it"
            )
        for what in ("architecture", "d_sae", "k"):
            ours, theirs = getattr(first.config, what), getattr(sae.config, what)
            if ours != theirs:
                raise UserError(
                    f"{name} and {other} differ in {what}, {ours} and {theirs}; judge those of one setting "
                    "together, the others by themselves"
                )
    return first


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    return {name: mean_of_runs([one[name] for one in found]) for name in DEFINITIONS if name in found[0]}
