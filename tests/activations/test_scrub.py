"""Personal data is replaced, counted and nowhere kept; spans stay where they were."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.scrub import Scrubbed, Scrubber
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

TEXT = (
    "My name is Anna van der Berg. Write to anna@post.example or call me on 555 12 34, the card is"
    " 4111 1111 1111 1111, the key AKIAIOSFODNN7EXAMPLE, and I live at 12 Main Street, Springfield, IL 62704."
)
CLEAN = (
    "My name is <NAME>. Write to <EMAIL> or call me on <PHONE>, the card is <CARD>, the key <KEY>, and I live"
    " at <ADDRESS>."
)
PIECES = ("Anna", "Berg", "anna@", "post.example", "555 12", "4111", "AKIA", "Main Street", "62704")


@pytest.fixture(scope="module")
def installed() -> None:
    for name in ("presidio_analyzer", "phonenumbers", "detect_secrets"):
        pytest.importorskip(name, reason="the extra unbraid[scrub] is not installed")


@pytest.fixture
def scrubber(installed: None) -> Scrubber:
    return Scrubber()


def test_each_kind_becomes_its_placeholder_without_the_network(
    scrubber: Scrubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert scrubber.scrub(TEXT).text == CLEAN


@pytest.mark.parametrize(
    "text",
    [
        "The order K22 of 12.04.2021 cost 85 marks, in the years 1939 and 1945.",
        "Pi is 3.14159265358979 and version 2.2.366 came out.",
        "the card 4111 1111 1111 1112 fails the checksum",
        "She is German. Call the doctor on Monday @ noon.",
    ],
)
def test_ordinary_text_stays_as_it_is(scrubber: Scrubber, text: str) -> None:
    assert scrubber.scrub(text).text == text


def test_several_addresses_beside_each_other_are_found(scrubber: Scrubber) -> None:
    text = "a@b.example, c.d@e.example;f+g@h-i.example and @nobody x@y"
    assert scrubber.scrub(text).text == "<EMAIL>, <EMAIL>;<EMAIL> and @nobody x@y"


@pytest.mark.parametrize(
    "piece", ["a.", "A-", "a_", "a@", "Anna ", "12 Main ", "-----BEGIN PRIVATE KEY-----", "1"]
)
def test_hostile_text_takes_no_longer_than_its_length_says(scrubber: Scrubber, piece: str) -> None:
    begun = time.process_time()
    scrubber.scrub(piece * (20_000 // len(piece)) + "@")
    assert time.process_time() - begun < 5  # with the square of the length: minutes


def test_a_private_key_goes_as_a_whole(scrubber: Scrubber) -> None:
    text = "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIB\nabc\n-----END RSA PRIVATE KEY-----\nb"
    assert scrubber.scrub(text).text == "a\n<KEY>\nb"


def test_focus_and_mask_of_every_message_move_along(scrubber: Scrubber) -> None:
    reply = "Thank you anna@post.example, the parcel left."
    at = reply.index("the parcel")
    inside = reply.index("post")
    document = Document.of_messages(
        [{"role": "user", "content": TEXT}, {"role": "assistant", "content": reply}],
        focus=(at, at + 10),
        mask=[(0, TEXT.index("Write"), TEXT.index(" to anna")), (1, inside, inside + 4), (1, 0, len(reply))],
    )
    (new,) = scrubber.documents([document])
    assert new.messages is not None and new.focus is not None
    contents = [m["content"] for m in new.messages]
    assert contents == [CLEAN, "Thank you <EMAIL>, the parcel left."]
    assert contents[1][slice(*new.focus)] == "the parcel"
    assert [contents[n][a:b] for n, a, b in new.mask] == ["Write", "<EMAIL>", contents[1]]


@given(
    st.lists(st.tuples(st.text("ab ", max_size=5), st.text("X", min_size=1, max_size=9)), max_size=5),
    st.data(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_moved_span_holds_the_same_ordinary_characters(
    parts: list[tuple[str, str]], data: st.DataObject
) -> None:
    text, new, found = "", "", []
    for plain, secret in parts:
        text, new = text + plain, new + plain
        found.append((len(text), len(text) + len(secret), "KEY"))
        text, new = text + secret, new + "<KEY>"
    text, new = text + "end", new + "end"
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    low, high = Scrubbed(new, tuple(found)).move(start, end)
    assert 0 <= low < high <= len(new)
    assert new[low:high].replace("<KEY>", "") == text[start:end].replace("X", "")
    touched = sum(a < end and start < b for a, b, _ in found)
    assert new[low:high].count("<KEY>") == touched


def test_ids_do_not_vouch_for_what_was_taken_out(scrubber: Scrubber) -> None:
    text, chat = Document.of_text(TEXT), Document.of_messages([{"role": "user", "content": TEXT}])
    named = [
        dataclasses.replace(text, id=i, stratum="anna@post.example") for i in ("a-7", "anna@post.example")
    ]
    new = list(scrubber.documents([text, chat, *named]))
    assert new[0].id == Document.of_text(CLEAN).id != text.id
    assert new[1].id == Document.of_messages([{"role": "user", "content": CLEAN}]).id
    assert [new[2].id, new[3].id, new[3].stratum] == ["a-7", new[0].id, "<EMAIL>"]
    assert scrubber.counts == dict.fromkeys(("EMAIL", "PHONE", "NAME", "CARD", "ADDRESS", "KEY"), 4)


def test_a_capture_counts_and_keeps_nothing(installed: None, lm: LanguageModel, tmp_path: Path) -> None:
    documents = [
        Document.of_text(f"{TEXT} {n}", id="anna@post.example" if n else None, stratum="anna@post.example")
        for n in range(20)
    ]
    config = CaptureConfig(sites=(Site(1, "mlp_out"),), scrub=True, per_stratum=5, shard_tokens=400)
    store = capture(lm, documents, config, tmp_path / "out")
    facts = store.manifest.facts
    n = store.n_documents
    assert 5 < n < 20 and facts["scrub"]["found"] == dict.fromkeys(facts["scrub"]["found"], n)
    assert facts["strata"] == {"<EMAIL>": {"read": 20, "kept": n}}
    assert "presidio-analyzer" in facts["scrub"]["with"]
    decoded = lm.tokenizer.decode(sorted_tokens(store, 0))
    assert decoded.replace("<|bos|>", "").startswith(CLEAN)
    for path in (tmp_path / "out").iterdir():
        assert not any(piece.encode() in path.read_bytes() for piece in PIECES)
    clean = [
        dataclasses.replace(d, text=(d.text or "").replace(TEXT, CLEAN), id=f"{i}", stratum=None)
        for i, d in enumerate(documents)
    ]
    same = capture(lm, clean, dataclasses.replace(config, scrub=False, per_stratum=None), tmp_path / "same")
    assert same.read("layers.1.mlp_out", 0, 0, 20).equal(store.read("layers.1.mlp_out", 0, 0, 20))


def sorted_tokens(store: Any, document: int) -> list[int]:
    columns = [store.columns(i) for i in range(len(store.shards))]
    rows = [
        (int(p), int(t))
        for c in columns
        for d, p, t in zip(c.documents, c.positions, c.tokens, strict=True)
        if d == document
    ]
    return [token for _, token in sorted(rows)]


def test_a_pipelines_persons_are_names_too(installed: None, tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="the extra unbraid[scrub] is not installed")
    pipeline = spacy.blank("en")
    # Stands in for a trained pipeline, which the tests may not download.
    pipeline.add_pipe("entity_ruler").add_patterns(
        [{"label": "PERSON", "pattern": "Jonas Birk"}, {"label": "ORG", "pattern": "Norvik"}]
    )
    pipeline.to_disk(tmp_path / "pipeline")
    text = "Then Jonas Birk left Norvik."
    assert Scrubber().scrub(text).text == text
    assert Scrubber(str(tmp_path / "pipeline")).scrub(text).text == "Then <NAME> left Norvik."
    with pytest.raises(UserError, match=r"python -m spacy download none_such"):
        Scrubber("none_such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no spaCy pipeline"):
        Scrubber(str(tmp_path / "empty"))


def test_a_missing_library_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(UserError, match=r"pip install 'unbraid\[scrub\]'"):
        Scrubber()
    with pytest.raises(UserError, match="add --scrub"):
        CaptureConfig(sites=(Site(0, "mlp_out"),), scrub_model="x")


def test_records_are_json(scrubber: Scrubber) -> None:
    assert json.loads(json.dumps(scrubber.facts()))["found"]["NAME"] == 0
