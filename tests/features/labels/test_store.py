"""Labels, reviews and lists: nothing said is lost, whoever writes at once, and files merge."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from unbraid.features.labels.label import Label, score_of
from unbraid.features.labels.store import Labels, labels_path
from unbraid.manifest.errors import IntegrityError, UserError

SAE = "a" * 64


def _clock() -> Iterator[str]:
    second = 0
    while True:
        second += 1
        yield f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000000Z"


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    ticks = _clock()
    return Labels(tmp_path / "index.labels.sqlite", SAE, clock=lambda: next(ticks))


def test_a_label_is_proposed_and_decided_and_all_of_it_is_kept(labels: Labels) -> None:
    label = labels.propose(3, "  the word\n'refund' ", by="lexical", kind="lexical", scores={"f1": 0.5})
    assert (label.text, label.status, label.sae) == ("the word 'refund'", "proposed", SAE)
    assert labels.queue() == [label]
    labels.review(label.id, "needs work", by="anna", why="too narrow")
    found = labels.review(label.id, "accepted", by="ben")
    assert found.status == "accepted"
    assert [(r.by, r.verdict, r.why) for r in found.reviews] == [
        ("anna", "needs work", "too narrow"),
        ("ben", "accepted", ""),
    ]
    assert labels.score(label.id, {"detection": {"value": 0.9}}).scores == {"detection": {"value": 0.9}}
    assert score_of(labels.label(label.id), "detection") == 0.9
    assert score_of(labels.label(label.id), "f1") is None
    history = labels.history(3)
    assert [line["what"] for line in history] == ["label", "scores", "review", "review", "scores"]
    assert labels.queue() == [] and labels.counts()["accepted"] == 1
    assert labels.history(4) == []


def test_the_current_label_is_the_accepted_one_then_the_newest_and_never_a_rejected_one(
    labels: Labels,
) -> None:
    first = labels.propose(1, "first", by="x", kind="person")
    second = labels.propose(1, "second", by="x", kind="person")
    other = labels.propose(2, "other", by="x", kind="person")
    assert labels.current() == {1: second, 2: other}
    labels.review(first.id, "accepted", by="y")
    assert labels.current([1])[1].text == "first"
    labels.review(first.id, "rejected", by="z", why="no")
    assert labels.current([1])[1].text == "second"
    labels.review(second.id, "rejected", by="z", why="no")
    assert labels.current([1, 5]) == {}
    assert [label.status for label in labels.of(1)] == ["rejected", "rejected"]
    assert len(labels.current(range(2000))) == 1  # more than one query's worth


def test_two_reviewers_have_queues_of_their_own(labels: Labels) -> None:
    one, two = (labels.propose(latent, "x", by="x", kind="k") for latent in (1, 2))
    labels.review(one.id, "accepted", by="anna")
    assert [label.id for label in labels.queue(by="anna")] == [two.id]
    assert [label.id for label in labels.queue(by="ben")] == [one.id, two.id]
    assert [label.id for label in labels.queue(by="ben", limit=1, offset=1)] == [two.id]
    assert [label.id for label in labels.queue(status="accepted")] == [one.id]


def test_agreement_takes_each_persons_latest_verdict(labels: Labels) -> None:
    assert labels.agreement() is None
    for latent in range(12):
        label = labels.propose(latent, "x", by="x", kind="k")
        labels.review(label.id, "rejected", by="anna", why="first thought")
        labels.review(label.id, "accepted" if latent % 2 else "rejected", by="anna", why="w")
        labels.review(label.id, "accepted" if latent % 2 else "rejected", by="ben", why="w")
    found = labels.agreement()
    assert found is not None and found.units == 12
    assert found.percent.value == 1 and found.krippendorff is not None and found.krippendorff.value == 1
    json.dumps(found.as_dict(), allow_nan=False)


def test_lists_are_kept_in_order_and_dropped_from(labels: Labels) -> None:
    for latent in (5, 3, 9, 3):
        labels.keep("to read", latent)
    labels.drop("to read", 5)
    labels.drop("to read", 77)
    labels.keep("other", 1)
    assert labels.list("to read") == [3, 9] and labels.lists() == {"other": 1, "to read": 2}
    labels.drop("other", 1)
    assert labels.lists() == {"to read": 2} and labels.list("other") == []
    labels.keep("other", 1)
    assert labels.list("other") == [1]


def test_what_was_made_from_labels_can_tell_that_it_is_stale(labels: Labels) -> None:
    seen = [labels.revision()]
    label = labels.propose(1, "x", by="x", kind="k")
    seen.append(labels.revision())
    labels.review(label.id, "accepted", by="y")
    seen.append(labels.revision())
    labels.keep("l", 1)
    seen.append(labels.revision())
    assert seen == sorted(set(seen))


def _fill(labels: Labels) -> list[Label]:
    made = [labels.propose(n % 3, f"label {n}", by="x", kind="k", model="m") for n in range(7)]
    labels.review(made[2].id, "rejected", by="y", why="شاهد 🙂")
    labels.score(made[2].id, {"detection": 0.7})
    labels.keep("l", 4)
    labels.drop("l", 4)
    return made


def test_an_export_comes_back_as_it_was_and_merges_without_duplicates(labels: Labels, tmp_path: Path) -> None:
    _fill(labels)
    out = tmp_path / "labels.jsonl"
    assert labels.export(out) == 11
    again = Labels(tmp_path / "again.sqlite", SAE)
    assert again.load(out) == 11 and again.load(out) == 0
    assert again.current() == labels.current() and again.lists() == labels.lists()
    again.export(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    again.propose(1, "only here", by="z", kind="k")
    again.export(tmp_path / "more.jsonl")
    assert labels.load(tmp_path / "more.jsonl") == 1
    # What was added is one line added, and no other line moved or changed.
    before, after = out.read_text().splitlines(), (tmp_path / "more.jsonl").read_text().splitlines()
    assert len(after) == len(before) + 1 and [line for line in after if line in before] == before
    unbound = Labels(tmp_path / "unbound.sqlite")
    assert unbound.load(out) == 11 and unbound.sae == SAE


def test_an_export_that_was_compressed_comes_back(labels: Labels, tmp_path: Path) -> None:
    _fill(labels)
    labels.export(tmp_path / "labels.jsonl")
    data = gzip.compress((tmp_path / "labels.jsonl").read_bytes())
    for name in ("labels.jsonl.gz", "labels"):  # what it is called does not matter
        (tmp_path / name).write_bytes(data)
        assert Labels(tmp_path / f"{name}.sqlite", SAE).load(tmp_path / name) == 11
    for broken in (data[:-9], data[:20] + b"x" + data[21:]):
        (tmp_path / "broken.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken.gz is no gzip file, or is damaged .*; fetch it again"):
            Labels(tmp_path / "broken.sqlite", SAE).load(tmp_path / "broken.gz")
    (tmp_path / "text.gz").write_bytes(gzip.compress("café".encode("latin-1")))
    with pytest.raises(UserError, match=r"text\.gz is not UTF-8"):
        Labels(tmp_path / "text.sqlite", SAE).load(tmp_path / "text.gz")


def test_lines_that_were_tampered_with_or_belong_elsewhere_are_named(labels: Labels, tmp_path: Path) -> None:
    _fill(labels)
    good = tmp_path / "good.jsonl"
    labels.export(good)
    lines = good.read_text().splitlines()
    out = tmp_path / "bad.jsonl"

    def refused(text: str, match: str, sae: str = SAE) -> None:
        out.write_text(text, encoding="utf-8")
        target = Labels(tmp_path / "target.sqlite", sae)
        with pytest.raises(UserError, match=match):
            target.load(out)
        assert target.current() == {}

    refused(lines[0].replace("label 0", "label X"), "line 1 of .*changed after it was exported")
    refused("\n".join([*lines, "[1]"]), "line 12 .*no JSON object")
    refused("{", "line 1 of")
    refused(lines[0].replace('"by": "x", ', ""), "field 'by' is missing")
    refused(lines[0].replace("label 0", "label\\u0000"), "control character")
    refused(lines[0].replace('"latent": 0', '"latent": -1'), "no latent")
    refused('{"what": "poem", "at": "x"}', "nothing called 'poem'")
    refused("\n".join(lines), "about autoencoder aaaaaaaaaaaa…, not bbb", sae="b" * 64)
    review = next(line for line in lines if '"what": "review"' in line)
    refused(review, "neither in the")
    refused("[" * 100_000, "line 1 of")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("x" * 501, "501 characters"),
        ("bell\x07", r"U\+0007"),
        ("turn \u202e round", r"U\+202E"),
        ("half \ud800", r"U\+D800"),
    ],
)
def test_text_that_cannot_be_shown_is_refused(labels: Labels, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        labels.propose(1, text, by="x", kind="k")
    assert not labels.path.exists()


def test_other_mistakes_are_named(labels: Labels, tmp_path: Path) -> None:
    label = labels.propose(1, "<script>alert(1)</script> שלום 👩‍👩‍👧", by="x", kind="k")
    assert labels.label(label.id).text.startswith("<script>")
    with pytest.raises(UserError, match="why the label is rejected is empty"):
        labels.review(label.id, "rejected", by="y")
    with pytest.raises(UserError, match="no verdict 'maybe'"):
        labels.review(label.id, "maybe", by="y", why="z")
    with pytest.raises(UserError, match="has no label 'nope'"):
        labels.review("nope", "accepted", by="y")
    with pytest.raises(UserError, match="-1 is no latent"):
        labels.propose(-1, "x", by="x", kind="k")
    with pytest.raises(UserError, match="finite JSON"):
        labels.score(label.id, {"f1": float("nan")})
    with pytest.raises(UserError, match="belong"):
        Labels(tmp_path / "new.sqlite").propose(1, "x", by="x", kind="k")
    with pytest.raises(UserError, match="holds labels of autoencoder aaaaaaaaaaaa…"):
        Labels(labels.path, "b" * 64)
    assert Labels(labels.path).sae == SAE
    assert Labels(tmp_path / "missing.sqlite", SAE).current() == {}


def test_files_that_hold_no_labels_are_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database" * 100)
    with pytest.raises(IntegrityError, match=r"text\.sqlite is no file of labels"):
        Labels(text, SAE)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="not one of labels"):
        Labels(foreign, SAE)
    newer = tmp_path / "newer.sqlite"
    Labels(newer, SAE).propose(1, "x", by="x", kind="k")
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="schema 99"):
        Labels(newer, SAE)


def test_labels_lie_beside_their_index(tmp_path: Path) -> None:
    assert labels_path(tmp_path / "my.index") == tmp_path / "my.index.labels.sqlite"


def _write(path: Path, who: int) -> None:
    labels = Labels(path, SAE)
    for n in range(20):
        label = labels.propose(n, f"label {who} {n}", by=f"writer {who}", kind="k")
        labels.review(label.id, "accepted", by=f"writer {who}")


def test_processes_and_threads_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, who)) for who in range(2)]
    threads = [threading.Thread(target=_write, args=(path, who)) for who in range(2, 5)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    labels = Labels(path)
    assert labels.counts()["accepted"] == 100 and len(labels.current()) == 20


def test_a_file_that_another_has_opened_and_not_yet_written_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    path.touch()
    early = Labels(path, SAE)
    assert early.current() == {} and early.counts()["proposed"] == 0 and path.stat().st_size == 0
    with sqlite3.connect(path, isolation_level=None) as other:  # has begun to make the tables
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE sae (id TEXT NOT NULL)")
        assert Labels(path, SAE).current() == {}
        other.execute("ROLLBACK")
    early.propose(1, "said", by="one", kind="k")
    assert Labels(path).current()[1].text == "said"


def test_two_who_make_the_file_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Labels(tmp_path / "labels.sqlite", SAE), Labels(tmp_path / "labels.sqlite", SAE)
    make = Labels._make

    def late(self: Labels, connection: sqlite3.Connection) -> None:
        monkeypatch.setattr(Labels, "_make", make)
        other.propose(2, "first", by="other", kind="k")  # between opening the file and making its tables
        make(self, connection)

    monkeypatch.setattr(Labels, "_make", late)
    one.propose(1, "second", by="one", kind="k")
    assert {label.text for label in one.current().values()} == {"first", "second"}
