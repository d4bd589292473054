"""An index says of every latent exactly what one can compute by holding everything in memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.activations.text import windows
from unbraid.features import weights
from unbraid.features.geometry import logit_effects, promoted_and_suppressed
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Index
from unbraid.features.stretches import class_of
from unbraid.features.tables import SCHEMAS
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.unembed import norm_weight
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

CONFIG = IndexConfig(
    context=24,
    batch_tokens=100,
    top=5,
    quantiles=4,
    per_group=2,
    reservoir=30,
    window=3,
    same_context=3,
    part=300,
)


@pytest.fixture(scope="module")
def index(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Index:
    out = tmp_path_factory.mktemp("indexes") / "index"
    return build_index(sae, lm, documents, CONFIG, out, sae_id="an autoencoder", command="a command")


def _codes(
    sae: SAE, lm: LanguageModel, documents: list[Document], positions: str = "all"
) -> list[np.ndarray]:
    """Dense codes (length, d_sae) of each window, zero where nothing is counted, one window at a time."""
    found: list[np.ndarray] = []
    for document in documents:
        for window in windows(lm, document, CONFIG.context):
            ids = torch.tensor([window.input_ids])
            x = read_sites(lm, ids, torch.ones_like(ids), [sae.site])[sae.site][0]
            with torch.no_grad():
                codes = sae.encode_dense(x).numpy()
            found.append(codes * window.captured(positions)[:, None])
    return found


@pytest.mark.parametrize("part", [40, 1 << 21])
@pytest.mark.parametrize("d_sae", [8, 700])  # a few row groups of each table, or one that is not full
def test_the_model_reads_every_window_once_however_many_latents_and_parts(
    d_sae: int, part: int, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    read: list[tuple[int, ...]] = []

    def seen(_module: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        for ids, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
            read.append(tuple(ids[mask].tolist()))

    sae = build(SAEConfig("topk", lm.d_in, d_sae, k=4, site="layers.1.resid_post", model_id=lm.id))
    hook = lm.layout.decoder.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        index = build_index(sae, lm, documents, replace(CONFIG, part=part), tmp_path / "index", sae_id="one")
    finally:
        hook.remove()
    every = [window for document in documents for window in windows(lm, document, CONFIG.context)]
    wanted = [tuple(window.input_ids) for window in every if window.captured("all").any()]
    assert sorted(read) == sorted(wanted)
    assert (len(index.passages.numbers) > 20) == (part == 40)


def test_counts_and_extremes_are_exact(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    codes = np.concatenate(_codes(sae, lm, documents))
    fired = (codes > 0).sum(axis=0)
    rows = index.query("SELECT * FROM latents ORDER BY latent")
    np.testing.assert_array_equal([row["count"] for row in rows], fired)
    np.testing.assert_allclose([row["max"] for row in rows], codes.max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        [row["mean"] for row in rows], codes.sum(axis=0) / np.maximum(fired, 1), rtol=1e-4
    )
    assert index.n_tokens == fired.sum() / 6  # k latents fire at every counted token
    np.testing.assert_allclose(index.densities, fired / index.n_tokens)


def test_a_page_shows_the_strongest_examples_in_their_context(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    codes = _codes(sae, lm, documents)
    latent = int(np.argmax(index.densities))
    page = index.latent(latent)
    assert page.count == sum(int((window[:, latent] > 0).sum()) for window in codes)
    assert page.top[0].value == pytest.approx(page.max, rel=1e-5)
    assert sum(page.histogram) == page.count
    values = [example.value for example in page.top]
    assert values == sorted(values, reverse=True) and len(page.top) == 5
    texts = {document.id: document for document in documents}
    for example in (*page.top, *(example for group in page.quantiles for example in group)):
        at = example.position - example.start
        assert example.activations[at] == pytest.approx(example.value)
        assert len(example.tokens) == len(example.activations) <= 2 * CONFIG.window + 1
        whole = windows(lm, texts[example.document], 10_000)[0].input_ids
        shown = whole[example.start : example.start + len(example.tokens)]
        # A later window begins with a repeated BOS, which stands for the token before it.
        assert [lm.tokenizer.decode([token]) for token in shown][1:] == list(example.tokens)[1:]


def test_examples_of_equal_contexts_collapse(
    index: Index, sae: SAE, lm: LanguageModel, tmp_path: Path
) -> None:
    """Top examples that are copies of one another were another tool's fault."""
    for latent in range(0, index.d_sae, 12):
        shown = [example.tokens for example in index.latent(latent).top]
        assert len(set(shown)) == len(shown) > 0
    same = ["there were 12 red balls in a pan", "There were 48 red balls in a pan"]
    documents = [Document.of_text(text, id=str(n)) for n, text in enumerate(same)]
    made = build_index(sae, lm, documents, CONFIG, tmp_path / "index", sae_id="x")
    tails = [window[-4:] > 0 for window in _codes(sae, lm, documents)]
    both = np.flatnonzero(tails[0].any(axis=0) & tails[1].any(axis=0))
    assert len(both)  # these fire in both copies
    for latent in range(made.d_sae):
        contexts: list[tuple[int, ...]] = []
        for e in made.latent(latent).top:
            at, reach = e.position - e.start, CONFIG.same_context
            contexts.append(tuple(class_of(t) for t in e.tokens[max(at - reach, 0) : at + reach + 1]))
        assert len(set(contexts)) == len(contexts)


def _values(sae: SAE, lm: LanguageModel, documents: list[Document], latent: int) -> np.ndarray:
    codes = np.concatenate(_codes(sae, lm, documents))[:, latent]
    return codes[codes > 0]


def test_groups_say_what_they_contain(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    """Shares are counts of all firings; 'quantiles' that are no quantiles were another tool's fault."""
    latent = int(np.argmax(index.densities))
    page, values = index.latent(latent), _values(sae, lm, documents, latent)
    assert page.count == len(values) > 100
    for groups in (page.quantiles, page.intervals):
        assert sum(group.count for group in groups) == page.count
        assert sum(group.share for group in groups) == pytest.approx(1)
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            inside = (values >= group.low) & ((values < group.high) | last)
            # A value within rounding of an edge may fall on either side of it in another batch.
            near = np.isclose(values, group.low, 1e-5) | np.isclose(values, group.high, 1e-5)
            assert abs(int(inside.sum()) - group.count) <= near.sum()
            assert 1 <= len(group.examples) <= CONFIG.per_group
            assert all(group.low <= e.value <= group.high for e in group)
            assert [e.value for e in group] == sorted((e.value for e in group), reverse=True)
        assert all(a.high == b.low for a, b in pairwise(page.quantiles))
    assert len(page.quantiles) == 4
    assert all(abs(group.share - 0.25) < 0.06 for group in page.quantiles)
    widths = {round(g.high - g.low, 5) for g in page.intervals[:-1]}
    assert widths == {round(page.histogram_top / 16, 5)}
    assert page.intervals[-1].high == pytest.approx(values.max(), rel=1e-4)


def test_examples_of_groups_are_samples_and_no_top_examples_again(index: Index) -> None:
    """Drawn from all firings of a group, not re-sorted from the strongest."""
    top, sampled = set(), set()
    for latent in range(index.d_sae):
        page = index.latent(latent)
        top |= {(latent, e.document, e.position) for e in page.top}
        sampled |= {(latent, e.document, e.position) for group in page.intervals for e in group}
    assert len(sampled - top) > len(sampled) / 2


def test_tokens_are_counted_over_all_firings(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    """Not over the weakest ones, and not over the examples."""
    fired: dict[int, Counter[int]] = {j: Counter() for j in range(index.d_sae)}
    occurrences: Counter[int] = Counter()
    codes = iter(_codes(sae, lm, documents))
    for document in documents:
        for window in windows(lm, document, CONFIG.context):
            dense = next(codes)
            for token, row in zip(window.input_ids, dense, strict=True):
                occurrences[token] += bool(row.any())
                for j in np.flatnonzero(row):
                    fired[int(j)][token] += 1
    for latent in range(0, index.d_sae, 7):
        page = index.latent(latent)
        assert {t.id: t.firings for t in page.tokens} == dict(fired[latent])
        assert page.distinct_tokens == len(fired[latent])
        assert [t.firings for t in page.tokens] == sorted(fired[latent].values(), reverse=True)
        for use in page.tokens:
            assert use.share == use.firings / page.count
            assert use.of_token == use.firings / occurrences[use.id]
            assert use.token == lm.tokenizer.decode([use.id])


def test_each_token_is_stored_once(index: Index, lm: LanguageModel, documents: list[Document]) -> None:
    wanted = [w.input_ids for document in documents for w in windows(lm, document, CONFIG.context)]
    assert [
        tuple(row["tokens"]) for row in index.query("SELECT tokens FROM passages ORDER BY passage")
    ] == wanted
    assert index.manifest.facts["windows"] == len(wanted)
    for table in ("examples", "latents"):
        assert "tokens" not in index.query(f"SELECT * FROM {table} LIMIT 1")[0]


def test_co_activation_is_a_short_list_that_is_right(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    """No F × F matrix is made; what is listed has the counts of one."""
    fires = np.concatenate(_codes(sae, lm, documents)) > 0
    together = fires.T.astype(int) @ fires
    assert index.manifest.facts["coactive"] == {"tokens": index.n_tokens, "level": 0, "exact": True}
    for latent in range(0, index.d_sae, 12):
        near = [n for n in index.latent(latent).neighbours if n.kind == "coactive"]
        own = together[latent, latent]
        jaccard = together[latent] / (own + np.diag(together) - together[latent])
        jaccard[latent] = -1
        assert near[0].value == pytest.approx(jaccard.max())
        for n in near:
            assert (n.together, n.own, n.other) == (
                together[latent, n.latent], own, together[n.latent, n.latent],
            )  # fmt: skip
            assert n.value == pytest.approx(jaccard[n.latent])
            ratio = n.together * index.n_tokens / (n.own * n.other)
            assert n.pmi == pytest.approx(np.log(ratio), rel=1e-5, abs=1e-6)


def test_neighbours_are_nearest_by_cosine(index: Index, sae: SAE) -> None:
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    for latent in range(0, index.d_sae, 12):
        for kind in ("decoder", "encoder"):  # the encoder is the decoder's transpose here
            near = [n for n in index.latent(latent).neighbours if n.kind == kind]
            best = cosines[latent].topk(10)
            assert [n.latent for n in near] == best.indices.tolist()
            assert [n.value for n in near] == pytest.approx(best.values.tolist(), rel=1e-5)
            assert {n.sae for n in near} == {None}


def test_neighbours_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(n, 8, generator=generator) for n in (50, 70))
    whole = weights.nearest(own, None, 5), weights.nearest(own, theirs, 5)
    monkeypatch.setattr(weights, "ROWS", 16)
    monkeypatch.setattr(weights, "COLUMNS", 9)
    blocks = weights.nearest(own, None, 5), weights.nearest(own, theirs, 5)
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], rtol=1e-5)


def test_neighbours_in_other_autoencoders(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    other = build(SAEConfig("topk", lm.d_in, 40, k=4))
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec[10:50])
        other.W_enc.copy_(sae.W_enc[:, 20:60])
    made = build_index(
        sae, lm, documents[:3], CONFIG, tmp_path / "index", sae_id="one", beside=[(other, "another")]
    )
    beside = {n.kind: n for n in reversed(made.latent(30).neighbours) if n.sae == "another"}
    assert beside["decoder"].latent == 20 and beside["encoder"].latent == 10
    assert beside["decoder"].value == pytest.approx(1)
    narrow = build(SAEConfig("topk", 8, 40, k=4))
    with pytest.raises(UserError, match="8 dimensions"):
        build_index(sae, lm, documents[:3], CONFIG, tmp_path / "no", sae_id="one", beside=[(narrow, "n")])


def test_positions_and_strata(sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path) -> None:
    named = [replace(d, stratum="chat" if d.messages else "text") for d in documents]
    index = build_index(sae, lm, named, CONFIG, tmp_path / "index", sae_id="an autoencoder")
    codes = _codes(sae, lm, documents)
    of = ["chat" if d.messages else "text" for d in documents for _ in windows(lm, d, CONFIG.context)]
    for latent in range(0, index.d_sae, 12):
        page, places = index.latent(latent), np.concatenate([np.flatnonzero(c[:, latent]) for c in codes])
        assert page.positions is not None
        assert page.positions.mean == pytest.approx(places.mean())
        assert page.positions.sd == pytest.approx(places.std(), abs=1e-9)
        first = [int(np.flatnonzero(c.any(axis=1))[0]) for c in codes if c.any()]
        starts = sum(bool(c[f, latent]) for c, f in zip([c for c in codes if c.any()], first, strict=True))
        assert page.positions.first == pytest.approx(starts / page.count)
        assert [s.name for s in page.strata] == ["chat", "text"]
        for stratum in page.strata:
            mine = [c for c, name in zip(codes, of, strict=True) if name == stratum.name]
            assert stratum.firings == sum(int((c[:, latent] > 0).sum()) for c in mine)
            assert stratum.tokens == sum(int(c.any(axis=1).sum()) for c in mine)
            assert stratum.frequency == stratum.firings / stratum.tokens
    assert index.manifest.facts["strata"][0] == {
        "name": "chat",
        "documents": 6,
        "tokens": page.strata[0].tokens,
    }


def test_logit_effects_are_counted(index: Index, sae: SAE, lm: LanguageModel) -> None:
    effects = logit_effects(sae, lm, [5])[0].numpy()
    found = index.latent(5).logits
    assert found is not None and sum(found.counts) == len(effects)
    # To the rounding of one product for all latents and one for this one.
    assert (found.low, found.high) == pytest.approx((effects.min(), effects.max()), rel=1e-6)
    expected, _ = np.histogram(effects, len(found.counts), (found.low, found.high))
    assert np.abs(np.array(found.counts) - expected).sum() <= 2  # a value on an edge


def test_a_page_is_json(index: Index) -> None:
    record = json.loads(json.dumps(index.latent(3).as_dict(), allow_nan=False))
    assert record["latent"] == 3 and record["quantiles"][0]["examples"][0]["tokens"]
    assert record["promoted"][0].keys() == {"token", "logit"}
    assert all(index.latent(j).as_dict() == asdict(index.latent(j)) for j in range(0, index.d_sae, 7))


def test_a_dead_latent_has_a_page(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    dead = build(SAEConfig("topk", lm.d_in, 96, k=6))
    with torch.no_grad():
        dead.W_dec.copy_(sae.W_dec)
        dead.W_enc.copy_(sae.W_enc)
        dead.W_enc[:, 7] = 0
        dead.b_enc[7] = -1e6
    site = sae.site
    page = build_index(dead, lm, documents, CONFIG, tmp_path / "i", sae_id="d", site=site).latent(7)
    assert page.count == 0 and page.max == 0 and page.mean == 0 and page.positions is None
    assert page.quantiles == page.intervals == page.top == page.tokens == ()
    json.dumps(page.as_dict(), allow_nan=False)


def test_values_that_recur_have_a_dictionary_and_floats_none(index: Index) -> None:
    for table, schema in SCHEMAS.items():
        group = pq.read_metadata(index.folder / f"{table}.parquet").row_group(0)
        for number in range(group.num_columns):
            column = group.column(number)
            floats = column.physical_type in ("FLOAT", "DOUBLE")
            assert ("RLE_DICTIONARY" in column.encodings) is not floats, (table, column.path_in_schema)
        assert group.num_columns == len(schema)


def test_the_same_corpus_gives_the_same_bytes(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    again = build_index(
        sae, lm, documents, CONFIG, tmp_path / "again", sae_id="an autoencoder", command="a command"
    )
    assert again.manifest.id == index.manifest.id
    assert check_files(again.folder).files == index.manifest.files


def test_a_budget_of_tokens_stops_the_pass(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    index = build_index(
        sae, lm, documents, IndexConfig(tokens=70, context=24), tmp_path / "index", sae_id="an autoencoder"
    )
    assert 70 <= index.n_tokens < 70 + 24
    assert index.query("SELECT sum(count) AS n FROM latents")[0]["n"] == index.n_tokens * 6


def test_replies_alone_can_be_counted(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    chats = [document for document in documents if document.messages]
    config = IndexConfig(context=24, positions="reply")
    index = build_index(sae, lm, chats, config, tmp_path / "index", sae_id="an autoencoder")
    expected = sum(int((codes > 0).sum()) for codes in _codes(sae, lm, chats, "reply"))
    assert index.query("SELECT sum(count) AS n FROM latents")[0]["n"] == expected > 0
    texts = [document for document in documents if not document.messages]
    with pytest.raises(UserError, match="no token to index"):
        build_index(sae, lm, texts, config, tmp_path / "nothing", sae_id="an autoencoder")


def test_mistakes_are_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latent 96 does not exist; this index holds latents 0 to 95"):
        index.latent(96)
    with pytest.raises(UserError, match="could not answer"):
        index.query("SELECT nothing FROM nowhere")
    with pytest.raises(UserError, match="not an artifact of kind index"):
        Index(tmp_path)
    with pytest.raises(UserError, match="window"):
        IndexConfig(window=-1)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_promoted_tokens_are_those_whose_logits_rise(fixture: str, request: pytest.FixtureRequest) -> None:
    lm = load_model(request.getfixturevalue(fixture))
    with torch.no_grad():  # a trained norm has scales of its own
        weight = lm.layout.final_norm.weight
        weight.copy_(torch.linspace(0.5, 2.0, len(weight)))
    scale, centred = norm_weight(lm.layout.final_norm, lm.d_in)
    torch.testing.assert_close(scale, weight.detach(), rtol=1e-3, atol=1e-4)
    assert centred == (fixture == "tiny_gpt2")

    sae = build(SAEConfig(architecture="relu", d_in=lm.d_in, d_sae=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(3, lm.d_in, generator=generator))
        x = torch.randn(2000, lm.d_in, generator=generator)
        base, moved = (lm.layout.unembed(lm.layout.final_norm(y)) for y in (x, x + 0.01 * sae.W_dec[1]))
    change = (moved - base).mean(dim=0) / 0.01
    effects = logit_effects(sae, lm, [1])[0]
    assert np.corrcoef(change.numpy(), effects.numpy())[0, 1] > 0.97
    up, down = promoted_and_suppressed(sae, lm, [1], tokens=4)[0]
    assert up[0].logit == pytest.approx(effects.max().item()) and down[0].logit == pytest.approx(
        effects.min().item()
    )
    assert up[0].token == lm.tokenizer.decode([int(effects.argmax())])
