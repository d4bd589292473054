"""Evidence: train and test share no document and no window, and negatives were looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.labels import model_scorers
from unbraid.features.labels.contexts import SHARES, ContextConfig, Contexts, Evidence, Window
from unbraid.features.labels.judges import LexicalJudge
from unbraid.features.labels.labelling import label_latents
from unbraid.features.labels.model_scorers import (
    DIVERGENCE,
    UNRELATED,
    adding,
    intervention,
    strength_for,
    surprisal,
)
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.model.apply import applied
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.stats.splits import split_of

SITE = "layers.1.resid_post"
WORDS = "storm onions tablets refund ball doctor water order pan dose".split()  # noqa: SIM905
CONFIG = ContextConfig(length=8, train=8, positives=10, negatives=10, neighbours=3, passages=60)


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = build(SAEConfig(architecture="topk", d_in=lm.d_in, d_sae=64, k=3, site=SITE, model_id=lm.id))
    with torch.no_grad():
        directions = torch.randn(64, lm.d_in, generator=generator)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture(scope="module")
def index(sae: SAE, lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Hundred texts, each of them twice under another name."""
    texts = [f"I would like the {a} and then the {b}, {b} and {a}, if you can." for a in WORDS for b in WORDS]
    documents = [Document.of_text(text, id=f"{copy} {i}") for copy in "ab" for i, text in enumerate(texts)]
    out = tmp_path_factory.mktemp("indexes") / "index"
    return build_index(sae, lm, documents, IndexConfig(context=24), out, sae_id="an autoencoder")


@pytest.fixture(scope="module")
def contexts(index: Index, sae: SAE, lm: LanguageModel) -> Contexts:
    return Contexts(index, sae, lm, CONFIG)


@pytest.fixture(scope="module")
def found(contexts: Contexts, index: Index) -> list[Evidence]:
    busy = np.argsort(-index.densities, kind="stable")
    return contexts.evidence([int(j) for j in busy[2:40:4]])


def _all(one: Evidence) -> dict[str, tuple[Window, ...]]:
    return {
        "train": (*one.train, *one.train_negatives),
        "test": (*one.positives, *one.negatives),
    }


def test_train_and_test_share_no_document_and_no_tokens(found: list[Evidence]) -> None:
    seen = 0
    for one in found:
        train, test = _all(one)["train"], _all(one)["test"]
        assert not {w.document for w in train} & {w.document for w in test}
        assert not {w.tokens for w in train} & {w.tokens for w in test}
        every = [(w.passage, w.start) for w in (*train, *test)]
        assert len(set(every)) == len(every)  # no window twice, in whatever role
        assert all(w.start % CONFIG.length == 0 and len(w.tokens) <= CONFIG.length for w in (*train, *test))
        for split, windows in _all(one).items():
            assert all(split_of(w.document, SHARES) == split for w in windows)
        seen += len(train) * len(test)
    assert seen > 0


def test_a_text_under_two_names_is_one_document(contexts: Contexts, index: Index) -> None:
    rows = index.query("SELECT passage, id FROM passages ORDER BY passage")
    read = contexts.passages.read([row["passage"] for row in rows], [0])
    by_name: dict[str, set[str]] = {}
    for row in rows:
        by_name.setdefault(row["id"].split()[1], set()).add(read[row["passage"]].document)
    assert all(len(documents) == 1 for documents in by_name.values()) and len(by_name) == 100


def test_activations_are_those_of_the_model_over_the_whole_window(
    found: list[Evidence], index: Index, sae: SAE, lm: LanguageModel
) -> None:
    checked = {"fires": 0, "silent": 0, "hard": 0}
    for one in found:
        for window in (*_all(one)["train"], *_all(one)["test"]):
            tokens = index.query("SELECT tokens FROM passages WHERE passage = ?", [window.passage])[0][
                "tokens"
            ]
            ids = torch.tensor([tokens])
            x = read_sites(lm, ids, torch.ones_like(ids), [sae.site])[sae.site][0]
            with torch.no_grad():
                codes = sae.encode_dense(x)[:, one.latent].numpy()
            codes[np.isin(tokens, [lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id])] = 0
            rows = slice(window.start, window.start + len(window.tokens))
            assert tuple(tokens[rows]) == window.tokens
            np.testing.assert_allclose(window.activations, codes[rows], rtol=1e-3, atol=1e-4)
            fires = window in one.train or window in one.positives
            assert (codes[rows].max() > 0) == fires
            checked["fires" if fires else "silent"] += 1
            checked["hard"] += window.hard
    assert min(checked.values()) > 0, checked


def test_hard_negatives_are_where_neighbours_fire(found: list[Evidence], index: Index, sae: SAE) -> None:
    rows = sae.W_dec.detach()
    for one in found:
        near = (rows @ rows[one.latent]).topk(CONFIG.neighbours + 1).indices.tolist()
        near.remove(one.latent)
        marks = ",".join("?" * len(near))
        places = index.query(f"SELECT passage, position FROM examples WHERE latent IN ({marks})", near)
        allowed = {(p["passage"], p["position"] // CONFIG.length * CONFIG.length) for p in places}
        assert all((w.passage, w.start) in allowed for w in one.negatives if w.hard)


def test_too_few_windows_are_told_with_their_numbers(contexts: Contexts, index: Index) -> None:
    rare = int(np.flatnonzero(index.densities == index.densities[index.densities > 0].min())[0])
    (one,) = contexts.evidence([rare])
    assert len(one.positives) < 10
    assert f"{len(one.positives)} of 10 test positives" in one.notes


def test_the_same_seed_finds_the_same_evidence_in_whatever_company(contexts: Contexts) -> None:
    (alone,) = contexts.evidence([5])
    both = contexts.evidence([9, 5])[1]
    for split in ("train", "test"):
        assert [w.tokens for w in _all(alone)[split]] == [w.tokens for w in _all(both)[split]]


def test_labels_are_scored_and_stored(contexts: Contexts, index: Index, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    busy = np.argsort(-index.densities, kind="stable")[2:12].tolist()
    scorers = ("detection", "fuzzing", "simulation", "intruder", "embedding")
    results = list(label_latents(contexts, busy, LexicalJudge(), scorers, labels=labels))
    assert [one.latent for one in results] == busy
    for one in results:
        assert bool(one.explanation.text) != bool(one.explanation.why_not)
        if one.label is not None:
            assert labels.current([one.latent])[one.latent].text == one.explanation.text
            assert one.label.scores is not None and set(one.label.scores) == set(scorers)
            assert "no embedding model" in one.label.scores["embedding"]["why_not"]
    assert any(one.label for one in results)
    with pytest.raises(UserError, match="no scorer 'luck'"):
        list(label_latents(contexts, busy, LexicalJudge(), ("luck",)))
    with pytest.raises(UserError, match="latent 64 does not exist"):
        contexts.evidence([64])


def test_the_models_own_scorers(
    contexts: Contexts, lm: LanguageModel, sae: SAE, found: list[Evidence]
) -> None:
    one = next(e for e in found if e.positives and e.negatives)
    (said,) = surprisal(lm, [("the storm", one)])
    assert said.value is not None and 0 <= said.value.low <= said.value.value <= said.value.high <= 1
    (long,) = surprisal(lm, [("storm " * 400, one)])
    assert long.value is None and "context" in long.why_not
    (moved,) = intervention(lm, sae, sae.site, [("the storm", one)])
    # Steering changes how likely any words are: knowing nothing is worth what words that say nothing get.
    (nothing,) = intervention(lm, sae, sae.site, [(UNRELATED, one)])
    assert nothing.value is not None and nothing.value.value == pytest.approx(nothing.chance)
    assert moved.chance == nothing.chance != 0
    assert moved.value is not None and moved.details["strength"] > 0
    strength = strength_for(lm, sae, sae.site, one)
    assert strength == moved.details["strength"]
    # The divergence at that strength is the one that was asked for.
    kl: list[float] = []
    for window in one.negatives[:10]:
        ids = torch.tensor([window.tokens])
        clean = logits_and_sites(lm, ids, torch.ones_like(ids))[0][0].log_softmax(dim=-1)
        with applied(lm, [adding(sae, sae.site, one.latent, strength)]):
            steered = logits_and_sites(lm, ids, torch.ones_like(ids))[0][0].log_softmax(dim=-1)
        kl += (clean.exp() * (clean - steered)).sum(dim=-1).tolist()
    assert np.mean(kl) == pytest.approx(DIVERGENCE, rel=0.02)


def test_many_labels_of_a_latent_cost_its_texts_once(
    lm: LanguageModel, sae: SAE, found: list[Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [e for e in found if e.positives and e.negatives][:2]
    labels = [("the storm", some[0]), ("onions", some[1]), ("a pan", some[0])]
    alone = [surprisal(lm, [one])[0] for one in labels]
    assert [s.as_dict() for s in surprisal(lm, labels)] == [s.as_dict() for s in alone]
    alone = [intervention(lm, sae, sae.site, [one])[0] for one in labels]
    generated: list[int] = []

    def counted(lm: LanguageModel, prompts: Any, **rest: Any) -> Any:
        generated.append(len(prompts))
        return generate(lm, prompts, **rest)

    monkeypatch.setattr(model_scorers, "generate", counted)
    together = intervention(lm, sae, sae.site, labels)
    assert [s.as_dict() for s in together] == [s.as_dict() for s in alone]
    assert len(generated) == 4  # each of two latents, steered and not


def test_what_does_not_belong_together_is_refused(index: Index, lm: LanguageModel, sae: SAE) -> None:
    other = build(SAEConfig(architecture="topk", d_in=lm.d_in, d_sae=32, k=3, site=SITE))
    with pytest.raises(UserError, match="of 64 latents, the SAE has 32"):
        Contexts(index, other, lm)
    with pytest.raises(UserError, match="positives is 0"):
        ContextConfig(positives=0)
