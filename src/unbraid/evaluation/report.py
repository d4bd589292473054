"""Evaluations side by side, as rows for a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbraid.evaluation.definitions import Definition, require_same
from unbraid.evaluation.evaluate import DEFINITIONS, Evaluation
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True)
class Row:
    """One metric of several subjects."""

    metric: str
    """Its name."""
    definition: Definition
    """What it is."""
    cells: tuple[Interval | str, ...]
    """Its value for each subject, or why there is none; empty where it does not apply."""


def table(found: Sequence[tuple[str, Evaluation]]) -> tuple[list[str], list[Row]]:
    """The subjects' names, each autoencoder followed by its references, and a row for every metric.

    Raises UserError when two evaluations define a metric differently.
    """
    require_same([(name, one.definitions) for name, one in found])
    subjects: list[str] = []
    columns: list[dict[str, Interval | str]] = []
    for name, one in found:
        subjects += [name, *one.references]
        columns.append({**one.undefined, **one.metrics})
        for metrics in one.references.values():
            columns.append(dict[str, Interval | str](metrics))
    metrics = [name for name in DEFINITIONS if any(name in column for column in columns)]
    return subjects, [
        Row(name, DEFINITIONS[name], tuple(column.get(name, "") for column in columns)) for name in metrics
    ]
