"""A Finding: a measured effect with its controls, intervals, seeds, splits and the command behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from unbraid.causal.measure import QUANTITIES, Applied, Measurement, Quantity
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.files import building, write_json, write_text
from unbraid.manifest.record import check_files, write_manifest
from unbraid.model.edits import Edit
from unbraid.stats.bootstrap import Interval

Intervals = dict[Quantity, Interval | None]


@dataclass(frozen=True)
class Row:
    """One condition: what was done and what came of it."""

    name: str
    """What was done, in words."""
    kind: str
    """baseline, latents, random latents, random direction, subtracted, clipped or keywords."""
    settings: dict[str, Any]
    """The numbers that make it this condition: latents, dose, draw, alpha, …"""
    probes: Intervals
    """Rates on the probes; None where no probe asks."""
    benign: Intervals
    """Rates on the benign probes."""
    probes_change: Intervals
    """Paired differences from the baseline on the probes."""
    benign_change: Intervals
    """Paired differences from the baseline on the benign probes."""
    applied: tuple[Applied, ...]
    """Proof that its edits ran on the probes."""
    applied_benign: tuple[Applied, ...]
    """The same on the benign probes."""

    @property
    def cost(self) -> float:
        """Off-target cost: helpfulness lost on benign probes plus what was kept on probes and is not any
        more.

        Gains do not make up for losses.
        """
        changes = (self.benign_change.get("helpful"), self.probes_change.get("kept"))
        return sum(max(-change.value, 0.0) for change in changes if change is not None)


@dataclass(frozen=True)
class Match:
    """The latents against the control of one family whose off-target cost is nearest to theirs.

    The control is chosen by its cost alone, never by what it does to the incidents.
    """

    kind: str
    """Family of the control."""
    control: str
    """Name of the row that was chosen from the family's grid."""
    cost: float
    """Off-target cost of the latents at the reported dose."""
    control_cost: float
    """Off-target cost of the control."""
    incident_difference: Interval | None
    """Incident rate under the latents' edit less that under the control, paired by reply."""


@dataclass(frozen=True)
class Finding:
    """What an edit of latents does, beside everything that it was compared with."""

    latents: tuple[int, ...]
    """The latents that were edited together."""
    site: str
    """Where."""
    dose: float
    """The reported dose: this many times the latents' own contribution is removed."""
    edit: dict[str, Any]
    """The Edit at that dose, as `Edit.to_json` gives it: what a policy may deploy."""
    rows: tuple[Row, ...]
    """All conditions, the baseline first."""
    matches: tuple[Match, ...]
    """Comparisons at matched off-target cost."""
    n_probes: int
    """Number of probes."""
    n_benign: int
    """Number of benign probes."""
    probes_id: str
    """Hash of the probes that all of this was measured on."""
    benign_id: str
    """Hash of the benign probes; empty where there were none."""
    model_id: str
    """Hash of the model's weights."""
    sae_id: str
    """Content id of the SAE."""
    config: dict[str, Any]
    """Doses, grids, seeds and sampling."""
    seed: int
    """Seed of the run."""
    splits: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    """Hash of the probes that each choice was made on, by what was chosen; disjoint from those reported."""
    command: str = ""
    """The command that repeats it."""

    def row(self, kind: str, **settings: Any) -> Row:
        """The first row of a kind whose settings agree with those given; KeyError when there is none."""
        for row in self.rows:
            if row.kind == kind and all(row.settings.get(key) == value for key, value in settings.items()):
                return row
        raise KeyError(f"no row of kind {kind} with {settings}")

    @property
    def reported(self) -> Row:
        """The latents' row at the reported dose."""
        return self.row("latents", dose=self.dose)

    def load_edit(self) -> Edit:
        """The Edit that was tested."""
        return Edit.from_json(self.edit)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def save_finding(
    finding: Finding,
    out: Path,
    *,
    measurements: Mapping[str, Sequence[Measurement]] | None = None,
    paths: Mapping[str, Path] | None = None,
) -> str:
    """Write the folder `out` with finding.json and, where given, every reply that it rests on; returns
    its id.

    `measurements` maps a row's name to its measurements.  Raises UserError when `out` exists.
    """
    with building(Path(out)) as folder:
        write_json(folder / "finding.json", finding.as_dict())
        if measurements is not None:
            write_text(folder / "replies.jsonl", "".join(_reply_lines(measurements)))
        manifest = write_manifest(
            folder,
            kind="finding",
            command=finding.command,
            seed=finding.seed,
            inputs={
                "model": finding.model_id,
                "sae": finding.sae_id,
                "probes": finding.probes_id,
                **({"benign": finding.benign_id} if finding.benign_id else {}),
            },
            facts={
                "latents": list(finding.latents),
                "site": finding.site,
                "dose": finding.dose,
                "splits": {"report": finding.probes_id, **finding.splits},
            },
            paths=paths,
        )
    return manifest.id


def _reply_lines(measurements: Mapping[str, Sequence[Measurement]]) -> list[str]:
    lines: list[str] = []
    for condition, parts in measurements.items():
        for part in parts:
            for row, (probe, reply) in enumerate(zip(part.probe_ids, part.replies, strict=True)):
                outcomes = {name: values[row] for name, values in part.outcomes.items()}
                judged = {name: bool(value) for name, value in outcomes.items() if not math.isnan(value)}
                record = {"condition": condition, "probe": probe, "reply": reply.text, **judged}
                lines.append(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
    return lines


def load_finding(folder: Path | str) -> Finding:
    """The Finding in a folder, its files checked against the manifest.

    Raises what `check_files` raises, and IntegrityError when finding.json does not hold a finding.
    """
    folder = Path(folder)
    check_files(folder)
    path = folder / "finding.json"
    try:
        record = cast(dict[str, Any], json.loads(path.read_bytes()))
        record["latents"] = tuple(record["latents"])
        record["rows"] = tuple(_row(row) for row in record["rows"])
        record["matches"] = tuple(_match(match) for match in record["matches"])
        return Finding(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} holds no finding ({error}); measure it again") from error


def _row(record: dict[str, Any]) -> Row:
    for name in ("probes", "benign", "probes_change", "benign_change"):
        record[name] = {quantity: _interval(record[name].get(quantity)) for quantity in QUANTITIES}
    for name in ("applied", "applied_benign"):
        record[name] = tuple(Applied(**count) for count in record[name])
    return Row(**record)


def _match(record: dict[str, Any]) -> Match:
    record["incident_difference"] = _interval(record["incident_difference"])
    return Match(**record)


def _interval(record: dict[str, Any] | None) -> Interval | None:
    return None if record is None else Interval(**record)
