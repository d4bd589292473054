"""Search by numbers, by direction, by a pasted text and by meaning, against what brute force finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.features.embedding import FOLDER, SentenceModel, open_embedder
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search import Search, decoder_cosines
from unbraid.features.search_activation import Reader, Screens
from unbraid.features.search_numbers import Condition, smallest
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

from .handmade import Made, handmade

PASSAGES = [[f"word{i}" for i in range(n, n + 12)] for n in range(8)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """96 latents; latent j fires j % 7 times, at most at j % 5 + 1."""
    rng = np.random.default_rng(0)
    made: list[Made] = []
    for j in range(96):
        values = np.sort(rng.uniform(0.1, j % 5 + 1, j % 7))[::-1]
        made.append(
            Made([(n, int(rng.integers(12)), float(v)) for n, v in enumerate(values)], promoted=[f"p{j}"])
        )
    return handmade(tmp_path_factory.mktemp("search") / "index", PASSAGES, made)


# By numbers.


def test_conditions_and_order_are_those_of_the_table(index: Index) -> None:
    rows = index.query("SELECT latent, count, density, max FROM latents")
    wanted = sorted(
        (row for row in rows if row["count"] >= 3 and row["max"] < 4.0),
        key=lambda row: (-row["max"], row["latent"]),
    )
    hits = Search(index).statistics(["count>=3", Condition("max", "<", 4.0)], "-max", limit=10)
    assert [hit.latent for hit in hits] == [row["latent"] for row in wanted[:10]]
    assert [hit.score for hit in hits] == [row["max"] for row in wanted[:10]]
    assert [hit.latent for hit in Search(index).statistics(["count = 0"], "latent", 100)] == list(
        range(0, 96, 7)
    )
    assert Search(index).statistics(["density>1"]) == [] == Search(index).statistics(limit=0)


@pytest.mark.parametrize(
    ("where", "order", "message"),
    [
        (["denisty<1"], "-density", "no number 'denisty'"),
        (["density<1"], "-histogram", "no number 'histogram'"),
        (["density<1; DROP TABLE latents"], "max", "is no condition"),
        (["density<nan"], "max", "is no condition"),
        (["1=1"], "max", "no number '1'"),
        (['count"=1'], "max", "is no condition"),
        ([], "max DESC", "no number 'max DESC'"),
        ([Condition("count", "OR 1", 1.0)], "max", "compares nothing"),
    ],
)
def test_what_is_no_condition_is_named(
    index: Index, where: Sequence[str | Condition], order: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Search(index).statistics(where, order)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=30), st.integers(-1, 40))
def test_the_smallest_are_the_first_of_a_stable_sort(values: list[int], limit: int) -> None:
    wanted = sorted(range(len(values)), key=lambda place: (values[place], place))[: max(limit, 0)]
    assert smallest(np.array(values, dtype=float), limit).tolist() == wanted


def test_a_latent_without_a_number_fulfils_nothing(tmp_path: Path) -> None:
    index = handmade(tmp_path / "index", PASSAGES, [Made([(0, 1, float(n + 1))]) for n in range(4)])
    path = index.folder / "latents.parquet"
    table = pq.read_table(path)
    with_gap = pa.array([2.0, None, 1.0, 2.0], pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("max"), "max", with_gap), path)
    search = Search(index)
    assert [hit.latent for hit in search.statistics(["max!=1"], "latent")] == [0, 3]
    assert [hit.latent for hit in search.statistics([], "-max")] == [0, 3, 2]


# By direction.


def test_directions_are_ranked_by_cosine(index: Index, sae: SAE) -> None:
    vector = np.random.default_rng(1).standard_normal(sae.config.d_in)
    W = sae.W_dec.detach().numpy().astype(np.float64)
    cosines = W @ vector / np.linalg.norm(W, axis=1) / np.linalg.norm(vector)
    hits = Search(index).direction(vector, sae, 7)
    assert [hit.latent for hit in hits] == np.argsort(-cosines)[:7].tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:7], atol=1e-6)
    search = Search(index)
    assert len(search.direction(vector, sae, 1000)) == 96
    # What is kept of one autoencoder is not used for the next.
    other = build(SAEConfig("relu", sae.config.d_in, 96))
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec.flip(0) * 3)
    assert [hit.latent for hit in search.direction(vector, other, 7)] == [95 - hit.latent for hit in hits]


def test_blocks_and_empty_rows(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = np.ones(sae.config.d_in)
    whole = decoder_cosines(vector, sae)
    monkeypatch.setattr("unbraid.features.search.BLOCK", 7)
    np.testing.assert_allclose(decoder_cosines(vector, sae), whole, atol=1e-6)
    empty = build(SAEConfig("relu", 4, 3))
    assert decoder_cosines(np.ones(4), empty).tolist() == [0, 0, 0]


@pytest.mark.parametrize("vector", [np.zeros(48), np.full(48, np.nan), np.ones(47), np.array([np.inf] * 48)])
def test_what_is_no_direction_is_refused(index: Index, sae: SAE, vector: np.ndarray) -> None:
    with pytest.raises(UserError, match="the direction"):
        Search(index).direction(vector, sae)


# By a pasted text.


def _brute(lm: LanguageModel, sae: SAE, text: str) -> np.ndarray:
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    x = read_sites(lm, ids, torch.ones_like(ids), [sae.site])[sae.site][0]
    with torch.no_grad():
        codes = sae.encode_dense(x).numpy()
    special = np.isin(ids[0].numpy(), lm.tokenizer.all_special_ids)
    return codes * ~special[:, None]


def test_a_pasted_text_finds_what_fires_on_it(index: Index, sae: SAE, lm: LanguageModel) -> None:
    text = "the red ball was delayed by a storm"
    codes = _brute(lm, sae, text)
    search = Search(index)
    hits = search.activation(sae, lm, text, 200, order="activation")
    assert {hit.latent for hit in hits} == set(np.flatnonzero(codes.max(axis=0) > 0))
    for hit in hits:
        np.testing.assert_allclose(hit.activations, codes[:, hit.latent], rtol=1e-4, atol=1e-5)
        assert hit.score == pytest.approx(codes[:, hit.latent].max(), rel=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    tokens = search.reader(sae).read(lm, text).tokens
    assert "".join(tokens).endswith(text) and len(tokens) == len(codes)


def test_surprise_prefers_the_rare_that_fire_strongly_for_themselves(
    index: Index, sae: SAE, lm: LanguageModel
) -> None:
    text = "the red ball was delayed by a storm"
    largest = _brute(lm, sae, text).max(axis=0)
    rows = {row["latent"]: row for row in index.query("SELECT latent, max, density, count FROM latents")}
    hits = Search(index).activation(sae, lm, text, 200)
    for hit in hits:
        row = rows[hit.latent]
        share = largest[hit.latent] / row["max"] if row["count"] else 1.0
        wanted = share * -np.log10(row["density"] if row["count"] else 1 / index.n_tokens)
        assert hit.score == pytest.approx(wanted, rel=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_windows_of_a_long_text_lie_one_after_the_other(sae: SAE, lm: LanguageModel) -> None:
    reading = Reader(sae).read(lm, "the red ball " * 150)
    assert len(reading.tokens) > 300 and reading.token.max() > 256
    with pytest.raises(UserError, match="more than 4096 tokens"):
        Reader(sae).read(lm, "red ball " * 4000)
    with pytest.raises(UserError, match="empty"):
        Reader(sae).read(lm, " \n")


@pytest.mark.parametrize(("k", "parts"), [(1, 5), (7, 2), (7, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_screened_encoder_gives_the_same_codes(
    k: int, parts: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 * k
    monkeypatch.setattr("unbraid.features.search_activation.PART", 64)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    sae = build(SAEConfig("topk", d_in=24, d_sae=size * (parts - 1) + 13, k=k))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.T.shape, generator=generator).T)
        sae.b_enc.copy_(torch.randn(sae.b_enc.shape, generator=generator))
        sae.b_dec.copy_(torch.randn(sae.b_dec.shape, generator=generator))
    x = torch.randn(300, 24, generator=generator)
    with torch.no_grad():
        wanted = sae.encode_dense(x)
    screens = Screens(sae)  # type: ignore[arg-type]
    assert len(screens.screens) == parts
    torch.testing.assert_close(screens.encode(x).dense(sae.config.d_sae), wanted)


# By meaning.


class Letters:
    """Counts letters: enough for texts with the same words to be near each other."""

    id = "letters" * 10

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += len(texts)
        counts = np.array([[text.lower().count(chr(97 + i)) + 0.01 for i in range(26)] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def test_meaning_finds_the_nearest_description_and_follows_the_labels(index: Index, tmp_path: Path) -> None:
    labels, embedder = Labels(tmp_path / "labels.sqlite", "an autoencoder"), Letters()
    labels.propose(40, "zebras", by="a", kind="manual")
    search = Search(index, labels, embedder=embedder)
    hits = search.meaning("zebra", 3)
    assert (hits[0].latent, hits[0].why) == (40, "zebras") and hits[0].score > 0.9
    assert embedder.encoded == 96 + 1 and len(search.meaning("zebra", 200)) == 96
    wrong = labels.propose(41, "zebra zebra", by="a", kind="manual")
    assert search.meaning("zebra", 1)[0].latent == 41
    assert embedder.encoded == 96 + 1 + 1 + 2  # each question, and the one label that is new
    labels.review(wrong.id, "rejected", by="b", why="no")
    assert search.meaning("zebra", 1)[0].latent == 40
    again = Search(index, labels, embedder=Letters())
    assert again.meaning("zebra", 1) == search.meaning("zebra", 1) and again.embedder.encoded == 1  # type: ignore[union-attr]
    assert search.meaning("") == [] == search.meaning("zebra", 0)


def test_vectors_of_another_index_at_the_same_place_are_not_used(tmp_path: Path) -> None:
    handmade(tmp_path / "index", PASSAGES, [Made([(0, 1, 1.0)])])
    assert len(Search(Index(tmp_path / "index"), embedder=Letters()).meaning("word", 9)) == 1
    shutil.rmtree(tmp_path / "index")
    handmade(tmp_path / "index", PASSAGES, [Made([(0, 1, 1.0)]), Made([(1, 1, 1.0)])])
    assert len(Search(Index(tmp_path / "index"), embedder=Letters()).meaning("word", 9)) == 2


def test_without_a_model_it_says_how_to_get_one(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download sentence-transformers/all-MiniLM-L6-v2"):
        Search(index).meaning("zebra")


def test_a_model_that_was_downloaded_is_used(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_bert, cached / "snapshots" / ("0" * 40))
    assert open_embedder().id == open_embedder(tiny_bert).id


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=300,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def test_a_sentence_is_the_mean_of_its_tokens(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["a b c d e f g", "a", "j j", ""]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert)
    wanted: list[torch.Tensor] = []
    for text in texts:  # one at a time, without padding
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted.append(states.mean(0) / states.mean(0).norm())
    monkeypatch.setenv(FOLDER, str(tiny_bert))
    vectors = open_embedder().encode(texts)
    np.testing.assert_allclose(vectors, torch.stack(wanted).numpy(), atol=1e-5)
    assert SentenceModel(tiny_bert).encode([]).shape == (0, 16)
    with pytest.raises(UserError, match=r"needs config\.json"):
        SentenceModel(tiny_bert.parent)


def test_a_sentence_model_reads_no_more_tokens_than_it_can(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "short")
    path = tmp_path / "short" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 8}))
    long, cut = SentenceModel(tmp_path / "short").encode(["a b c d e f g h i j", "a b c d e f"])
    np.testing.assert_array_equal(long, cut)  # with [CLS] and [SEP] eight


def test_a_model_that_cannot_pad_is_no_sentence_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_gpt2, tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    (tmp_path / "gpt2" / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no token to pad with"):
        SentenceModel(tmp_path / "gpt2")
