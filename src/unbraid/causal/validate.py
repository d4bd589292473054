"""Does a latent cause the behaviour?  Its dose-response curve beside every control, on the same prompts.

All conditions share their random numbers reply by reply, so differences are due to the edits alone.
Whatever was chosen (latents, dose, contrast, keywords) must have been chosen on other prompts; `selection`
does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.causal.controls import (
    Contrast,
    clipped,
    keyword_guardrail,
    matched_latents,
    random_direction,
    reply_densities,
    subtracted,
)
from unbraid.causal.finding import Finding, Intervals, Match, Row
from unbraid.causal.measure import QUANTITIES, Measurement, Sampling, measure
from unbraid.causal.probes import Probe, probes_id
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.edits import Edit, Gate, Positions
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import paired_difference


@dataclass(frozen=True)
class ValidateConfig:
    """What is measured beside the baseline.

    A dose c removes c times the latents' own contribution; 1 is zeroing.
    """

    dose: float = 4.0
    """The reported dose, chosen on other prompts."""
    doses: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Doses of the dose-response curve; 1 and the reported dose are always part of it."""
    curve_on_benign: bool = True
    """Whether every dose of the curve is measured on the benign prompts, too, or the reported one alone."""
    control_doses: tuple[float, ...] = ()
    """Doses of the random controls; none means the reported dose alone."""
    random_latents: int = 3
    """Draws of random latents of matched frequency."""
    random_directions: int = 3
    """Draws of random directions of matched norm."""
    alphas: tuple[float, ...] = (0.5, 1.0)
    """Multiples of the difference of means that are subtracted."""
    clip_fractions: tuple[float, ...] = (0.0,)
    """Bars for clipping along it: 0 is the honest mean, 1 the bad mean."""
    positions: Positions = "reply"
    """Where all edits apply."""
    resamples: int = 2000
    """Bootstrap resamples of each interval."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""

    def __post_init__(self) -> None:
        if min((self.dose, *self.doses, *self.control_doses)) <= 0:
            raise UserError("every dose must be above 0; the baseline is measured anyway")
        if min(self.random_latents, self.random_directions) < 0:
            raise UserError("numbers of random draws must not be negative")

    @property
    def curve(self) -> tuple[float, ...]:
        """All doses of the latents, ascending."""
        return tuple(sorted({1.0, self.dose, *self.doses}))


@dataclass(frozen=True, eq=False)
class _Condition:
    name: str
    kind: str
    settings: dict[str, Any]
    edits: tuple[Edit, ...]


@dataclass(frozen=True, eq=False)
class Validation:
    """A finding, and the replies that it rests on."""

    finding: Finding
    """The result."""
    measurements: dict[str, tuple[Measurement, ...]]
    """By the name of its row what was measured on the probes and on the benign ones."""


def dose_edit(
    sae: SAE, latents: Sequence[int], dose: float, *, site: Site, positions: Positions = "reply"
) -> Edit:
    """The Edit that removes `dose` times the latents' own contribution: x − dose · Σ z d."""
    name = f"latents {', '.join(str(latent) for latent in latents)} × {dose:g}"
    return sae.latent_edit(latents, "scale", 1.0 - dose, site=site, positions=positions, name=name)


def validate(
    lm: LanguageModel,
    sae: SAE,
    latents: Sequence[int],
    probes: Sequence[Probe],
    benign: Sequence[Probe] = (),
    config: ValidateConfig | None = None,
    *,
    sae_id: str,
    site: Site | None = None,
    gate: Gate | None = None,
    extra: Sequence[Edit] = (),
    contrast: Contrast | None = None,
    keywords: Sequence[str] = (),
    densities: NDArray[np.float64] | None = None,
    splits: dict[str, str] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Validation:
    """Measure what editing `latents` together does to `probes` and to `benign` ones, beside the controls.

    `contrast` adds the difference-of-means controls and `keywords` the filter; both must come from other
    prompts, as must the latents and the dose (`splits` records which).  `densities` (d_sae,) are firing
    frequencies for matching random latents; measured on the baseline's replies where not given.  `gate`
    decides for every edit alike which replies it acts on, and `extra` adds edits as rows of their own.

    Raises UserError when no probe has an incident expression or a latent does not exist.
    """
    config = config or ValidateConfig()
    site = site or sae.site
    _check(sae, latents, probes)
    run = _Run(lm, probes, benign, config, gate)
    main = _latent_conditions(sae, latents, site, config)
    main += [_Condition(edit.name, "extra", {}, (edit,)) for edit in extra]
    controls = [] if contrast is None else _contrast_conditions(contrast, config)
    total = (
        1
        + len(main)
        + len(controls)
        + (config.random_latents + config.random_directions) * len(config.control_doses or (config.dose,))
    )
    run.progress, run.total = progress, total
    run.add(_Condition("baseline", "baseline", {}, ()))
    for condition in main:
        run.add(condition)
    if densities is None and config.random_latents:
        on_probes, on_benign = run.measured["baseline"]
        by_id = {probe.id: probe for probe in (*probes, *benign)}
        densities = reply_densities(
            sae,
            lm,
            [by_id[name] for name in (*on_probes.probe_ids, *on_benign.probe_ids)],
            [*on_probes.texts, *on_benign.texts],
            site,
        )
    for condition in (*_random_conditions(sae, latents, site, densities, config), *controls):
        run.add(condition)
    rows = [run.row(condition) for condition in run.conditions]
    if keywords:
        rows.append(_keyword_row(run, tuple(keywords)))
    reported = next(row for row in rows if row.kind == "latents" and row.settings["dose"] == config.dose)
    finding = Finding(
        latents=tuple(latents),
        site=str(site),
        dose=config.dose,
        edit=replace(
            dose_edit(sae, latents, config.dose, site=site, positions=config.positions), gate=gate
        ).to_json(),
        rows=tuple(rows),
        matches=_matches(run, reported, rows),
        n_probes=len(probes),
        n_benign=len(benign),
        probes_id=probes_id(probes),
        benign_id=probes_id(benign) if benign else "",
        model_id=lm.id,
        sae_id=sae_id,
        config=asdict(config),
        seed=config.sampling.seed,
        splits=dict(splits or {}),
        command=command,
    )
    return Validation(finding, run.measured)


def _check(sae: SAE, latents: Sequence[int], probes: Sequence[Probe]) -> None:
    if not latents:
        raise UserError("name at least one latent to validate")
    for latent in latents:
        if not 0 <= latent < sae.config.d_sae:
            raise UserError(
                f"latent {latent} does not exist; this SAE has latents 0 to {sae.config.d_sae - 1}"
            )
    if len(set(latents)) < len(latents):
        raise UserError("a latent is named twice; name each latent once")
    if not any(probe.incident is not None for probe in probes):
        raise UserError("no probe has the field incident, so there is nothing to measure; add it to the file")


def _latent_conditions(
    sae: SAE, latents: Sequence[int], site: Site, config: ValidateConfig
) -> list[_Condition]:
    return [
        _Condition(
            f"latents × {dose:g}",
            "latents",
            {"latents": list(latents), "dose": dose},
            (dose_edit(sae, latents, dose, site=site, positions=config.positions),),
        )
        for dose in config.curve
    ]


def _random_conditions(
    sae: SAE,
    latents: Sequence[int],
    site: Site,
    densities: NDArray[np.float64] | None,
    config: ValidateConfig,
) -> list[_Condition]:
    seed, conditions = config.sampling.seed, list[_Condition]()
    drawn: list[tuple[int, ...]] = []
    if config.random_latents and densities is not None:
        drawn = matched_latents(densities, latents, draws=config.random_latents, seed=seed)
    for dose in config.control_doses or (config.dose,):
        for draw, others in enumerate(drawn):
            edit = dose_edit(sae, others, dose, site=site, positions=config.positions)
            settings: dict[str, Any] = {"latents": list(others), "dose": dose, "draw": draw}
            name = f"random latents {draw + 1} × {dose:g}"
            conditions.append(_Condition(name, "random latents", settings, (replace(edit, name=name),)))
        for draw in range(config.random_directions):
            edit = dose_edit(sae, latents, dose, site=site, positions=config.positions)
            name = f"random direction {draw + 1} × {dose:g}"
            turned = replace(random_direction(edit, seed=seed * 1000 + draw), name=name)
            conditions.append(_Condition(name, "random direction", {"dose": dose, "draw": draw}, (turned,)))
    return conditions


def _contrast_conditions(contrast: Contrast, config: ValidateConfig) -> list[_Condition]:
    documents = {"bad": contrast.documents[0], "honest": contrast.documents[1]}
    conditions: list[_Condition] = []
    for alpha in config.alphas:
        edit = subtracted(contrast, alpha, positions=config.positions)
        conditions.append(_Condition(edit.name, "subtracted", {"alpha": alpha, **documents}, (edit,)))
    for fraction in config.clip_fractions:
        edit = clipped(contrast, fraction, positions=config.positions)
        settings = {"fraction": fraction, "bar": edit.value, **documents}
        conditions.append(_Condition(edit.name, "clipped", settings, (edit,)))
    return conditions


class _Run:
    """Measures conditions on the probes and the benign ones and turns them into rows."""

    def __init__(
        self,
        lm: LanguageModel,
        probes: Sequence[Probe],
        benign: Sequence[Probe],
        config: ValidateConfig,
        gate: Gate | None,
    ) -> None:
        self.lm, self.probes, self.benign, self.config, self.gate = lm, probes, benign, config, gate
        self.conditions: list[_Condition] = []
        self.measured: dict[str, tuple[Measurement, ...]] = {}
        self.progress: Progress | None = None
        self.total = 0

    def add(self, condition: _Condition) -> None:
        self.conditions.append(condition)
        edits = tuple(replace(edit, gate=self.gate) for edit in condition.edits)
        on_curve = condition.kind == "latents" and condition.settings["dose"] != self.config.dose
        benign = () if on_curve and not self.config.curve_on_benign else self.benign
        self.measured[condition.name] = tuple(
            measure(self.lm, probes, edits, self.config.sampling) for probes in (self.probes, benign)
        )
        if self.progress is not None:
            self.progress(len(self.conditions), self.total, condition.name)

    def row(self, condition: _Condition) -> Row:
        on_probes, on_benign = self.measured[condition.name]
        return self.describe(condition.name, condition.kind, condition.settings, on_probes, on_benign)

    def describe(
        self,
        name: str,
        kind: str,
        settings: dict[str, Any],
        on_probes: Measurement,
        on_benign: Measurement,
    ) -> Row:
        base_probes, base_benign = self.measured["baseline"]
        return Row(
            name=name,
            kind=kind,
            settings=settings,
            probes=self._rates(on_probes),
            benign=self._rates(on_benign),
            probes_change=self._changes(on_probes, base_probes),
            benign_change=self._changes(on_benign, base_benign),
            applied=on_probes.applied,
            applied_benign=on_benign.applied,
        )

    def _rates(self, measured: Measurement) -> Intervals:
        return {q: measured.rate(q) for q in QUANTITIES}

    def _changes(self, measured: Measurement, baseline: Measurement) -> Intervals:
        if not measured.probe_ids:
            return dict.fromkeys(QUANTITIES)
        seed, resamples = self.config.sampling.seed, self.config.resamples
        return {q: measured.change_from(baseline, q, seed=seed, resamples=resamples) for q in QUANTITIES}


def _keyword_row(run: _Run, words: tuple[str, ...]) -> Row:
    """What would be left if every baseline reply that contains a keyword were held back."""
    filtered: list[Measurement] = []
    held: list[int] = []
    for measured in run.measured["baseline"]:
        blocked = keyword_guardrail(measured.texts, words)
        held.append(int(blocked.sum()))
        # A held-back reply does no harm, keeps nothing and helps nobody; to the user it is a refusal.
        outcomes = {
            q: np.where(np.isnan(v) | ~blocked, v, 1.0 if q == "refused" else 0.0)
            for q, v in measured.outcomes.items()
        }
        filtered.append(replace(measured, outcomes=outcomes))
    settings = {"words": list(words), "held_back": held[0], "held_back_benign": held[1]}
    return run.describe("keyword filter", "keywords", settings, filtered[0], filtered[1])


def _matches(run: _Run, reported: Row, rows: Sequence[Row]) -> tuple[Match, ...]:
    ours = run.measured[reported.name][0]
    asked = ~np.isnan(ours.outcomes["incident"])
    found: list[Match] = []
    for kind in ("random latents", "random direction", "subtracted", "clipped"):
        family = [row for row in rows if row.kind == kind]
        if not family:
            continue
        nearest = min(family, key=lambda row: abs(row.cost - reported.cost))
        theirs = run.measured[nearest.name][0]
        found.append(
            Match(
                kind=kind,
                control=nearest.name,
                cost=reported.cost,
                control_cost=nearest.cost,
                incident_difference=paired_difference(
                    ours.outcomes["incident"][asked],
                    theirs.outcomes["incident"][asked],
                    np.array(ours.probe_ids)[asked],
                    seed=run.config.sampling.seed,
                    resamples=run.config.resamples,
                ),
            )
        )
    return tuple(found)
