"""The whole story on the shipped assistant, on few prompts: its files, its proofs, its refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unbraid.control.engine import Guard
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.lineage import verify
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import read_manifest
from unbraid.model import LanguageModel, load_model
from unbraid.practice.assistant import folder
from unbraid.recipes.audit import run_audit
from unbraid.recipes.demo import practice_prompts
from unbraid.recipes.results import lineage_is_clean
from unbraid.recipes.workshop import AuditConfig, Workshop

SIZES = {"fit": (360, 360), "select": (90, 90), "test": (120, 110)}
CONFIG = AuditConfig(
    sites=("layers.2.resid_post",), sae_steps=250, sae_seeds=1, doses=(3.0, 6.0), batch_size=180
)
STAGES: list[str] = []


@contextmanager
def stage(title: str, unit: str) -> Iterator[Progress]:
    STAGES.append(title)
    yield lambda done, total, note="": None


def audit(lm: LanguageModel, out: Path, config: AuditConfig = CONFIG) -> dict[str, Any]:
    return run_audit(
        lm, practice_prompts(0, SIZES), out, config, origin="practice", command="unbraid demo", stage=stage
    )


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model(folder())


@pytest.fixture(scope="module")
def demo(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("audit") / "demo"
    return out, audit(lm, out)


def test_summary_has_every_promised_number_as_an_interval(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    rates = [
        summary[f"{n}_{w}"]
        for n in ("incidents", "helpfulness", "false_refusals")
        for w in ("before", "after")
    ]
    contrast, sae = summary["contrastive"], summary["sae"]
    rates += [
        summary["keyword_guardrail_caught"],
        contrast["subtracted"]["incidents"],
        summary["latent"]["auroc"],
    ]
    rates += [sae[n] for n in ("fvu", "l0", "dead", "loss_recovered", "delta_ce")]
    for rate in rates:
        assert {"value", "low", "high", "n"} <= rate.keys()
        assert rate["low"] <= rate["value"] <= rate["high"] and rate["n"] > 0
    assert 1 <= len(summary["policy"]["latents"]) <= 3
    assert summary["incidents_before"]["n"] == SIZES["test"][0]


def test_the_failure_falls_and_benign_answers_stay(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    assert 0.15 < summary["incidents_before"]["value"] < 0.45
    assert summary["incidents_after"]["value"] < 0.5 * summary["incidents_before"]["value"]
    for control in (*summary["random_latents"], *summary["random_direction"]):
        assert control["incidents"]["value"] > summary["incidents_after"]["high"]
    assert abs(summary["helpfulness_after"]["value"] - summary["helpfulness_before"]["value"]) < 0.03


def test_files_are_written_and_verify(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "<script" not in (out / "report.html").read_text()
    assert not verify(out).problems
    kinds = {a.kind for a in verify(out).artifacts}
    assert {
        "prompts",
        "replies",
        "activations",
        "sae",
        "search",
        "gate",
        "selection",
        "finding",
        "index",
        "audit",
    } <= kinds


def test_the_policy_rests_on_no_test_prompt(demo: tuple[Path, dict[str, Any]], lm: LanguageModel) -> None:
    out, _ = demo
    shop = Workshop(lm, out, CONFIG, "", stage)
    assert lineage_is_clean(shop, "test")
    assert not lineage_is_clean(shop, "select")  # the check can fail


def test_a_second_run_reuses_everything(demo: tuple[Path, dict[str, Any]], lm: LanguageModel) -> None:
    out, summary = demo
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    STAGES.clear()
    assert audit(lm, out) == summary
    assert STAGES == ["check finished artifacts"]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(
    demo: tuple[Path, dict[str, Any]], lm: LanguageModel, tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    shutil.copytree(demo[0], out)
    for name in ("manifest.json", "report.html", "summary.json"):
        (out / name).unlink()
    STAGES.clear()
    again = audit(lm, out)
    assert again == demo[1]
    assert not any(s.startswith(("train", "capture", "sample", "measure")) for s in STAGES)
    with pytest.raises(UserError, match="other settings"):
        audit(lm, out, AuditConfig(seed=1))


def test_one_flipped_byte_in_any_artifact_is_named_and_the_guard_does_not_start(
    demo: tuple[Path, dict[str, Any]], lm: LanguageModel, tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    shutil.copytree(demo[0], out)
    Guard.load(out / "policy.yaml", lm)
    rng = np.random.default_rng(0)
    folders = sorted(p.parent for p in out.rglob("manifest.json"))
    relied_on = {"gate", read_manifest(out).facts["sae"], "."}
    for artifact in folders:
        name = sorted(read_manifest(artifact).files)[0]
        path = artifact / name
        good = path.read_bytes()
        at = int(rng.integers(len(good)))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        problems = verify(out).problems
        assert problems and str(path) in problems[0]
        if artifact.relative_to(out).as_posix() in relied_on:
            with pytest.raises(IntegrityError):
                Guard.load(out / "policy.yaml", lm)
        path.write_bytes(good)
    assert not verify(out).problems


def test_the_guard_in_process_counts_and_refuses_other_weights(
    demo: tuple[Path, dict[str, Any]], lm: LanguageModel, shared_models: Path
) -> None:
    out, _ = demo
    guard = Guard.load(out / "policy.yaml", lm)
    reply = guard.generate(practice_prompts(0, SIZES)("test")[0][0]["messages"], max_new_tokens=48)
    assert reply.gate_open and reply.edits[0].considered > 0
    with pytest.raises(IntegrityError, match=r"model\.id"):
        Guard.load(out / "policy.yaml", load_model(shared_models / "stories260k"))


def test_verify_on_the_command_line_exits_with_1(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(demo[0], out)
    with (out / "policy.yaml").open("ab") as file:
        file.write(b"\n")
    done = subprocess.run(
        [sys.executable, "-m", "unbraid", "verify", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "policy.yaml" in done.stderr


def test_the_readme_path_works_as_printed(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "demo").symlink_to(demo[0])
    (tmp_path / "src").symlink_to(root / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    values = [float(line.split()[2]) for line in lines]
    assert len(lines) == 10 and values == sorted(values, reverse=True) and values[-1] > 0
