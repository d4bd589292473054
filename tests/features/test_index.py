"""An index says of every latent exactly what one can compute by holding everything in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.activations.text import windows
from unbraid.features.geometry import logit_effects, promoted_and_suppressed
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.unembed import norm_weight
from unbraid.sae.base import SAE

CONFIG = IndexConfig(
    context=24, batch_tokens=100, top=5, quantiles=4, per_quantile=2, reservoir=30, window=3, same_context=3
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


def test_examples_of_equal_contexts_collapse(index: Index) -> None:
    for latent in range(0, index.d_sae, 12):
        shown = [example.tokens for example in index.latent(latent).top]
        assert len(set(shown)) == len(shown) > 0


def test_quantiles_and_intervals_are_ordered(index: Index) -> None:
    page = index.latent(int(np.argmax(index.densities)))
    assert [len(group) for group in page.quantiles] == [2, 2, 2, 2]
    for low, high in zip(page.quantiles, page.quantiles[1:], strict=False):
        assert max(example.value for example in low) <= min(example.value for example in high)
    intervals = page.intervals(4)
    for number, group in enumerate(intervals):
        assert all(number / 4 <= example.value / page.max <= (number + 1) / 4 for example in group)
    assert page.top[0] in intervals[-1]


def test_the_same_corpus_gives_the_same_bytes(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    again = build_index(
        sae, lm, documents, CONFIG, tmp_path / "again", sae_id="an autoencoder", command="a command"
    )
    assert again.manifest.id == index.manifest.id
    assert check_files(again.folder).files == index.manifest.files


def test_a_killed_build_leaves_nothing_and_the_next_one_starts_afresh(
    index: Index, sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int, note: str = "") -> None:
        if done > 100:
            raise Killed

    out = tmp_path / "index"
    with pytest.raises(Killed):
        build_index(sae, lm, documents, CONFIG, out, sae_id="an autoencoder", progress=stop)
    assert not out.exists()
    rebuilt = build_index(sae, lm, documents, CONFIG, out, sae_id="an autoencoder", command="a command")
    assert rebuilt.manifest.files == index.manifest.files
    with pytest.raises(UserError, match="exists already"):
        build_index(sae, lm, documents, CONFIG, out, sae_id="an autoencoder")


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

    from unbraid.sae.base import SAEConfig
    from unbraid.sae.registry import build

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
