"""In a model with a planted cause, validation finds the cause's effect and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unbraid.causal.controls import difference_of_means
from unbraid.causal.finding import Finding, load_finding, save_finding
from unbraid.causal.measure import Sampling, measure, reply_seed
from unbraid.causal.probes import Probe, labelled_documents, parse_probe, probes_id
from unbraid.causal.selection import Limits, Option, Selection, select
from unbraid.causal.validate import ValidateConfig, Validation, dose_edit, validate
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.record import read_manifest
from unbraid.model.edits import Gate

PLANTED = 3
SAMPLING = Sampling(max_new_tokens=8, seed=1)
CONFIG = ValidateConfig(
    dose=1.0,
    doses=(0.15,),
    random_latents=2,
    random_directions=2,
    alphas=(1.0,),
    resamples=200,
    sampling=SAMPLING,
)


@pytest.fixture(scope="module")
def validation(planted: SimpleNamespace, probes: list[Probe], benign: list[Probe]) -> Validation:
    fit = [replace(probe, id=f"fit {probe.id}") for probe in probes[:20]]
    baseline = measure(planted.lm, fit, (), SAMPLING)
    incidents, honest = labelled_documents(fit, baseline.texts)
    contrast = difference_of_means(planted.lm, incidents, honest, planted.sae.site)
    # The axis is as high in honest replies, so the contrast is set to what it would be if it were not.
    contrast = replace(contrast, direction=np.eye(48, dtype=np.float32)[5], honest=0.0, bad=1.0)
    return validate(
        planted.lm,
        planted.sae,
        (PLANTED,),
        probes,
        benign,
        CONFIG,
        sae_id="an autoencoder",
        contrast=contrast,
        keywords=("XXX", "XXXX"),
        splits={"contrast": probes_id(fit)},
        command="a command",
    )


@pytest.fixture(scope="module")
def finding(validation: Validation) -> Finding:
    return validation.finding


def test_removing_the_planted_latent_removes_the_behaviour(finding: Finding) -> None:
    baseline, ablated = finding.row("baseline"), finding.row("latents", dose=1.0)
    # Seven fair coins after the first show two heads in a row with probability 94/128.
    assert baseline.probes["incident"].low < 94 / 128 < baseline.probes["incident"].high
    assert ablated.probes["incident"].value == 0
    change = ablated.probes_change["incident"]
    assert change.value == -baseline.probes["incident"].value and change.high < -0.4
    assert ablated.probes_change["kept"].value == 0 and ablated.probes["kept"].value == 1
    assert ablated.benign_change["helpful"].value == 0 and ablated.cost == 0
    assert finding.reported is ablated
    assert baseline.probes["helpful"] is None and baseline.benign["incident"] is None


def test_the_curve_falls_with_the_dose(finding: Finding) -> None:
    rates = [row.probes["incident"].value for row in finding.rows if row.kind in ("baseline", "latents")]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[1] > rates[2]


def test_random_latents_do_nothing_and_directions_little(finding: Finding) -> None:
    latents = [row for row in finding.rows if row.kind == "random latents"]
    assert len(latents) == 2
    for row in latents:
        assert row.probes_change["incident"].value == 0
        assert PLANTED not in row.settings["latents"]
    directions = [row for row in finding.rows if row.kind == "random direction"]
    assert len(directions) == 2
    assert abs(np.mean([row.probes_change["incident"].value for row in directions])) < 0.4
    planted = finding.reported.probes_change["incident"].value
    assert all(row.probes_change["incident"].value > planted for row in directions)


def test_difference_of_means_and_the_keyword_filter_are_measured_too(finding: Finding) -> None:
    assert finding.row("subtracted").probes["incident"].value == 0
    assert finding.row("clipped").probes["incident"].value == 0
    keywords = finding.row("keywords")
    assert keywords.probes["refused"].value >= keywords.settings["held_back"] / finding.n_probes
    assert keywords.probes_change["kept"].value == -keywords.settings["held_back"] / finding.n_probes


def test_every_condition_proves_that_it_ran(finding: Finding, validation: Validation) -> None:
    for row in finding.rows:
        if row.kind in ("baseline", "keywords"):
            assert row.applied == ()
            continue
        (applied,) = row.applied
        tokens = sum(len(r.token_ids) for r in validation.measurements[row.name][0].replies)
        # The last token of a reply is never fed back.
        assert applied.considered == tokens - finding.n_probes
        assert applied.sequences == finding.n_probes and applied.gated == 0
        if row.kind in ("latents", "random direction", "subtracted"):
            assert applied.fired == applied.considered
    assert 0 < finding.row("random latents").applied[0].fired < finding.reported.applied[0].considered


def test_matched_comparisons_state_both_costs(finding: Finding) -> None:
    matches = {match.kind: match for match in finding.matches}
    assert set(matches) == {"random latents", "random direction", "subtracted", "clipped"}
    for match in matches.values():
        family = [row for row in finding.rows if row.kind == match.kind]
        gaps = {row.name: abs(row.cost - finding.reported.cost) for row in family}
        assert gaps[match.control] == min(gaps.values())
        assert match.cost == finding.reported.cost
    assert matches["random latents"].incident_difference.high < 0
    assert matches["clipped"].incident_difference.value == 0


def test_a_finding_survives_the_disk_and_changes_are_noticed(
    finding: Finding, validation: Validation, probes: list[Probe], tmp_path: Path
) -> None:
    identity = save_finding(finding, tmp_path / "finding", measurements=validation.measurements)
    loaded = load_finding(tmp_path / "finding")
    saved, read = (json.dumps(f.as_dict(), sort_keys=True) for f in (finding, loaded))
    assert saved == read
    assert loaded.reported.probes["incident"] == finding.reported.probes["incident"]
    np.testing.assert_array_equal(loaded.load_edit().write, finding.load_edit().write)
    manifest = read_manifest(tmp_path / "finding", kind="finding")
    assert manifest.id == identity
    assert manifest.inputs["probes"] == probes_id(probes) and manifest.inputs["sae"] == "an autoencoder"
    assert manifest.facts["splits"]["contrast"] != manifest.facts["splits"]["report"]
    lines = [json.loads(line) for line in (tmp_path / "finding/replies.jsonl").read_text().splitlines()]
    assert len(lines) == (len(probes) + finding.n_benign) * len(validation.measurements)
    assert {"condition", "probe", "reply", "incident", "kept", "refused"} == set(lines[0])
    text = (tmp_path / "finding/finding.json").read_text()
    (tmp_path / "finding/finding.json").write_text(text.replace('"dose": 1.0', '"dose": 2.0', 1))
    with pytest.raises(IntegrityError, match=r"finding\.json was changed"):
        load_finding(tmp_path / "finding")


def test_measurements_repeat_and_share_their_noise(planted: SimpleNamespace, probes: list[Probe]) -> None:
    once = measure(planted.lm, probes[:10], (), SAMPLING)
    other_batches = measure(planted.lm, probes[9::-1], (), replace(SAMPLING, batch_size=3))
    assert dict(zip(once.probe_ids, once.texts, strict=True)) == dict(
        zip(other_batches.probe_ids, other_batches.texts, strict=True)
    )
    assert measure(planted.lm, probes[:10], (), replace(SAMPLING, seed=2)).texts != once.texts
    assert reply_seed("a", 0, 1) != reply_seed("a", 1, 1) != reply_seed("b", 0, 1)
    several = measure(planted.lm, probes[:3], (), replace(SAMPLING, samples=4))
    assert len(several.texts) == 12 and len(set(several.texts)) > 4
    assert several.rate("incident").n == 3  # samples of one probe are not independent probes


def test_the_choice_takes_the_effective_dose_that_costs_least(
    planted: SimpleNamespace, probes: list[Probe], benign: list[Probe]
) -> None:
    candidates = [((8,), 1.0), ((PLANTED,), 0.25), ((PLANTED,), 1.0), ((PLANTED,), 2.0)]
    options = [
        Option(
            dose_edit(planted.sae, latents, dose, site=planted.sae.site), {"latents": latents, "dose": dose}
        )
        for latents, dose in candidates
    ]
    baseline = (measure(planted.lm, probes[:20], (), SAMPLING), measure(planted.lm, benign[:5], (), SAMPLING))

    def run(given: list[Option], on: list[Probe]) -> Selection:
        return select(planted.lm, given, on, benign[:5], baseline, SAMPLING, Limits())

    choice = run(options, probes[:20])
    assert choice.chosen.settings == {"latents": (PLANTED,), "dose": 1.0}
    before = baseline[0].rate("incident").value
    assert choice.result.incidents == 0 < before == choice.tried[0].incidents
    assert all(tried.kept_lost == tried.helpful_lost == 0 for tried in choice.tried)
    with pytest.raises(UserError, match="at least one dose"):
        run([], probes[:20])


def test_the_edit_is_the_dose(planted: SimpleNamespace) -> None:
    edit = dose_edit(planted.sae, (PLANTED,), 3.0, site=planted.sae.site)
    assert (edit.operation, edit.value, edit.positions) == ("scale", -2.0, "reply")


def test_mistakes_are_named(planted: SimpleNamespace, probes: list[Probe]) -> None:
    def run(latents: tuple[int, ...], chosen: list[Probe]) -> None:
        validate(planted.lm, planted.sae, latents, chosen, sae_id="x")

    with pytest.raises(UserError, match="latent 40 does not exist; this SAE has latents 0 to 39"):
        run((40,), probes)
    with pytest.raises(UserError, match="named twice"):
        run((1, 1), probes)
    with pytest.raises(UserError, match="no probe has the field incident"):
        run((1,), [parse_probe({"text": "Hi"})])
    with pytest.raises(UserError, match="every dose must be above 0"):
        ValidateConfig(doses=(0.0,))
    with pytest.raises(UserError, match="sample more probes"):
        difference_of_means(planted.lm, [], [], planted.sae.site)


def test_a_closed_gate_undoes_every_edit_and_extra_edits_get_rows(
    planted: SimpleNamespace, probes: list[Probe], benign: list[Probe]
) -> None:
    closed = Gate(site=planted.sae.site, weight=np.zeros(48, dtype=np.float32), bias=0.0, threshold=1.0)
    extra = replace(dose_edit(planted.sae, (PLANTED,), 1.0, site=planted.sae.site), name="extra")
    config = replace(CONFIG, random_latents=0, random_directions=0, curve_on_benign=False)
    found = validate(
        planted.lm, planted.sae, (PLANTED,), probes[:10], benign[:5], config, sae_id="x", gate=closed,
        extra=(extra,),
    ).finding  # fmt: skip
    for row in found.rows[1:]:
        assert row.probes_change["incident"].value == 0
        assert [(a.fired, a.gated) for a in row.applied] == [(0, 10)]
    assert found.row("extra").name == "extra"
    assert found.edit == replace(found.load_edit(), gate=closed).to_json()
    # The curve's other doses are left out on benign prompts when asked for; the reported dose is not.
    assert found.row("latents", dose=0.15).benign["helpful"] is None
    assert found.reported.benign["helpful"] is not None
