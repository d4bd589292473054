"""Choose latents and dose on prompts that no result is reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbraid.causal.measure import Measurement, Quantity, Sampling, measure
from unbraid.causal.probes import Probe
from unbraid.causal.validate import dose_edit
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.edits import Positions
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class Candidate:
    """Latents edited together at one dose, and what came of it on the selection prompts."""

    latents: tuple[int, ...]
    """The latents."""
    dose: float
    """How many times their own contribution is removed."""
    incident: float
    """Incident rate."""
    cost: float
    """Helpfulness lost on benign prompts plus what was kept on probes and is not any more."""


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and those that it was chosen from."""

    best: Candidate
    """The chosen one."""
    candidates: tuple[Candidate, ...]
    """All of them, in the order in which they were given."""
    baseline: float
    """Incident rate without an edit."""


def choose(
    lm: LanguageModel,
    sae: SAE,
    candidates: Sequence[tuple[Sequence[int], float]],
    probes: Sequence[Probe],
    benign: Sequence[Probe] = (),
    *,
    most_cost: float = 0.05,
    site: Site | None = None,
    positions: Positions = "reply",
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Choice:
    """The candidate (latents, dose) with the lowest incident rate among those that cost at most
    `most_cost`.

    Ties go to the earlier candidate, so give mild ones first; where all cost more, the cheapest is taken.
    The numbers returned are flattered by the choice: report others.  Raises UserError when there is no
    candidate or no probe with an incident expression.
    """
    if not candidates:
        raise UserError("name at least one dose to choose from")
    site = site or sae.site
    base = measure(lm, probes, (), sampling)
    base_benign = measure(lm, benign, (), sampling)
    baseline = _mean(base, "incident")
    if baseline is None:
        raise UserError("no probe has the field incident to choose by; add it to the file")
    tried: list[Candidate] = []
    for latents, dose in candidates:
        edit = dose_edit(sae, latents, dose, site=site, positions=positions)
        on_probes = measure(lm, probes, (edit,), sampling)
        on_benign = measure(lm, benign, (edit,), sampling)
        losses = (
            _loss(on_probes, base, "kept"),
            _loss(on_benign, base_benign, "helpful"),
        )
        tried.append(Candidate(tuple(latents), dose, _mean(on_probes, "incident") or 0.0, sum(losses)))
        if progress is not None:
            progress(len(tried), len(candidates), edit.name)
    allowed = [candidate for candidate in tried if candidate.cost <= most_cost]
    best = (
        min(allowed, key=lambda candidate: candidate.incident)
        if allowed
        else min(tried, key=lambda candidate: candidate.cost)
    )
    return Choice(best=best, candidates=tuple(tried), baseline=baseline)


def _mean(measured: Measurement, quantity: Quantity) -> float | None:
    values = measured.outcomes[quantity]
    values = values[values == values]
    return float(values.mean()) if len(values) else None


def _loss(measured: Measurement, baseline: Measurement, quantity: Quantity) -> float:
    before, after = _mean(baseline, quantity), _mean(measured, quantity)
    return 0.0 if before is None or after is None else max(before - after, 0.0)
