"""Full text finds what was said where it was said, and no query can break it."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations.documents import Document
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Example, Index
from unbraid.features.search import Search
from unbraid.features.search_text import TextIndex, Texts, build, spaced, terms, text_path, word_at
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE


@pytest.fixture(scope="module")
def index(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Index:
    strange = [
        Document.of_text('<script>alert("x")</script> NEAR OR AND col:value', id="hostile"),
    ]
    out = tmp_path_factory.mktemp("search") / "index"
    return build_index(sae, lm, [*documents, *strange], IndexConfig(context=64), out, sae_id="an autoencoder")


@pytest.fixture(scope="module")
def search(index: Index) -> Search:
    return Search(index)


def _shown(index: Index, latent: int) -> list[str]:
    return ["".join(example.tokens) for example in index.latent(latent).top]


def test_a_word_finds_the_latents_in_whose_examples_it_stands(index: Index, search: Search) -> None:
    for word in ("package", "tablets"):
        hits = search.text(word, limit=500)
        assert hits and len({hit.latent for hit in hits}) == len(hits)
        for hit in hits:
            page = index.latent(hit.latent)
            everything = " ".join([*_shown(index, hit.latent), *(effect.token for effect in page.promoted)])
            assert word in everything


def test_what_a_latent_fires_on_comes_first_then_who_fires_more(index: Index, search: Search) -> None:
    hits = search.text("red", limit=500)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True) and set(scores) >= {1, 3}
    for score in set(scores):
        counts = [index.latent(hit.latent).count for hit in hits if hit.score == score]
        assert counts == sorted(counts, reverse=True)
    assert next(hit.why for hit in hits if hit.score == 3) == "fires on it"
    for hit in hits:
        if hit.score >= 3:
            peaks = [_word(example) for example in index.latent(hit.latent).top[:5]]
            assert sum("red" in re.findall(r"\w+", word) for word in peaks) >= (3 if hit.score == 4 else 1)


def _word(example: Example) -> str:
    at = example.position - example.start
    return word_at("".join(example.tokens[:at]), example.tokens[at], "".join(example.tokens[at + 1 :]))


def test_all_words_must_stand_there_and_phrases_together(search: Search) -> None:
    both = {hit.latent for hit in search.text("tablets water", 500)}
    one = {hit.latent for hit in search.text("tablets", 500)}
    phrase = {hit.latent for hit in search.text('"tablets with water"', 500)}
    assert phrase and phrase <= both <= one
    assert search.text('"water with tablets"') == []
    assert {h.latent for h in search.text("tabl*", 500)} >= one
    assert search.text("tabl") == []


def test_case_accents_and_scripts_without_spaces(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Through what is written into the file: the tiny tokenizer has no token for any such character.
    rows = [(0, spaced("Zoë's café"), "", "", ""), (1, "", "", "", spaced("a 日本語の文章です b"))]
    monkeypatch.setattr(Texts, "rows", lambda *_: iter(rows))  # pyright: ignore[reportUnknownLambdaType]
    build(index, tmp_path / "x.sqlite")
    text = TextIndex(tmp_path / "x.sqlite")

    def found(query: str) -> list[int]:
        return [match.latent for match in text.search(query)]

    assert found("CAFE") == found("café") == found("zoe") == [0]
    assert found("文章") == found("本 文") == [1] and found("章文") == []
    assert spaced("a日本b") == "a 日  本 b"


HOSTILE = [
    '"', "'", "*", "a*b*", "NEAR(", "{fires} : x", "-red", "^red", "red OR", "(", ")", "\0", "a\0b", "\ud800",
    "'; DROP TABLE said; --", "%", "_", '""""', "red\0*", "ｆ" * 9999,
    "red " * 1000, "\ue000", "+", ": :", "🙂",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE)
def test_no_query_fails(search: Search, query: str) -> None:
    search.text(query)
    assert search.text("red")


@settings(max_examples=300, deadline=None)
@given(query=st.text(max_size=40) | st.text(alphabet='"*():^-+{} ANDORNT\0\ud800é日', max_size=40))
def test_no_query_fails_whatever_it_is(search: Search, query: str) -> None:
    for hit in search.text(query):
        assert 0 <= hit.latent < search.index.d_sae


def test_operators_are_words(search: Search) -> None:
    assert terms("red OR ball") == ['"red"', '"OR"', '"ball"']
    assert terms('a "b c" d*') == ['"a"', '"b c"', '"d*"*']
    assert terms("***") == terms("") == terms('"') == []
    hostile = {hit.latent for hit in search.text("near or and", 500)}
    assert hostile and hostile >= {hit.latent for hit in search.text('"NEAR OR AND"', 500)}


def test_the_file_lies_beside_the_artifact_and_is_made_again(index: Index, search: Search) -> None:
    before = search.text("red")
    path = text_path(index)
    assert path.is_file() and path.parent == index.folder.parent
    check_files(index.folder)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE origin SET id = 'another'")
    assert Search(index).text("red") == before
    path.write_bytes(b"damaged")
    assert Search(index).text("red") == before


def test_a_folder_that_cannot_be_written_to_is_named(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.features.search_text.text_path", lambda _: tmp_path / "file" / "x.sqlite")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="make its folder writable"):
        Search(index).text("red")


def test_the_word_at_a_token() -> None:
    assert word_at("the on", "ion", "s are") == "onions"
    assert word_at("ends.", " The", "re is") == " There"
    assert word_at("a", "!", "b") == "!"
    assert word_at("", "", "") == ""
