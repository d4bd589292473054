"""Full text finds what was said where it was said, and no query can break it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.features import search_text
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search import Search
from unbraid.features.search_text import spaced, terms, text_path, word_at
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files

from .handmade import Made, handmade

PASSAGES = [
    ["I", " want", " a", " ref", "und", " for", " my", " red", " ball"],
    ["the", " ref", "unds", " are", " late", " and", " the", " red", " pan", " is", " hot"],
    ["one", " ref", "und", " a", " day", ",", " red", " NEAR", " OR", " AND", " col", ":", "x"],
    ["<script>", "alert", "('", "x", "')", "</script>", " Zoë", "'s", " café"],
    ["日本", "語の", "文章", "です"],
    ["two", " ref", "und", " or", " one"],
]
# Where each latent fires; the strongest first.
LATENTS = [
    Made([(0, 4, 5.0), (1, 2, 4.0), (2, 2, 3.0)], promoted=[" money"]),  # 0: refund, refunds, refund
    Made([(0, 3, 5.0), (0, 4, 4.0), (2, 2, 3.0), (5, 1, 2.0)], promoted=[" red"]),  # 1: refund, thrice
    Made([(0, 7, 2.0), (1, 1, 1.0)]),  # 2: red, and once a refund
    Made([(1, 7, 9.0), (2, 6, 3.0), (0, 7, 1.0)]),  # 3: always red
    Made([(3, 1, 1.0)]),  # 4: in a script
    Made([(3, 8, 1.0)]),  # 5: café
    Made([(4, 2, 1.0)]),  # 6: unspaced
    Made([], promoted=[" refund"]),  # 7: dead, yet it promotes something
    Made(),  # 8: says nothing
    Made([(2, 9, 1.0), (2, 10, 0.5)]),  # 9: AND
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return handmade(tmp_path_factory.mktemp("search") / "index", PASSAGES, LATENTS)


@pytest.fixture(scope="module")
def search(index: Index) -> Search:
    return Search(index)


def found(search: Search, query: str, limit: int = 100) -> list[tuple[int, float]]:
    return [(hit.latent, hit.score) for hit in search.text(query, limit)]


def latents(search: Search, query: str) -> list[int]:
    return [latent for latent, _ in found(search, query)]


def test_places_rank_first_and_firings_within_them(search: Search) -> None:
    # 1 fires on "refund" in three different passages, 0 in two.
    assert found(search, "refund") == [(1, 4), (0, 3), (7, 2), (3, 1), (2, 1), (9, 1)]
    assert found(search, "red") == [(3, 4), (2, 3), (1, 2), (0, 1), (9, 1)]
    assert [hit.why for hit in search.text("red", 4)] == [
        "fires mostly on it", "fires on it", "promotes it", "stands in its examples",
    ]  # fmt: skip
    assert found(search, "red", 2) == [(3, 4), (2, 3)] and found(search, "red", 0) == []
    assert latents(search, "nowhere") == []


def test_words_are_whole_although_tokens_are_pieces(search: Search) -> None:
    assert latents(search, "ref") == latents(search, "und") == []
    assert set(latents(search, "ref*")) == {0, 1, 2, 3, 7, 9}
    assert word_at("the on", "ion", "s are") == ("onions", "the onions are")
    assert word_at("ends.", " The", "re is so") == ("There", "ends. There is")
    assert word_at("one a", "!", "b two") == ("!", "a!b") and word_at("", "", "") == ("", "")


def test_all_words_must_stand_there_and_phrases_together(search: Search) -> None:
    assert latents(search, "red ball") == [1, 0, 3, 2]
    assert found(search, '"red ball"') == [(3, 3), (2, 3), (1, 1), (0, 1)]
    assert latents(search, '"ball red"') == []
    assert latents(search, "pan ball") == [0, 3, 2] and latents(search, '"ball one"') == []


def test_no_phrase_reaches_from_one_example_into_the_next(index: Index, search: Search) -> None:
    ends = [example.tokens[-1].strip() for example in index.latent(3).top]
    begins = [example.tokens[0].strip() for example in index.latent(3).top]
    assert latents(search, f'"{PASSAGES[1][-1]} {PASSAGES[2][0]}"') == [], (ends, begins)


def test_case_accents_and_scripts_without_spaces(search: Search) -> None:
    assert latents(search, "CAFE") == latents(search, "café") == [5, 4]
    assert latents(search, "文章") == latents(search, "本語") == [6] and latents(search, "章文") == []
    assert spaced("a日本b") == "a 日  本 b"


def test_operators_are_words(search: Search) -> None:
    assert terms("red OR ball") == ['"red"', '"OR"', '"ball"']
    assert terms('a "b c" d*') == ['"a"', '"b c"', '"d*"*']
    assert terms("***") == terms("") == terms('"') == terms("_") == []
    assert latents(search, "NEAR OR AND") == [1, 0, 3, 9]
    assert latents(search, "<script>alert") == [4, 5]


HOSTILE = [
    '"', "'", "*", "a*b*", "NEAR(", "{fires} : x", "-red", "^red", "red OR", "(", ")", "\0", "a\0b", "\ud800",
    "'; DROP TABLE said; --", "%", "_", '""""', "red\0*", "ｆ" * 9999,
    "red " * 1000, "\ue000", "+", ": :", "🙂", "a* " * 500, '"' * 999, "fires:red", "said MATCH x",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE)
def test_no_query_fails_or_changes_anything(search: Search, query: str) -> None:
    search.text(query)
    assert latents(search, "red") == [3, 2, 1, 0, 9]


@settings(max_examples=200, deadline=None)
@given(query=st.text(max_size=40) | st.text(alphabet='"*():^-+{} ANDORNT\0\ud800é日', max_size=40))
def test_no_query_fails_whatever_it_is(search: Search, query: str) -> None:
    for hit in search.text(query):
        assert 0 <= hit.latent < len(LATENTS)


def test_a_common_word_beside_a_rare_one_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_text, "COMMON_FROM", 0)
    # Else the search would have to pass over nearly all latents.
    passages = [["the", f" thing{n}"] for n in range(20)]
    search = Search(handmade(tmp_path / "index", passages, [Made([(n, 1, 1.0)]) for n in range(20)]))
    assert latents(search, "the thing7") == [7] and len(latents(search, "the")) == 20
    assert latents(search, "thing7 the thing8") == []


def test_a_latent_of_many_words_is_found_by_each(tmp_path: Path) -> None:
    # Its five strongest firings are on one word, and 15 weaker ones on five others, of which one is a piece.
    words = [" head", " rash", " cough", " fever", " cold"]
    passages = [*([" my", " ache"] for _ in range(5)), *([" a", w, "ache"] for w in words for _ in range(3))]
    fires = [(n, 1, 20.0 - n) for n in range(20)]
    search = Search(
        handmade(tmp_path / "index", [*passages, [" oh", " dear"]], [Made(fires), Made([(20, 1, 1.0)])])
    )
    assert found(search, "ache") == [(0, 4)]
    for word in ("headache", "rashache", "coughache", "feverache", "coldache"):
        assert found(search, word) == [(0, 3)]
    assert found(search, "dear") == [(1, 3)] and found(search, "head") == []


def test_a_phrase_is_what_a_latent_fires_on_where_it_fires_within(tmp_path: Path) -> None:
    # 0 fires in the middle of "hi there you", 1 beside it, and more often; 2 on "hi" elsewhere.
    passages = [[" well", " hi", " there", " you", " old", " man"], [" oh", " hi"]]
    latents = [Made([(0, 2, 1.0)]), Made([(0, 4, 1.0), (0, 5, 0.5)]), Made([(1, 1, 1.0)])]
    search = Search(handmade(tmp_path / "index", passages, latents))
    assert [(hit.latent, hit.why) for hit in search.text('"hi there"')] == [
        (0, "fires within it"), (1, "stands in its examples"),
    ]  # fmt: skip
    assert found(search, '"hi there you"') == [(0, 3), (1, 1)] == found(search, '"hi there" "there you"')
    assert found(search, "hi") == [(2, 3), (1, 1), (0, 1)]


def test_those_that_fire_most_come_first_whichever_table_they_are_in(tmp_path: Path) -> None:
    # Latent n fires on (7n mod 40) / 4 other words of a passage beside "here", which it stands next to.
    passages = [["here", *(f" w{n}x{i}" for i in range(11))] for n in range(40)]
    made = [Made([(n, 1 + i, 9.0 - i) for i in range(1 + 7 * n % 40 // 4)]) for n in range(40)]
    search = Search(handmade(tmp_path / "index", passages, made))
    wanted = sorted(range(40), key=lambda n: (-len(made[n].fires), n))
    for limit in (1, 2, 3, 6, 20, 39, 40, 100):
        assert [hit.latent for hit in search.text("here", limit)] == wanted[:limit]
        assert [hit.latent for hit in search.text("her*", limit)] == wanted[:limit]
    with sqlite3.connect(text_path(search.index)) as connection:
        ask = "SELECT count(*) FROM {name} WHERE {name} MATCH 'here'"
        held = [connection.execute(ask.format(name=name)).fetchone()[0] for name in search_text._AROUND]
    assert held == [2, 3, 15, 20]


def test_labels_come_first_and_are_searched_as_they_stand_now(index: Index, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    search = Search(index, labels)
    assert latents(search, "red")[0] == 3
    wrong = labels.propose(8, "red herrings", by="a", kind="manual")
    good = labels.propose(5, "things that are red", by="a", kind="manual")
    assert found(search, "red")[:3] == [(8, 5), (5, 5), (3, 4)]  # the shorter label fits better
    assert search.text("red")[0].why == "label: red herrings"
    labels.review(wrong.id, "rejected", by="b", why="it never fires")
    assert latents(search, "red")[:2] == [5, 3] and found(search, "herrings") == []
    newer = labels.propose(5, "colours", by="a", kind="manual")
    labels.review(newer.id, "accepted", by="b")
    assert 5 not in latents(search, "red") and found(search, "colours") == [(5, 5)]
    assert good.text == "things that are red"
    for query in HOSTILE:
        search.text(query)


def test_the_file_lies_beside_the_artifact_and_is_made_again(index: Index, search: Search) -> None:
    before = found(search, "red")
    path = text_path(index)
    assert path.is_file() and path.parent == index.folder.parent
    check_files(index.folder)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE origin SET id = 'another'")
    assert found(Search(index), "red") == before
    path.write_bytes(b"damaged")
    assert found(Search(index), "red") == before


def test_a_folder_that_cannot_be_written_to_is_named(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.features.search_text.text_path", lambda _: tmp_path / "file" / "x.sqlite")  # type: ignore[reportUnknownLambdaType]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="make its folder writable"):
        Search(index).text("red")
