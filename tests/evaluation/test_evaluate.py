"""Evaluation against a plain, document-by-document computation, and on autoencoders made worse on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unbraid.activations.corpus import read_corpus
from unbraid.activations.documents import Document
from unbraid.activations.text import tokenise
from unbraid.evaluation import evaluate as evaluation
from unbraid.evaluation.evaluate import DEFINITIONS, Evaluation, evaluate, evaluate_all
from unbraid.evaluation.reading import _lead
from unbraid.evaluation.report import table
from unbraid.evaluation.scoring import plain
from unbraid.evaluation.stash import Stash
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.sae.registry import build

LAYER = 1


def _logits(
    lm: LanguageModel, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """One sequence through the model, the output of layer 1 changed by hand."""

    def hook(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        if change is None:
            return output
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    handle = lm.model.model.layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.model(input_ids=ids[None]).logits[0]
    handle.remove()
    return logits


def _by_hand(sae: SAE, lm: LanguageModel, documents: list[Document], positions: str) -> dict[str, float]:
    """The metrics by their definitions, one document at a time, everything kept."""
    windows = [tokenise(lm, document, 256) for document in documents]
    rows, kept = [], []
    for window in windows:
        ids = torch.tensor(window.input_ids)
        mask = ~torch.tensor(window.special_mask)
        if positions == "reply":
            mask &= torch.tensor(window.reply_mask)
        if not mask.any():
            continue
        with torch.no_grad():
            states = lm.model.model(input_ids=ids[None], output_hidden_states=True).hidden_states
        rows.append(states[LAYER + 1][0, mask])
        kept.append((ids, mask, ~torch.tensor(window.special_mask)))
    x = torch.cat(rows)
    mean = x.double().mean(dim=0).float()
    functions = {
        "clean": None,
        "sae": lambda h: sae(h).x_hat,
        "zero": torch.zeros_like,
        "mean": lambda h: mean.expand(h.shape),
    }
    ce: dict[str, list[torch.Tensor]] = {name: [] for name in functions}
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in functions}
    for ids, mask, ordinary in kept:
        scored = ordinary[:-1] & ordinary[1:]
        clean = None
        for name, function in functions.items():

            def change(
                h: torch.Tensor, function: object = function, mask: torch.Tensor = mask
            ) -> torch.Tensor:
                return torch.where(mask[None, :, None], function(h[0])[None], h)  # type: ignore[operator]

            logits = _logits(lm, ids, change if function else None)[:-1][scored].log_softmax(dim=-1)
            clean = logits if clean is None else clean
            ce[name].append(F.nll_loss(logits, ids[1:][scored], reduction="none"))
            kl[name].append((clean.exp() * (clean - logits)).sum(dim=-1))
    c = {name: float(torch.cat(values).double().mean()) for name, values in ce.items()}
    k = {name: float(torch.cat(values).double().mean()) for name, values in kl.items()}
    error = (x - sae(x).x_hat).double().square().sum(dim=1).mean()
    return {
        "fvu": float(error / (x.double() - x.double().mean(dim=0)).square().sum(dim=1).mean()),
        "l0": float((sae.encode_dense(x) > 0).sum(dim=1).double().mean()),
        "dead": float(((sae.encode_dense(x) > 0).sum(dim=0) == 0).double().mean()),
        "delta_ce": c["sae"] - c["clean"],
        "recovered_zero": (c["zero"] - c["sae"]) / (c["zero"] - c["clean"]),
        "recovered_mean": (c["mean"] - c["sae"]) / (c["mean"] - c["clean"]),
        "kl_sae": k["sae"],
        "kl_score_zero": (k["zero"] - k["sae"]) / k["zero"],
        "kl_score_mean": (k["mean"] - k["sae"]) / k["mean"],
        "ce_clean": c["clean"],
        "ce_mean": c["mean"],
        "tokens": float(len(x)),
    }


@pytest.mark.parametrize("positions", ["all", "reply"])
def test_evaluation_is_the_plain_computation(
    sae: SAE, lm: LanguageModel, documents: list[Document], positions: str
) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(
        sae,
        lm,
        documents,
        positions=positions,  # type: ignore[arg-type]
        batch_tokens=100,  # several batches with padding
        progress=lambda done, total, note="": seen.append((done, total)),
    )
    expected = _by_hand(sae, lm, documents, positions)
    assert found.tokens == expected.pop("tokens")
    for name, value in expected.items():
        assert found.metrics[name].value == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert found.metrics[name].low <= found.metrics[name].high
    assert found.documents == (len(documents) if positions == "all" else 2)
    assert seen[-1][0] == seen[-1][1] and len(seen) == seen[-1][1]


def _values(found: Evaluation) -> dict[str, tuple[float, float, float]]:
    return {name: (m.value, m.low, m.high) for name, m in found.metrics.items()}


def _same(one: Evaluation, other: Evaluation, without: tuple[str, ...] = ()) -> None:
    a, b = _values(one), _values(other)
    assert a.keys() == b.keys() and one.undefined == other.undefined
    for name in a.keys() - set(without):
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name


# 1e-6 of the whole, for what is a small difference of two larger numbers as well.
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_tokens=st.integers(1, 900), order=st.permutations(range(10)), threads=st.sampled_from([1, 2, 3]))
def test_neither_batches_nor_order_nor_threads_matter(
    sae: SAE, lm: LanguageModel, documents: list[Document], batch_tokens: int, order: list[int], threads: int
) -> None:
    expected = evaluate(sae, lm, documents, context=16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = evaluate(
            sae, lm, [documents[i] for i in order], context=16, batch_tokens=batch_tokens, references=()
        )
    finally:
        torch.set_num_threads(before)
    # Its runs of tokens follow each other in the documents' order, by definition.
    _same(found, expected, without=("ev_legacy",))
    _same(evaluate(sae, lm, documents, context=16, batch_tokens=batch_tokens), expected)


def test_the_shortcuts_change_nothing(
    sae: SAE, lm: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = evaluate(sae, lm, documents, context=16, batch_tokens=128)
    monkeypatch.setattr("unbraid.evaluation.stash.LIMIT", 0)
    monkeypatch.setattr("unbraid.evaluation.reading.Stash", lambda: Stash(limit=0))
    _same(evaluate(sae, lm, documents, context=16, batch_tokens=128), quick)  # from the tokens each time
    monkeypatch.setattr("unbraid.evaluation.reading._lead", lambda batch: None)
    monkeypatch.setattr("unbraid.evaluation.scoring.compiled", plain)
    found = evaluate(sae, lm, documents, context=16, batch_tokens=128)
    _same(found, quick)


def test_the_first_token_s_model_state_is_shared_only_where_rows_begin_alike(lm: LanguageModel) -> None:
    texts = [Document.of_text(text) for text in ("a red ball", "two tablets with water", "the package")]
    batch = read_corpus(lm, texts, tokens=None, context=32, positions="all", batch_tokens=999).batches[0]
    assert _lead(batch) == tuple(batch.input_ids[0, : int(batch.chosen[0].int().argmax())].tolist())
    gap = batch.chosen.clone()
    gap[0, 2] = False
    assert _lead(replace(batch, chosen=gap)) is None
    later = batch.chosen.clone()
    later[1, int(batch.chosen[1].int().argmax())] = False
    assert _lead(replace(batch, chosen=later)) is None


def test_freed_memory_goes_back_every_few_batches(
    sae: SAE, lm: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(evaluation, "give_back", lambda: calls.append(1))
    read = read_corpus(lm, documents, tokens=None, context=32, positions="all", batch_tokens=64)
    evaluate(sae, lm, documents, context=32, batch_tokens=64)
    assert len(read.batches) > evaluation.GIVE_BACK_EVERY
    assert len(calls) >= len(read.batches) // (2 * evaluation.GIVE_BACK_EVERY)


def test_what_is_not_finite_is_named(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    broken = deepcopy(sae)
    with torch.no_grad():
        broken.W_dec[3, 2] = torch.nan
    with pytest.raises(UserError, match="W_dec of autoencoder 1 has NaN or infinite"):
        evaluate(broken, lm, documents)
    with pytest.raises(UserError, match="W_dec of second has NaN"):
        evaluate_all([sae, broken], lm, documents, names=("first", "second"))
    huge = deepcopy(sae)
    with torch.no_grad():
        huge.W_dec *= 1e38
        huge.b_dec *= 1e38
    with pytest.raises(UserError, match="autoencoder 1 reconstructs NaN or infinite numbers, so fvu"):
        evaluate(huge, lm, documents)
    weight = lm.layout.layers[0].mlp.down_proj.weight
    kept = weight[0, 0].clone()
    try:
        weight.data[0, 0] = torch.nan
        with pytest.raises(UserError, match=r"activations at layers\.1\.resid_post that are NaN"):
            evaluate(sae, lm, documents)
    finally:
        weight.data[0, 0] = kept
    head = lm.layout.unembed.weight  # type: ignore[union-attr]
    kept = head[0, 0].clone()
    try:
        head.data[0, 0] = torch.inf
        with pytest.raises(UserError, match=r"of model .* is NaN or infinite at some token"):
            evaluate(sae, lm, documents)
    finally:
        head.data[0, 0] = kept


def test_every_metric_has_a_definition_of_its_own(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents)
    assert found.metrics.keys() | found.undefined.keys() == DEFINITIONS.keys() == found.definitions.keys()
    assert len(set(found.definitions.values())) == len(DEFINITIONS)
    json.dumps(found.as_dict(), allow_nan=False)


def test_different_definitions_share_no_table(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    found = evaluate(sae, lm, documents, references=("pca",))
    subjects, rows = table([("one", found), ("two", found)])
    assert subjects == ["one", "pca", "two", "pca"]
    by_name = {row.metric: row.cells for row in rows}
    assert by_name["fvu"] == (found.metrics["fvu"], found.references["pca"]["fvu"]) * 2
    assert by_name["dead"] == (found.metrics["dead"], "") * 2
    other = replace(found, definitions={**found.definitions, "fvu": "0" * 12})
    with pytest.raises(UserError, match="one and two cannot stand in one table: fvu is defined in two ways"):
        table([("one", found), ("two", other)])


def _worse(sae: SAE, kind: str) -> SAE:
    worse = deepcopy(sae)
    with torch.no_grad():
        if kind == "shrunk":
            worse.W_dec *= 0.6
        elif kind == "noise":
            worse.W_dec += 0.5 * torch.randn(worse.W_dec.shape, generator=torch.Generator().manual_seed(0))
        elif kind == "random":
            worse.initialise(
                *[torch.randn(64, sae.config.d_in, generator=torch.Generator().manual_seed(0))] * 2,
                torch.Generator().manual_seed(0),
            )
        elif kind == "permuted":
            worse.W_dec.copy_(
                worse.W_dec[torch.randperm(len(sae.W_dec), generator=torch.Generator().manual_seed(0))]
            )
        else:  # the same weights with fewer latents allowed
            worse = build(replace(sae.config, k=2))
            worse.load_state_dict(sae.state_dict())
    return worse.requires_grad_(False)


def test_evaluated_together_each_is_as_it_is_alone(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    elsewhere = build(replace(sae.config, site="layers.0.mlp_out"))
    elsewhere.load_state_dict(sae.state_dict())
    saes = [sae, elsewhere.requires_grad_(False), _worse(sae, "fewer")]
    seen: list[tuple[int, int]] = []
    together = evaluate_all(
        saes, lm, documents, progress=lambda done, total, note="": seen.append((done, total))
    )
    assert [found.site for found in together] == [str(one.site) for one in saes]
    assert together == [evaluate(one, lm, documents) for one in saes]
    assert seen[-1][0] == seen[-1][1] and len(seen) == seen[-1][1]


@pytest.mark.parametrize("kind", ["shrunk", "noise", "permuted", "random", "fewer"])
def test_a_worse_autoencoder_scores_worse(
    sae: SAE, lm: LanguageModel, documents: list[Document], kind: str
) -> None:
    good, bad = evaluate(sae, lm, documents), evaluate(_worse(sae, kind), lm, documents)

    def value(found: Evaluation, name: str) -> float:
        return found.metrics[name].value

    assert value(good, "fvu") < value(bad, "fvu") and value(good, "mse") < value(bad, "mse")
    assert value(good, "kl_sae") < value(bad, "kl_sae")
    assert value(good, "kl_score_zero") > value(bad, "kl_score_zero")
    assert value(good, "kl_score_mean") > value(bad, "kl_score_mean")
    assert value(good, "ev_legacy") > value(bad, "ev_legacy")
    if kind != "shrunk":  # which keeps every direction
        assert value(good, "cosine") > value(bad, "cosine")
    if kind == "permuted":
        assert value(bad, "encoder_decoder_cosine") < 0.5 < value(good, "encoder_decoder_cosine")
        assert value(bad, "max_decoder_cosine") == pytest.approx(value(good, "max_decoder_cosine"))
    assert value(good, "ce_clean") == value(bad, "ce_clean")
    assert value(good, "ce_zero") == value(bad, "ce_zero")
    if kind == "shrunk":
        assert value(bad, "l2_ratio") < value(good, "l2_ratio")
    if kind == "fewer":
        assert value(bad, "l0") < value(good, "l0") and value(bad, "dead") >= value(good, "dead")


def test_a_perfect_autoencoder_costs_nothing(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    perfect = build(replace(sae.config, architecture="relu", k=0))
    perfect.load_state_dict(sae.state_dict())
    found = evaluate(perfect.requires_grad_(False), lm, documents).metrics
    assert found["fvu"].value < 1e-6 and abs(found["delta_ce"].value) < 1e-4
    for name in ("recovered_zero", "recovered_mean", "kl_score_zero", "kl_score_mean", "bias"):
        assert found[name].value == pytest.approx(1, abs=1e-3), name


def test_exactly_the_asked_tokens_are_used(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    found = evaluate(sae, lm, documents, tokens=50)
    assert found.tokens == 50 and found.documents < len(documents)
    record = found.as_dict()
    assert record["tokens"] == 50 and record["model_id"] == lm.id
    assert record["metrics"]["fvu"].keys() == {"value", "low", "high", "n"}
    assert all(np.isfinite(list(m.values())).all() for m in record["metrics"].values())
    assert evaluate(sae, lm, documents, tokens=50) == found


def test_windows_of_a_long_document_share_a_unit(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents[:3], context=8)
    assert found.metrics["l0"].n == 3


def test_what_does_not_fit_is_refused(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    def changed(**fields: object) -> SAE:
        other = build(replace(sae.config, **fields))  # type: ignore[arg-type]
        return other.requires_grad_(False)

    with pytest.raises(UserError, match="trained on"):
        evaluate(changed(model_id="f" * 64), lm, documents)
    with pytest.raises(UserError, match="12 dimensions"):
        evaluate(changed(d_in=12, model_id=""), lm, documents)
    with pytest.raises(UserError, match=r"layers\.9\.resid_post"):
        evaluate(sae, lm, documents, site="layers.9.resid_post")
    with pytest.raises(UserError, match="which site"):
        evaluate(changed(site=""), lm, documents)
    with pytest.raises(UserError, match="replies"):
        evaluate(sae, lm, documents[:3], positions="reply")
    with pytest.raises(UserError, match="tokens is 0"):
        evaluate(sae, lm, documents, tokens=0)
