"""index, find and validate from the command line, on a tiny model and an untrained SAE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unbraid.cli import main
from unbraid.features.page import Index
from unbraid.model.load import load_model
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build

WORDS = ["storm", "onions", "tablets", "refund", "ball", "doctor", "water", "order", "pan", "dose"]


@pytest.fixture(scope="module")
def sae(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = load_model(tiny_llama)
    sae = build(SAEConfig("topk", lm.d_in, 64, k=8, site="layers.1.resid_post", model_id=lm.id))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        directions = torch.randn(64, lm.d_in, generator=generator)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    folder = tmp_path_factory.mktemp("sae") / "sae"
    sae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    pairs = [f"{a} and {b}" for a in WORDS for b in WORDS]
    texts = {
        "text": [f"I would like the {pair}." for pair in pairs],
        "positive": [f"The girl said: {pair}!" for pair in pairs[:60]],
        "negative": [f"def add(x): {pair}" for pair in pairs[:60]],
    }
    for name, lines in texts.items():
        (folder / name).with_suffix(".txt").write_text("\n\n".join(lines))
    return {name: folder / f"{name}.txt" for name in texts}


@pytest.fixture(scope="module")
def index(
    tiny_llama: Path, sae: Path, corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("index") / "index"
    words = ["index", "--sae", str(sae), "--model", str(tiny_llama), "--text", str(corpus["text"])]
    assert main([*words, "--tokens", "300", "--out", str(out)]) == 0
    return out


def test_index_counts_what_it_was_told_to(index: Path) -> None:
    opened = Index(index)
    assert 300 <= opened.n_tokens < 400 and opened.d_sae == 64
    assert opened.manifest.inputs.keys() >= {"sae", "model", "tokenizer", "documents"}


def test_find_needs_the_index_alone(
    index: Path, corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["find", "--index", str(index), "--positive", str(corpus["positive"])]
    out = tmp_path / "search"
    assert main([*words, "--negative", str(corpus["negative"]), "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["latents"][0]["holds"] and result["searched"] == 64
    assert json.loads((out / "result.json").read_text()) == result
    assert main([*words, "--negative", str(corpus["negative"])]) == 0
    assert "latents pass" in capsys.readouterr().out


def test_find_says_so_when_nothing_separates(
    tiny_llama: Path, sae: Path, corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus["text"].read_text().split("\n\n")
    for name, part in (("even", lines[::2]), ("odd", lines[1::2])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    words = ["find", "--sae", str(sae), "--model", str(tiny_llama), "--positive", str(tmp_path / "even.txt")]
    assert main([*words, "--negative", str(tmp_path / "odd.txt")]) == 0
    assert "No latent separates the two sets" in capsys.readouterr().out.replace("\n", " ")


def test_find_without_a_place_to_search_is_refused(
    corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["find", "--positive", str(corpus["positive"]), "--negative", str(corpus["negative"])]
    assert main(words) == 2
    assert "--index DIR, or --sae DIR with --model M" in capsys.readouterr().err


def test_validate_measures_and_writes_a_finding(
    tiny_llama: Path, sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = tmp_path / "probes.jsonl"
    records = [{"text": f"What about {a}?", "incident": "[aeiou]", "keep": "^."} for a in WORDS * 2]
    probes.write_text("".join(json.dumps({**r, "id": str(i)}) + "\n" for i, r in enumerate(records)))
    out = tmp_path / "finding"
    words = ["validate", "--sae", str(sae), "--latent", "3", "--latent", "5", "--model", str(tiny_llama)]
    words += ["--prompts", str(probes), "--doses", "1", "2", "--max-new-tokens", "4", "--random-latents", "1"]
    words += ["--random-directions", "1", "--most-cost", "2", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    finding = json.loads(capsys.readouterr().out)
    assert finding["latents"] == [3, 5] and finding["dose"] in (1.0, 2.0)
    assert 0 < finding["n_probes"] < len(records) and finding["splits"].keys() == {"choose"}
    assert json.loads((out / "finding.json").read_text()) == finding
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 0


def test_what_was_made_verifies(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(index.parent), "--json"]) == 0
    assert [artifact["kind"] for artifact in json.loads(capsys.readouterr().out)["artifacts"]] == ["index"]
