"""What a latent was split into, planted: each latent fires on chosen tokens, wherever they stand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from unbraid.cli import main
from unbraid.features.page import Index
from unbraid.features.structure import Structure
from unbraid.features.structure_contained import contained
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.stats.bootstrap import wilson

SITE = "layers.0.resid_pre"  # the embedding alone: what fires at a token depends on the token
TEXTS = [
    " ".join(np.random.default_rng(n).choice(list("abcdefghij"), 30, p=[0.2, 0.2, *[0.075] * 8]).tolist())
    for n in range(20)
]
# Letters that each latent fires on; "*" is every token but those of j.
NARROW = ["abc", "d", "*", "ef"]
WIDE = ["a", "b", "cg", "d", "e", "f", "ab", "", "abcdefghi"]


@pytest.fixture(scope="module")
def tokens(lm: LanguageModel) -> list[str]:
    """Each counted token of the corpus, as text."""
    return [lm.tokenizer.decode([i]).strip() for text in TEXTS for i in lm.tokenizer(text)["input_ids"]]


def _sae(lm: LanguageModel, fires: list[str]) -> SAE:
    ids = sorted({i for text in TEXTS for i in lm.tokenizer(text)["input_ids"]})
    letters = [lm.tokenizer.decode([i]).strip() for i in ids]
    embedding = lm.model.get_input_embeddings().weight[ids].detach().double()
    assert len(ids) < embedding.shape[1]  # so that any pattern over them is a direction
    wanted = torch.tensor([[float(_fires(on, letter)) for on in fires] for letter in letters])
    sae = build(SAEConfig("relu", lm.d_in, len(fires), site=SITE, model_id=lm.id))
    with torch.no_grad():
        sae.W_enc.copy_((torch.linalg.pinv(embedding) @ wanted.double()).float())
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
        sae.W_dec.copy_(torch.eye(len(fires), lm.d_in))
    return sae


def _fires(on: str, letter: str) -> bool:
    return letter != "j" if on == "*" else letter != "" and letter in on


@pytest.fixture(scope="module")
def folder(lm: LanguageModel, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes narrow, wide, and sampled: the wide one that kept some tokens alone."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    (folder / "other.txt").write_text("\n\n".join(TEXTS[1:]))
    for name, fires in (("narrow", NARROW), ("wide", WIDE)):
        _sae(lm, fires).save_pretrained(folder / f"{name}-sae")
    for out, sae, text, more in (
        ("narrow", "narrow", "text", []),
        ("wide", "wide", "text", []),
        ("sampled", "wide", "text", ["--coactive-entries", "400"]),
        ("other", "wide", "other", []),
        ("seeded", "wide", "text", ["--seed", "5"]),
    ):
        words = ["index", "--sae", str(folder / f"{sae}-sae"), "--model", str(tiny_llama), *more]
        words += ["--text", str(folder / f"{text}.txt"), "--out", str(folder / out)]
        assert main(words) == 0
    return folder


def test_parts_are_those_that_were_planted(folder: Path, tokens: list[str]) -> None:
    narrow, wide = Index(folder / "narrow"), Index(folder / "wide")
    found, compared = contained(narrow, wide, bar=0.8, support=20, dense=0.7)
    assert compared == len(tokens) == narrow.n_tokens
    times = Counter(tokens)
    both = {
        (j, k): sum(n for t, n in times.items() if _fires(p, t) and _fires(c, t))
        for j, p in enumerate(NARROW)
        for k, c in enumerate(WIDE)
    }
    firings = [sum(n for t, n in times.items() if _fires(c, t)) for c in WIDE]
    assert min(firings[k] for k in range(7)) >= 20
    wanted = {0: {0, 1, 6}, 1: {3}, 3: {4, 5}}  # all lie in 2, which is dense; half of "cg" lies in 0
    assert {j: {part.child for part in parts} for j, parts in found.items()} == wanted
    for j, parts in found.items():
        assert [part.together for part in parts] == sorted((both[j, p.child] for p in parts), reverse=True)
        for part in parts:
            assert (part.together, part.firings) == (both[j, part.child], firings[part.child])
            assert part.own == sum(n for t, n in times.items() if _fires(NARROW[j], t))
            assert (part.low, part.high) == wilson(part.together, part.firings)
    loose, _ = contained(narrow, wide, bar=0.3, support=20, dense=1.0)
    assert {part.child for part in loose[0]} == {0, 1, 2, 6, 8} and len(loose[2]) == 8
    assert contained(narrow, wide, bar=0.8, support=10**6, dense=1.0) == ({}, len(tokens))


def test_where_one_kept_a_sample_the_tokens_of_both_are_compared(folder: Path, tokens: list[str]) -> None:
    narrow, sampled = Index(folder / "narrow"), Index(folder / "sampled")
    facts = sampled.manifest.facts["coactive"]
    assert not facts["exact"]
    found, compared = contained(narrow, sampled, bar=0.5, support=5, dense=0.7)
    assert compared == facts["tokens"] < len(tokens)
    assert {part.child for part in found[0]} >= {0, 1, 6} and {p.child for p in found[3]} == {4, 5}
    assert all(part.share == 1 and part.own <= compared for part in found[3])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("narrow", "other", "differ in documents"),
        ("narrow", "seeded", "differ in seed"),
        ("wide", "narrow", "no more than"),
    ],
)
def test_indexes_that_cannot_be_compared_are_refused(folder: Path, one: str, other: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        contained(Index(folder / one), Index(folder / other), bar=0.8, support=1, dense=1.0)


def test_the_structure_tells_the_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["structure", "--index", str(folder / "narrow"), "--dense", "0.7"]
    words += ["--wider-index", str(folder / "wide")]
    assert main([*words, "--out", str(tmp_path / "structure"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["contained"] == {"tokens": Index(folder / "narrow").n_tokens, "parts": 6, "split": 2}
    made = Structure(tmp_path / "structure")
    assert made.of(0).contained[0].child == 6 and made.of(2).contained == ()
    assert set(made.manifest.inputs) == {"index", "sae", "wider index"}
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    assert "latents with two parts or more there" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    assert main([*words, "--support", "0", "--out", str(tmp_path / "none")]) == 2
    assert "support be at least 1" in capsys.readouterr().err
