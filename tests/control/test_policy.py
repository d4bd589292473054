"""Policies: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.control.policy import Policy, PolicyEdit, PolicyModel, PolicySAE, Title, write_policy
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.sae.base import SAE

GOOD: dict[str, Any] = {
    "policy": {"name": "no-dosage", "version": 2},
    "model": {"name": "practice", "id": "1" * 64, "tokenizer_id": "2" * 64},
    "sae": {"path": "../sae", "id": "3" * 64, "site": "layers.2.resid_post"},
    "edits": [
        {"latents": [711, 402], "operation": "scale", "value": -3, "positions": "reply"},
        {"latents": [5], "operation": "ablate"},
    ],
    "gate": {"path": "../gate", "id": "4" * 64},
    "mode": "shadow",
    "on_failure": "open",
    "findings": ["5" * 64],
    "latency_budget_ms": 250,
}

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
words = st.text(min_size=1, max_size=30)


@st.composite
def policy_edits(draw: st.DrawFn) -> PolicyEdit:
    latents = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True))
    n = len(latents)
    operation = draw(st.sampled_from(["clamp", "scale", "add", "ablate"]))
    each = st.lists(numbers, min_size=n, max_size=n).map(tuple)
    value = None if operation == "ablate" else draw(numbers | each)
    return PolicyEdit(
        latents=tuple(latents),
        operation=operation,
        value=value,
        thresholds=draw(st.none() | each),
        positions=draw(st.sampled_from(["reply", "prompt", "all"])),
    )


@settings(deadline=None, max_examples=25)
@given(
    name=words,
    refusal=words,
    findings=st.lists(words, max_size=2).map(tuple),
    edits=st.lists(policy_edits(), min_size=1, max_size=3).map(tuple),
    budget=st.none() | st.floats(0.5, 1e6),
    mode=st.sampled_from(["enforce", "shadow"]),
)
def test_save_then_load_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    refusal: str,
    findings: tuple[str, ...],
    edits: tuple[PolicyEdit, ...],
    budget: float | None,
    mode: Any,
) -> None:
    policy = Policy(
        policy=Title(name, 3),
        model=PolicyModel(name, "1e5", "0123"),
        sae=PolicySAE("../sae", "null", "layers.2.resid_post"),
        edits=edits,
        mode=mode,
        refusal=refusal,
        findings=findings,
        latency_budget_ms=budget,
    )
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.save(path)
    again = Policy.load(path)
    assert again == policy
    assert again.id == policy.id


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "a\u2028b", "a\nb", "\n", "\u2029", "\ufeff", "\x7f", " a "]
)
def test_every_kind_of_line_end_is_kept(tmp_path: Path, text: str) -> None:
    edit = PolicyEdit(latents=(1,), operation="ablate")
    sae = PolicySAE("../sae", "null", "layers.2.resid_post")
    policy = Policy(Title("p", 1), PolicyModel("m", "1", "2"), sae, edits=(edit,), refusal=text)
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy


def test_the_file_explains_itself(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    Policy.from_dict(GOOD).save(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Policy")
    keys = list(yaml.safe_load(text))
    for key in keys:
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("# "), key
    assert "latents: [711, 402]" in text


def test_a_name_cannot_break_out_of_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    data = copy.deepcopy(GOOD)
    data["policy"]["name"] = "x\nmode: enforce\u2028mode: enforce"
    Policy.from_dict(data).save(path)
    assert Policy.load(path).mode == "shadow"


def change(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place: Any = data
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("modee", "enforce", r"modee is not a known key; did you mean mode\?"),
        ("edits.0.latent", [1], r"edits\[0\]\.latent is not a known key; did you mean latents\?"),
        ("sae.zzz", 1, r"sae\.zzz is not a known key; known are path, id, site"),
        ("sae.id", ..., r"sae\.id is missing"),
        ("sae", {"path": "x", "idd": "y"}, r"sae\.idd is not a known key; did you mean id\?"),
        ("edits", [], "edits is empty"),
        ("edits.0.latents", [], r"edits\[0\]\.latents is empty"),
        ("edits.0.latents", [4, 4], r"edits\[0\]\.latents names a latent twice"),
        ("edits.0.latents", [-1, 2], r"edits\[0\]\.latents\[0\]"),
        ("edits.0.latents", [1.5, 2], r"edits\[0\]\.latents\[0\]"),
        ("edits.0.latents", [True, 2], r"edits\[0\]\.latents\[0\]"),
        ("edits.0.operation", "explode", r"edits\[0\]\.operation: .*clamp"),
        ("edits.0.value", ..., r"edits\[0\]\.value is missing; scale needs a number"),
        ("edits.0.value", float("nan"), r"edits\[0\]\.value"),
        ("edits.0.value", float("inf"), r"edits\[0\]\.value"),
        ("edits.0.value", "3", r"edits\[0\]\.value"),
        ("edits.0.value", [1, 2, 3], r"edits\[0\]\.value has 3 numbers for 2 latents"),
        ("edits.0.thresholds", [1.0], r"edits\[0\]\.thresholds has 1 numbers for 2 latents"),
        ("edits.1.value", 1.0, r"edits\[1\]\.value has no meaning for ablate"),
        ("edits.0.positions", "everywhere", r"edits\[0\]\.positions"),
        ("sae.site", "layers.two.resid_post", r"sae\.site"),
        ("mode", "canary", "mode: "),
        ("on_failure", "ajar", "on_failure: "),
        ("latency_budget_ms", 0, "latency_budget_ms: "),
        ("policy.version", "2", r"policy\.version: "),
        ("model.name", "", r"model\.name: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, path: str, value: Any, said: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(change(path, value)), encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        Policy.load(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mode: enforce\nmode: shadow\n", "'mode' appears twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("{", "not valid YAML"),
        ("just words", "a policy is a mapping"),
        ("", "a policy is a mapping"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("2020-01-01: x\n", "not a known key"),
    ],
)
def test_files_that_are_no_policy(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Policy.load(file)


def test_missing_folder_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such policy file"):
        Policy.load(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is a folder"):
        Policy.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        Policy.load(tmp_path / "binary.yaml")


def test_id_ignores_layout_but_not_content(tmp_path: Path) -> None:
    policy = Policy.from_dict(GOOD)
    shuffled = {key: GOOD[key] for key in reversed(GOOD)}
    assert Policy.from_dict(shuffled).id == policy.id
    assert Policy.from_dict(change("edits.0.value", -3.0)).id == policy.id
    assert Policy.from_dict(change("edits.0.value", -3.5)).id != policy.id
    assert Policy.from_dict(change("sae.id", "6" * 64)).id != policy.id


def test_edits_are_those_that_the_sae_makes(world: Any) -> None:
    sae = SAE.from_pretrained(world.root / "sae")
    edits = (
        PolicyEdit(latents=(2, 9), operation="clamp", value=(1.0, -4.0), positions="all"),
        PolicyEdit(latents=(4,), operation="ablate", thresholds=(0.25,)),
    )
    policy = Policy(policy=Title("x"), model=world.policy.model, sae=world.policy.sae, edits=edits)
    first, second = policy.edits_for(sae)
    expected = sae.latent_edit([2, 9], "clamp", (1.0, -4.0), positions="all")
    assert first.to_json() == expected.to_json()
    np.testing.assert_array_equal(second.threshold, np.float32([0.25]))
    assert second.positions == "reply" and second.operation == "ablate"


def test_a_latent_that_the_sae_lacks_is_named(world: Any) -> None:
    sae = SAE.from_pretrained(world.root / "sae")
    edits = (PolicyEdit(latents=(24,), operation="ablate"),)
    policy = Policy(policy=Title("x"), model=world.policy.model, sae=world.policy.sae, edits=edits)
    with pytest.raises(UserError, match=r"edits\[0\]\.latents names latent 24"):
        policy.edits_for(sae)


def test_policy_artifact_names_its_inputs(tmp_path: Path) -> None:
    policy = Policy.from_dict(GOOD)
    manifest = write_policy(policy, tmp_path / "policy", command="unbraid demo")
    assert check_files(tmp_path / "policy") == manifest
    assert manifest.kind == "policy" and manifest.inputs["sae"] == "3" * 64
    assert manifest.inputs["gate"] == "4" * 64 and "5" * 64 in manifest.inputs.values()
    assert manifest.paths == {"sae": "../sae", "gate": "../gate"}
    assert manifest.facts["policy_id"] == policy.id
    with pytest.raises(UserError, match="exists already"):
        write_policy(policy, tmp_path / "policy")
