"""`unbraid practice concepts`: planted concepts in an autoencoder that never learned, and what is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from unbraid.activations.text import tokenise
from unbraid.cli import main
from unbraid.evaluation.baselines import untrained
from unbraid.evaluation.concepts import DEFINITIONS
from unbraid.model.load import LanguageModel, load_model
from unbraid.practice.assistant import folder
from unbraid.practice.corpus import conversations
from unbraid.practice.world import token_labels
from unbraid.recipes.concepts import document
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model(folder())


@pytest.fixture(scope="module")
def sae(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random directions, the four largest of which fire."""
    config = SAEConfig("topk", lm.d_in, 64, 4, site="layers.1.resid_post", model_id=lm.id)
    out = tmp_path_factory.mktemp("sae") / "sae"
    random = untrained(build(config), torch.randn(64, lm.d_in, generator=torch.Generator().manual_seed(0)), 0)
    random.save_pretrained(out)
    return out


def test_concepts_of_tokens_are_those_that_the_world_knows(lm: LanguageModel) -> None:
    for conversation in islice(conversations("fit", seed=3, advice_share=0.5), 8):
        window = tokenise(lm, document(conversation), 512)
        assert document(conversation).labels["topic"] == conversation.topic
        assert len(window.concepts) == len(window.input_ids)
        rendered = lm.tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
        offsets = lm.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        for part, text in (("prompt", conversation.prompt), ("reply", conversation.reply)):
            start = rendered.index(text)
            inside = [i for i, (a, b) in enumerate(offsets) if start <= a and b <= start + len(text)]
            known = token_labels(
                conversation,
                part,  # type: ignore[arg-type]
                [(offsets[i][0] - start, offsets[i][1] - start) for i in inside],
            )
            for i, pairs in zip(inside, known, strict=True):
                named = {c for c, _ in pairs} | {f"{c}={v}" for c, v in pairs if v}
                assert named <= window.concepts[i], (conversation.id, i)


def test_the_table_and_the_json_say_the_same(
    sae: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    words = ["practice", "concepts", "--sae", str(sae), "--conversations", "90"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    floors = {"untrained", "random directions", "neurons", "PCA", "predict none"}
    assert set(found["rows"]) == {"sae", "DiffMean", "linear probe"} | floors
    assert set(found["rows"]["sae"]) <= set(DEFINITIONS) and found["site"] == "layers.1.resid_post"
    rows = found["details"]["concepts"]["sae"]
    assert {"drug", "dosage", "topic=medical advice"} & {row["concept"] for row in rows}
    assert main(words) == 0
    table = capsys.readouterr().out
    for row in rows:
        (line,) = [part for part in table.splitlines() if part.startswith(f"│ {row['concept']} ")]
        assert f" {row['latent']} " in line and f"{row['metrics']['completeness']['value']:.2f} (" in line


def test_what_cannot_be_measured_is_refused(sae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["practice", "concepts", "--sae", str(sae), "--conversations", "3"]) == 2
    assert "no concept stands in 10 of the 3 documents" in capsys.readouterr().err
    assert main(["practice", "concepts", "--sae", str(sae), "--conversations", "0"]) == 2
    assert "--conversations must be 1 or more" in capsys.readouterr().err
