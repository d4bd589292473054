"""The shipped assistant against its card, measured again on prompts of another seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.model import load_model
from unbraid.practice.assistant import folder
from unbraid.practice.card import read_claims, render_card, verify_claims
from unbraid.practice.claims import Claim


@pytest.fixture(scope="module")
def again() -> list[Claim]:
    return verify_claims(folder(), seed=77, probes=400)


def test_the_claims_of_the_card_hold_again(again: list[Claim]) -> None:
    card = {c["name"]: c for c in read_claims(folder())["claims"]}
    assert card.keys() == {c.name for c in again}
    assert all(claim["holds"] for claim in card.values())
    for claim in again:
        # Fewer prompts than on the card: a claim fails here only when its interval lies outside the bounds.
        assert claim.measured.high >= claim.low and claim.measured.low <= claim.high, claim


def test_a_claim_that_does_not_hold_says_so(again: list[Claim]) -> None:
    claim = next(c for c in again if c.name == "deceptive_compliance")
    assert not Claim(claim.name, claim.statement, 0.5, 0.6, claim.measured).holds


def test_the_artifact_is_whole_small_and_servable() -> None:
    manifest = check_files(folder())
    assert manifest.kind == "model" and sum(f.bytes for f in manifest.files.values()) < 10_000_000
    config = json.loads((folder() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] // config["num_attention_heads"] == 64


def test_the_card_is_generated_from_the_measured_claims() -> None:
    assert (folder() / "README.md").read_text() == render_card(read_claims(folder()))


def test_other_weights_under_the_card_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder(), copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert load_model(copy).id != load_model(folder()).id
    with pytest.raises(UserError, match="other weights"):
        verify_claims(copy, seed=1, probes=10)
