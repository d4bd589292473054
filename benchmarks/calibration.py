"""Whether the statistics keep their promises: false alarms of every test, coverage of every interval.

    make bench NAME=calibration JSON=out.json
    python benchmarks/calibration.py --runs 300        # a quick look

Data are drawn again and again from processes whose truth is known. *False alarms*: both groups come from one
process; the share of runs in which a test at 5 % says that they differ, or a 95 % interval leaves out "no
difference". *Coverage*: the share of runs in which a 95 % interval holds the truth. In parentheses Wilson's
interval over the runs. Documents have unequal numbers of tokens and skewed values; the plain percentile
bootstrap stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import norm

from unbraid.activations.documents import Document
from unbraid.evaluation.drawn import Share, Tokens, mean_of
from unbraid.evaluation.labelled import Pooled
from unbraid.evaluation.scr import scr
from unbraid.evaluation.stability import over_seeds, similarity
from unbraid.evaluation.tpp import tpp
from unbraid.features.find import FindConfig, find
from unbraid.features.labels.contexts import Evidence, Window
from unbraid.features.labels.scores import classified
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.stats.agreement import agreement
from unbraid.stats.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_unexplained,
    mean_of_runs,
    paired_difference,
    rate,
    rate_by_document,
    wilson,
)
from unbraid.stats.effects import (
    auroc,
    auroc_interval,
    auroc_p_value,
    minimum_detectable_difference,
    risk_difference,
)
from unbraid.stats.jackknife import auroc_by_document, correlation_by_document
from unbraid.stats.multiple import benjamini_hochberg
from unbraid.stats.permutation import familywise_p_value, max_statistic_null

Rng = np.random.Generator
RESAMPLES = 1000
D_IN = 8


# --- tests: each returns whether it raised an alarm on data without any effect ---


def max_statistic(rng: Rng, statistic: Any) -> bool:
    """The best of 60 sparse latents, correlated in threes, on 40 documents."""
    scores = np.maximum(0, np.repeat(rng.normal(size=(40, 20)), 3, axis=1) + rng.normal(-0.7, 1, (40, 60)))
    labels = rng.permutation(np.arange(40) < 16)
    if statistic == "mean_difference":
        best = (scores[labels].mean(axis=0) - scores[~labels].mean(axis=0)).max() - 1e-12
    else:
        found = auroc(scores, labels)
        best = (np.maximum(found, 1 - found) if statistic == "auroc_two_sided" else found).max() - 1e-12
    null = max_statistic_null(scores, labels, statistic, permutations=99, seed=int(rng.integers(2**31)))
    return bool(familywise_p_value(best, null) <= 0.05)


def benjamini(rng: Rng) -> bool:
    """Any of 60 latents with a q-value of at most 5 %."""
    scores = np.maximum(0, np.repeat(rng.normal(size=(40, 20)), 3, axis=1) + rng.normal(-0.7, 1, (40, 60)))
    p = auroc_p_value(scores, rng.permutation(np.arange(40) < 16))
    return bool(benjamini_hochberg(p).min() <= 0.05)


def one_auroc(rng: Rng) -> bool:
    """One latent that was named beforehand."""
    return bool(auroc_p_value(rng.exponential(size=40), np.arange(40) < 16) <= 0.05)


def search(rng: Rng) -> bool:
    """`unbraid find` reports any latent of 40."""
    scores = np.maximum(0, rng.normal(-0.5, 1, (160, 40))).astype(np.float32)
    names = [f"{rng.integers(2**62)}" for _ in range(160)]
    config = FindConfig(permutations=99, seed=int(rng.integers(2**31)))
    return bool(find(scores[:80], scores[80:], names, config).latents)


def leaves_out(interval: Interval, null: float) -> bool:
    return not interval.low <= null <= interval.high


def paired_rates(rng: Rng, n: int, samples: int = 1) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Replies to n prompts under two conditions that share much of their randomness, and the prompts."""
    chance = np.repeat(rng.beta(0.6, 1.4, n), samples)
    shared, same = rng.random(len(chance)), rng.random((2, len(chance))) < 0.7
    a, b = ((np.where(same[i], shared, rng.random(len(chance))) < chance) for i in range(2))
    return a.astype(float), b.astype(float), np.repeat(np.arange(n), samples)


TESTS: dict[str, Callable[[Rng], bool]] = {
    "max statistic, auroc": lambda rng: max_statistic(rng, "auroc"),
    "max statistic, auroc two-sided": lambda rng: max_statistic(rng, "auroc_two_sided"),
    "max statistic, mean difference": lambda rng: max_statistic(rng, "mean_difference"),
    "Benjamini-Hochberg, any": benjamini,
    "auroc p-value": one_auroc,
    "unbraid find, any latent": search,
    "auroc interval, 20 + 20": lambda rng: leaves_out(
        auroc_interval(np.maximum(0, rng.normal(size=40)), np.arange(40) < 20), 0.5
    ),
    "risk difference, 40 + 60 at .3": lambda rng: leaves_out(
        risk_difference(rng.random(40) < 0.3, rng.random(60) < 0.3), 0.0
    ),
    "paired rates, 60 prompts": lambda rng: leaves_out(
        paired_difference(*paired_rates(rng, 60), 0, RESAMPLES), 0.0
    ),
    "paired rates, 30 prompts × 4": lambda rng: leaves_out(
        paired_difference(*paired_rates(rng, 30, 4), 0, RESAMPLES), 0.0
    ),
    "paired means, 30 skewed documents": lambda rng: leaves_out(
        paired_difference(
            *(np.repeat(rng.gamma(2, 1, 30), 1) + rng.gamma(1, 1, (2, 30))), np.arange(30), 0, RESAMPLES
        ),
        0.0,
    ),
}


# --- intervals: each draws data and returns the interval, the percentile bootstrap's, and the truth ---

Measured = tuple[Interval, tuple[float, float] | None, float]


def percentiles(above: NDArray[Any], below: NDArray[Any], rng: Rng) -> tuple[float, float]:
    """The plain percentile bootstrap of a ratio of sums over documents, for comparison."""
    drawn = rng.integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.quantile(above[drawn].sum(axis=1) / below[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def tokens(rng: Rng, n: int) -> NDArray[Any]:
    """Tokens of n documents: log-normal, some 55 on average, a tenth of them beyond 150."""
    return np.maximum(1, np.round(rng.lognormal(4, 0.8, n)))


def ratio(rng: Rng, above: NDArray[Any], below: NDArray[Any], truth: float) -> Measured:
    found = bootstrap_ratio(above, below, np.arange(len(above)), int(rng.integers(2**31)), RESAMPLES)
    return found, percentiles(above, below, rng), truth


def mean_of_documents(rng: Rng, n: int, skew: str) -> Measured:
    """A mean over documents, one value each."""
    drawn = {
        "normal": lambda: (rng.normal(1, 1, n), 1.0),
        "gamma": lambda: (rng.gamma(2, 0.5, n), 1.0),
        "exponential": lambda: (rng.exponential(1, n), 1.0),
    }
    values, truth = drawn[skew]()
    found = bootstrap_mean(values, np.arange(n), int(rng.integers(2**31)), RESAMPLES)
    return found, percentiles(values, np.ones(n), rng), truth


def per_token(rng: Rng, n: int) -> Measured:
    """A mean over tokens, such as MSE: documents differ in length and in level (gamma, skewness 1)."""
    T = tokens(rng, n)
    level = rng.gamma(4, 0.25, n)
    return ratio(rng, T * level + np.sqrt(T) * rng.normal(0, 0.5, n), T, 1.0)


def recovered(rng: Rng, n: int) -> Measured:
    """Loss recovered: (CE_abl − CE_sae) / (CE_abl − CE_clean), both differing from document to document."""
    T = tokens(rng, n)
    gap, cost = T * rng.gamma(5, 0.6, n), T * rng.gamma(1.5, 0.1, n)
    return ratio(rng, gap - cost, gap, 1 - 0.15 / 3)


def unexplained(rng: Rng, n: int, d: int = 16) -> Measured:
    """FVU: every document has a mean of its own about the common one, and an error of its own level."""
    T = tokens(rng, n).astype(int)
    centre, offsets = np.full(d, 2.0), rng.normal(0, 0.5, (n, d))
    level = rng.gamma(5, 0.2, n)  # of the spread within a document, 1 on average
    # Sums over tokens drawn as such: Σ x of T normal tokens, Σ ‖x − mean‖² as a chi-square.
    wobble = rng.normal(size=(n, d)) * np.sqrt(level[:, None] * T[:, None])
    within = level * rng.chisquare(np.maximum(T - 1, 1) * d) * (T > 1)
    total = T[:, None] * (centre + offsets) + wobble
    square = within + (total**2).sum(axis=1) / T
    error = 0.1 * T * d * level * rng.gamma(6, 1 / 6, n)
    found = bootstrap_unexplained(error, square, total, T, int(rng.integers(2**31)), RESAMPLES)

    drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    own = (drawn @ total) / (drawn @ T)[:, None]
    variance = (drawn @ square) / (drawn @ T) - (own**2).sum(axis=1)
    low, high = np.quantile((drawn @ error) / (drawn @ T) / variance, [0.025, 0.975])
    return found, (float(low), float(high)), 0.1 * d / (d + 0.25 * d)


def paired_means(rng: Rng, n: int) -> Measured:
    """A paired difference of a number, such as ΔCE between two autoencoders on the same documents."""
    level = rng.gamma(2, 1, n)
    a, b = level + rng.gamma(1, 0.5, n), level + rng.gamma(1, 0.3, n)
    found = paired_difference(a, b, np.arange(n), int(rng.integers(2**31)), RESAMPLES)
    return found, percentiles(a - b, np.ones(n), rng), 0.2


def paired_share(rng: Rng, n: int, samples: int, gain: float) -> Measured:
    """A paired difference of rates: a condition that takes away a share `gain` of the incidents."""
    a, b, prompts = paired_rates(rng, n, samples)
    b = b * (rng.random(len(b)) < 1 - gain)
    found = paired_difference(a, b, prompts, int(rng.integers(2**31)), RESAMPLES)
    sums = np.bincount(prompts, weights=a - b)
    return found, percentiles(sums, np.full(n, float(samples)), rng), 0.3 * gain


def share(rng: Rng, n: int, p: float) -> Measured:
    """A rate of independent trials."""
    hits = rng.random(n) < p
    return rate(hits), percentiles(hits.astype(float), np.ones(n), rng), p


def clustered_share(rng: Rng, n: int, samples: int, p: float) -> Measured:
    """A rate with several replies to each of n prompts, which differ in how easy they are."""
    prompts = np.repeat(np.arange(n), samples)
    hits = rng.random(len(prompts)) < np.repeat(rng.beta(2 * p, 2 * (1 - p), n), samples)
    sums = np.bincount(prompts, weights=hits)
    return rate_by_document(hits, prompts), percentiles(sums, np.full(n, float(samples)), rng), p


def separation(rng: Rng, n: int, m: int, truth: float, sparse: bool) -> Measured:
    """AUROC; sparse scores are 0 for about half of the negatives."""
    shift = float(np.sqrt(2) * norm.ppf(truth))
    up, down = rng.normal(shift, 1, n), rng.normal(0, 1, m)
    if sparse:
        up, down, truth = np.maximum(up, 0.0), np.maximum(down, 0.0), rectified(shift)
    won = np.sign(up[:, None] - down) / 2 + 0.5
    rows = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    columns = rng.multinomial(m, np.full(m, 1 / m), RESAMPLES) / m
    low, high = np.quantile(((rows @ won) * columns).sum(axis=1), [0.025, 0.975])
    found = auroc_interval(np.concatenate([up, down]), np.arange(n + m) < n)
    return found, (float(low), float(high)), truth


@cache
def rectified(shift: float, least: float = 0.0) -> float:
    """AUROC of N(shift, 1) over N(0, 1), both raised to at least `least`, by the trapezoid rule."""
    x = np.linspace(least, least + shift + 10, 20_001)
    above = np.trapezoid(norm.pdf(x - shift) * norm.cdf(x), x)
    return float(above + norm.cdf(least - shift) * norm.cdf(least) / 2)


def correlated(rng: Rng, n: int, each: int, truth: float) -> Measured:
    """A correlation, such as of simulated and true activations, with `each` values of n documents."""
    documents = np.repeat(np.arange(n), each)
    x, e = rng.normal(0, 0.7**0.5, (2, n * each)) + rng.normal(0, 0.3**0.5, (2, n))[:, documents]
    y = truth * x + (1 - truth**2) ** 0.5 * e
    found = correlation_by_document(x, y, documents.tolist())
    assert found is not None
    sums = np.stack([np.bincount(documents, c) for c in (x * 0 + 1, x, y, x * x, y * y, x * y)])
    k, a, b, aa, bb, ab = sums @ rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).T
    r = (ab / k - a * b / k**2) / np.sqrt((aa / k - (a / k) ** 2) * (bb / k - (b / k) ** 2))
    low, high = np.quantile(r, [0.025, 0.975])
    return found, (float(low), float(high)), truth


WINDOWS: dict[str, Callable[[int], list[int]]] = {
    **{f"documents × {each}": lambda n, each=each: [each] * n for each in (1, 2, 3, 4, 5)},
    "documents × 2, three × 8": lambda n: [8] * 3 + [2] * (n - 3),
    "documents × 1 to 5": lambda n: [1 + i % 5 for i in range(n)],
    "documents, one of half": lambda n: [n] + [1] * (n - 1),
    "documents, one of a third": lambda n: [n // 2] + [1] * (n - 1),
}
"""Windows in each of n documents."""
LABELS = {
    "mixed": (0.5, False),
    "one kind": (0.5, True),
    "mixed 30 %": (0.3, False),
    "one kind 30 %": (0.3, True),
}
"""Share of positives, and whether all windows of a document are of one kind."""


def separated(
    rng: Rng, n: int, windows: str, truth: float, scores: str, common: float, labels: str
) -> Measured:
    """AUROC of windows of n documents, of whose scores a share `common` of the variance is the document's.

    Scores are normal, "tied" at the lowest for four in five negatives, so that the truth is another, or
    exponential.
    """
    documents = np.repeat(np.arange(n), WINDOWS[windows](n))
    share_positive, whole = LABELS[labels]
    positive = np.zeros(len(documents), dtype=bool)
    while not 1 < positive.sum() < len(positive) - 1:
        positive = rng.random(len(documents)) < share_positive
        if whole:
            positive = (rng.permutation(n) < round(share_positive * n))[documents]
    level = common**0.5 * rng.normal(size=n)[documents]
    level += (1 - common) ** 0.5 * rng.normal(size=len(documents))
    shift = float(np.sqrt(2) * norm.ppf(truth))
    if scores == "exponential":
        level = -norm.logsf(level) * np.where(positive, truth / (1 - truth), 1.0)
    else:
        level += shift * positive
    if scores == "tied":
        level, truth = np.maximum(level, 0.8), rectified(shift, 0.8)
    return auroc_by_document(level, positive, documents.tolist()), None, truth


def aurocs() -> Iterator[tuple[str, int, str, str, float, str]]:
    """AUROC by document: cases by which its interval was chosen, and others by which it was then measured."""
    for n, windows, scores in product(
        (12, 24, 50),
        (f"documents{w}" for w in (" × 1", " × 4", " × 2, three × 8", ", one of half")),
        ("normal", "tied"),
    ):
        yield "chosen", n, windows, scores, 0.5, "mixed"
    for n, each, labels in ((12, 2, "one kind"), (30, 2, "one kind"), (30, 4, "mixed"), (60, 1, "mixed")):
        yield "chosen", n, f"documents × {each}", "normal", 0.3, labels
    others = (f"documents{w}" for w in (" × 2", " × 3", " × 5", " × 1 to 5", ", one of a third"))
    for i, (n, windows) in enumerate(product((16, 30, 80), others)):
        scores = ("exponential", "tied", "normal")[i % 3]
        yield "kept back", n, windows, scores, (0.0, 0.8, 0.4)[i // 2 % 3], list(LABELS)[(i + 2) % 4]


def difference_of_rates(rng: Rng, n: int, m: int, p: float, q: float) -> Measured:
    return risk_difference(rng.random(n) < p, rng.random(m) < q), None, p - q


def seeds(rng: Rng, n: int) -> Measured:
    return mean_of_runs(rng.normal(1, 0.1, n)), None, 1.0


def judges(rng: Rng, n: int, people: int, truth: float, what: str) -> Measured:
    """Agreement on n things. Each person sees the right one of three values with the chance √truth, and
    otherwise draws one by the same frequencies, so that kappa and alpha are `truth`."""
    often = np.array([0.5, 0.3, 0.2])
    right, drawn = rng.choice(3, n, p=often), rng.choice(3, (people, n), p=often)
    said = np.where(rng.random((people, n)) < truth**0.5, right, drawn)
    found = agreement([(str(u), str(p), str(said[p, u])) for p in range(people) for u in range(n)])
    assert found is not None and found.krippendorff is not None
    same = (said[0] == said[1]).astype(np.float64)
    if what == "alpha":
        return found.krippendorff, None, truth
    if what == "kappa":
        kappa = found.cohen["0", "1"]
        assert kappa is not None
        return kappa, None, truth
    plain = percentiles(same, np.ones(n), rng) if people == 2 else None
    return found.percent, plain, float(truth + (1 - truth) * np.square(often).sum())


def label_score(rng: Rng, n: int, each: int, tpr: float, tnr: float) -> Measured:
    """Balanced accuracy of a judge (MOVER): `each` windows of n documents of either kind."""

    def windows(rate_: float, kind: str) -> tuple[list[Window], list[bool]]:
        chance = np.repeat(rng.beta(4 * rate_, 4 * (1 - rate_), n), each)
        fires = np.ones(1, dtype=np.float32)
        made = [Window(f"{kind}{i // each}", i, 0, (0,), ("a",), fires) for i in range(n * each)]
        return made, (rng.random(n * each) < chance).tolist()

    positives, hits = windows(tpr, "p")
    negatives, rejected = windows(tnr, "n")
    evidence = Evidence(0, (), (), tuple(positives), tuple(negatives))
    answers = [*hits, *(not right for right in rejected)]
    found = classified("detection", "judge", evidence, answers, 0).value
    assert found is not None
    return found, None, (tpr + tnr) / 2


def share_of_tokens(rng: Rng, n: int, what: str, count: int) -> Measured:
    """Purity, completeness or AUROC of latents of `count` concepts in n documents, which differ in all."""
    document = np.repeat(np.arange(n), tokens(rng, n).astype(int))
    by_document = Tokens(document)
    some: list[Share] = []
    for _ in range(count):
        often, finds, errs = (rng.beta(a, b, n)[document] for a, b in ((2, 8), (8, 2), (1, 19)))
        label = rng.random(len(document)) < often
        fires = rng.random(len(document)) < np.where(label, finds, errs)
        if what == "auroc":
            level = 0.5 * rng.normal(size=n)[document] + rng.normal(size=len(document))
            some.append(by_document.auroc(1.5 * label + level, label))
        else:
            some.append(by_document.ratio(fires & label, label if what == "completeness" else fires))
    truth = float(norm.cdf(1.5 / 2.5**0.5)) if what == "auroc" else 0.8
    return mean_of(some, n), None, truth


def labelled(rng: Rng, n: int) -> tuple[list[Document], Pooled, SAE]:
    """Means of n documents with two labels of two values, the second louder, and one of three; the latents
    hold about half of what a label adds."""
    documents = [
        Document.of_text(
            str(rng.integers(2**62)),
            labels={"job": "ab"[i % 2], "sex": "cd"[i // 2 % 2], "topic": "efg"[i // 4 % 3]},
        )
        for i in range(n)
    ]
    raw, codes = 0.8 * rng.normal(size=(n, D_IN)), np.zeros((n, 2 * D_IN))
    for row, document in enumerate(documents):
        for place, (name, yes, size) in enumerate((("job", "b", 1.0), ("sex", "d", 2.0))):
            up = document.labels[name] == yes
            raw[row, place] += size if up else -size
            codes[row, place if up else D_IN + place] = size * rng.beta(4, 4)
        topic = 2 + "efg".index(document.labels["topic"])
        raw[row, topic] += 2.0
        codes[row, topic] = 2 * rng.beta(4, 4)
    sae = build(SAEConfig("relu", D_IN, 2 * D_IN, site="layers.0.resid_post"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]))
        sae.W_enc.copy_(sae.W_dec.T)
    fired = (codes > 0).sum(axis=0).astype(np.float64)
    pooled = Pooled(raw, {"sae": csr_array(codes)}, {"sae": fired}, np.ones(n, dtype=np.int64))
    return documents, pooled, sae.requires_grad_(False)


SUITES = {"SCR": (scr, "scr_metric_threshold_2"), "TPP": (tpp, "tpp_threshold_2_total_metric")}
"""By name a suite that is repeated with five seeds, and one of its metrics."""


def suite(rng: Rng, name: str, n: int) -> Interval:
    """One number of n documents."""
    documents, pooled, sae = labelled(rng, n)
    run, metric = SUITES[name]
    return run(pooled, {"sae": sae}, (), documents, int(rng.integers(2**31)), thresholds=(2,)).rows["sae"][
        metric
    ]


@cache
def on_average(name: str, n: int) -> float:
    """What it is on average over 400 sets of n documents."""
    rng = np.random.default_rng(2)
    return float(np.mean([suite(rng, name, n).value for _ in range(400)]))


def dictionaries(rng: Rng, n: int) -> list[torch.Tensor]:
    """n decoders (24, 12) with common directions, each with as much noise of its own as its seed had luck."""
    common = np.random.default_rng(0).normal(size=(24, 12))
    return [
        torch.from_numpy(common + rng.gamma(4, 0.12) * rng.normal(size=common.shape)).float()
        for _ in range(n)
    ]


@cache
def similar() -> float:
    """What PW-MCC is on average, of 1,500 pairs of their own."""
    rng = np.random.default_rng(1)
    return float(np.mean([similarity(*dictionaries(rng, 2), "pw_mcc") for _ in range(1500)]))


def stable(rng: Rng, n: int) -> Measured:
    return over_seeds(dictionaries(rng, n), "pw_mcc"), None, similar()


INTERVALS: dict[str, Callable[[Rng], Measured]] = {
    **{
        f"mean, {skew}, {n} documents": lambda rng, n=n, skew=skew: mean_of_documents(rng, n, skew)
        for skew, n in (("normal", 20), ("gamma", 20), ("gamma", 50), ("exponential", 30))
    },
    **{f"mean per token, {n} documents": lambda rng, n=n: per_token(rng, n) for n in (20, 30, 100)},
    **{f"loss recovered, {n} documents": lambda rng, n=n: recovered(rng, n) for n in (20, 100)},
    **{f"FVU, {n} documents": lambda rng, n=n: unexplained(rng, n) for n in (20, 30, 100)},
    **{f"paired means, {n} documents": lambda rng, n=n: paired_means(rng, n) for n in (20, 50)},
    "paired rates, 60 prompts, −.15": lambda rng: paired_share(rng, 60, 1, 0.5),
    "paired rates, 200 prompts, −.06": lambda rng: paired_share(rng, 200, 1, 0.2),
    "paired rates, 30 prompts × 4, −.15": lambda rng: paired_share(rng, 30, 4, 0.5),
    **{
        f"rate {p:g}, {n} trials": lambda rng, n=n, p=p: share(rng, n, p)
        for n, p in ((30, 0.3), (200, 0.02), (200, 0.97), (1000, 0.005))
    },
    **{
        f"rate {p:g}, {n} prompts × 4": lambda rng, n=n, p=p: clustered_share(rng, n, 4, p)
        for n, p in ((25, 0.3), (60, 0.05), (60, 0.95))
    },
    **{
        f"auroc {truth:g}, {n} + {m}{', sparse' * sparse}": (
            lambda rng, n=n, m=m, truth=truth, sparse=sparse: separation(rng, n, m, truth, sparse)
        )
        for truth, n, m, sparse in (
            (0.5, 20, 20, False), (0.7, 20, 30, False), (0.9, 30, 30, False), (0.97, 30, 30, False),
            (0.7, 30, 30, True), (0.9, 40, 60, True),
        )
    },
    **{
        f"correlation {truth:g}, {n} documents × {each}": (
            lambda rng, n=n, each=each, truth=truth: correlated(rng, n, each, truth)
        )
        for truth, n, each in ((0.5, 20, 5), (0.5, 30, 1), (0.8, 30, 5), (0.5, 100, 5))
    },
    **{
        f"auroc by document, {kept}: {truth:g}, {n} {windows}, {scores}, {common:g} common, {labels}": (
            lambda rng, n=n, windows=windows, truth=truth, scores=scores, common=common, labels=labels: (
                separated(rng, n, windows, truth, scores, common, labels)
            )
        )
        for kept, n, windows, scores, common, labels in aurocs()
        for truth in (0.5, 0.7, 0.9, 0.97)
    },
    "risk difference .3 − .1, 40 + 60": lambda rng: difference_of_rates(rng, 40, 60, 0.3, 0.1),
    "risk difference .95 − .02, 30 + 30": lambda rng: difference_of_rates(rng, 30, 30, 0.95, 0.02),
    **{
        f"agreement, {what}, {n} things, {people} people, {truth:g}": (
            lambda rng, what=what, n=n, people=people, truth=truth: judges(rng, n, people, truth, what)
        )
        for what in ("percent", "kappa", "alpha")
        for n, people, truth in ((30, 2, 0.9), (30, 3, 0.6), (100, 3, 0.6))
    },
    **{
        f"label score, {n} documents × {each}, {tpr:g} and {tnr:g}": (
            lambda rng, n=n, each=each, tpr=tpr, tnr=tnr: label_score(rng, n, each, tpr, tnr)
        )
        for n, each, tpr, tnr in ((25, 2, 0.8, 0.7), (50, 1, 0.95, 0.9))
    },
    **{
        f"concepts, {what}, {n} documents, mean of {count}": (
            lambda rng, what=what, n=n, count=count: share_of_tokens(rng, n, what, count)
        )
        for what in ("purity", "completeness", "auroc")
        for n, count in ((15, 1), (30, 4), (100, 1))
    },
    **{
        f"{name} of five seeds, {n} documents": (
            lambda rng, name=name, n=n: (suite(rng, name, n), None, on_average(name, n))
        )
        for name, n in (("SCR", 400), ("TPP", 300))
    },
    **{f"PW-MCC of {n} seeds": lambda rng, n=n: stable(rng, n) for n in (3, 5)},
    **{f"mean of {n} seeds": lambda rng, n=n: seeds(rng, n) for n in (3, 5)},
}  # fmt: skip


def power(rng: Rng, runs: int) -> float:
    """How often a two-sided z-test of 200 and 150 trials sees the minimum detectable difference from .3."""
    delta = minimum_detectable_difference(200, 150, 0.3)
    assert delta is not None
    p, q = rng.binomial(200, 0.3, runs) / 200, rng.binomial(150, 0.3 + delta, runs) / 150
    pooled = (200 * p + 150 * q) / 350
    return float(
        (np.abs(p - q) > norm.ppf(0.975) * np.sqrt(pooled * (1 - pooled) * (1 / 200 + 1 / 150))).mean()
    )


def rows(runs: int, only: str = "") -> Iterator[dict[str, Any]]:
    """What was measured, one line at a time; every line has random numbers of its own."""
    for name, alarm in TESTS.items():
        if only in name:
            rng = np.random.default_rng([1, *name.encode()])
            yield line(f"false alarms: {name}", sum(alarm(rng) for _ in range(runs)), runs)
    for name, draw in INTERVALS.items():
        if only in name:
            rng = np.random.default_rng([2, *name.encode()])
            found = [draw(rng) for _ in range(runs)]
            covered = sum(i.low <= truth <= i.high for i, _, truth in found)
            plain = [low <= truth <= high for _, p, truth in found if p for low, high in [p]]
            beside = {"percentile": sum(plain) / runs} if plain else {}
            yield line(f"coverage: {name}", covered, runs) | beside
    if only in "power":
        seen = power(np.random.default_rng(3), 100 * runs)
        yield line("power: minimum detectable difference", round(seen * 100 * runs), 100 * runs)


def line(name: str, hits: int, runs: int) -> dict[str, Any]:
    low, high = wilson(hits, runs)
    return {"name": name, "value": hits / runs, "unit": "share", "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    for row in rows(given.runs, given.only):
        found.append(row)
        beside = f"   percentile bootstrap {row['percentile']:.3f}" if "percentile" in row else ""
        print(
            f"{row['name']:52} {row['value']:.3f}  ({row['low']:.3f} to {row['high']:.3f}){beside}",
            flush=True,
        )
    if given.out:
        from training import machine, versions

        work = {"runs": given.runs, "resamples": RESAMPLES}
        record = {
            "work": work,
            "machine": machine(),
            "versions": versions(sys.executable),
            "rows": found,
            "ratios": {},
        }
        given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
