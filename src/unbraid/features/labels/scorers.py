"""Scorers that ask a judge: detection, fuzzing, simulation and intruder, as delphi defines them.

Each takes many labels at once with the evidence about their latents, and looks at test windows alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from unbraid.features.labels.contexts import Evidence, Window
from unbraid.features.labels.judges import Judge, Shown
from unbraid.features.labels.scores import Score, classified, not_measured
from unbraid.stats.bootstrap import rate_by_document
from unbraid.stats.jackknife import correlation_by_document

Labelled = tuple[str, Evidence]
"""A label and the evidence about its latent."""
STRONG = 0.3
"""Share of an example's largest activation from which a token is marked."""
OTHERS = 4
"""Texts beside an intruder."""


def detection(judge: Judge, labelled: Sequence[Labelled], seed: int = 0) -> list[Score]:
    """Does the latent fire in this text?  Balanced accuracy on plain windows."""
    jobs = [
        (label, [Shown.of(w) for w in (*evidence.positives, *evidence.negatives)])
        for label, evidence in labelled
    ]
    answers = judge.holds(jobs)
    return [
        classified("detection", judge.name, evidence, found, seed)
        for (_, evidence), found in zip(labelled, answers, strict=True)
    ]


def fuzzing(judge: Judge, labelled: Sequence[Labelled], seed: int = 0) -> list[Score]:
    """Does the label fit the marked tokens?  Balanced accuracy; of positives the strong tokens are marked, of
    negatives as many as positives have on average, each window's drawn by itself."""
    jobs: list[tuple[str, list[Shown]]] = []
    for label, evidence in labelled:
        count = mean_active(evidence.positives)
        shown = [Shown.of(window, strong(window)) for window in evidence.positives]
        shown += [Shown.of(window, drawn(window, count, seed)) for window in evidence.negatives]
        jobs.append((label, shown))
    answers = judge.holds(jobs)
    return [
        classified("fuzzing", judge.name, evidence, found, seed)
        for (_, evidence), found in zip(labelled, answers, strict=True)
    ]


def simulation(judge: Judge, labelled: Sequence[Labelled], seed: int = 0) -> list[Score]:
    """How strongly does the latent fire at each token?  Pearson's correlation of what the judge expects with
    what it does, over all tokens of the test windows; an answer that could not be read expects nothing."""
    jobs = [
        (label, [Shown.of(w) for w in (*evidence.positives, *evidence.negatives)])
        for label, evidence in labelled
    ]
    scores: list[Score] = []
    for (_, evidence), found in zip(labelled, judge.simulate(jobs), strict=True):
        windows = (*evidence.positives, *evidence.negatives)
        if not evidence.positives:
            scores.append(
                not_measured("simulation", judge.name, 0.0, "it needs a window to fire on", evidence)
            )
            continue
        expected = [np.zeros(len(w.tokens)) if e is None else e for w, e in zip(windows, found, strict=True)]
        true = np.concatenate([w.activations for w in windows])
        documents = [w.document for w in windows for _ in w.tokens]
        value = correlation_by_document(np.concatenate(expected), true, documents)
        blank = not_measured("simulation", judge.name, 0.0, "", evidence)
        scores.append(
            Score(
                "simulation",
                judge.name,
                value,
                0.0,
                blank.positives,
                blank.negatives,
                blank.hard,
                sum(e is None for e in found),
                why_not="" if value else "the judge expects the same at every token",
            )
        )
    return scores


def intruder(judge: Judge, labelled: Sequence[Labelled], seed: int = 0) -> list[Score]:
    """Which text does not belong?  Share of sets in which the window where the latent is silent is found
    among four where it fires; uses no label, and says how alike the latent's windows are."""
    sets = [_sets(evidence, seed) for _, evidence in labelled]
    found = iter(judge.odd([[shown for shown, _ in one] for some in sets for one, _ in some]))
    scores: list[Score] = []
    for (_, evidence), some in zip(labelled, sets, strict=True):
        if not some:
            why = f"it needs {OTHERS} test windows on which the latent fires, and one on which it does not"
            scores.append(not_measured("intruder", judge.name, 1 / (OTHERS + 1), why, evidence))
            continue
        answers = [next(found) for _ in some]
        right = [a is not None and one[a][1] for a, (one, _) in zip(answers, some, strict=True)]
        value = rate_by_document(right, [document for _, document in some])
        blank = not_measured("intruder", judge.name, 0.0, "", evidence)
        scores.append(
            Score(
                "intruder",
                judge.name,
                value,
                1 / (OTHERS + 1),
                blank.positives,
                blank.negatives,
                blank.hard,
                sum(answer is None for answer in answers),
                {"sets": len(some)},
            )
        )
    return scores


JUDGED: Mapping[str, Callable[[Judge, Sequence[Labelled], int], list[Score]]] = {
    "detection": detection,
    "fuzzing": fuzzing,
    "simulation": simulation,
    "intruder": intruder,
}


def strong(window: Window) -> tuple[bool, ...]:
    """The tokens at 0.3 or more of the window's largest activation (T,)."""
    return tuple((window.activations >= STRONG * window.max).tolist())


def mean_active(windows: Sequence[Window]) -> int:
    """How many tokens of a window fire on average, rounded up; at least 1."""
    return max(1, math.ceil(np.mean([(w.activations > 0).sum() for w in windows]))) if windows else 1


def drawn(window: Window, count: int, seed: int) -> tuple[bool, ...]:
    """`count` tokens of a window, or all, drawn by the window's own place (T,); never special ones."""
    places = [place for place, piece in enumerate(window.pieces) if piece]
    chosen = _own_draw(window, seed).permutation(places)[:count]
    marks = np.zeros(len(window.pieces), dtype=bool)
    marks[chosen] = True
    return tuple(marks.tolist())


def _own_draw(window: Window, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{window.document}/{window.passage}/{window.start}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _sets(evidence: Evidence, seed: int) -> list[tuple[list[tuple[Shown, bool]], str]]:
    """Sets of four windows and an intruder, shuffled, and the intruder's document; each negative once."""
    if len(evidence.positives) < OTHERS:
        return []
    count = mean_active(evidence.positives)
    found: list[tuple[list[tuple[Shown, bool]], str]] = []
    for window in evidence.negatives:
        generator = _own_draw(window, seed)
        others: NDArray[np.int64] = generator.permutation(len(evidence.positives))[:OTHERS]
        one = [(Shown.of(p, strong(p)), False) for p in (evidence.positives[i] for i in others)]
        one.insert(int(generator.integers(OTHERS + 1)), (Shown.of(window, drawn(window, count, seed)), True))
        found.append((one, window.document))
    return found
