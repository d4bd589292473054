"""A capture that goes on from a finished one holds every token once and leaves that one as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unbraid.activations import scrub, shards
from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import KIND, ActivationStore
from unbraid.activations.text import Document
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

Make = Callable[..., Iterator[Document]]
SITE = Site(1, "resid_post")
SMALL = CaptureConfig(sites=(SITE,), context=64, batch_tokens=256, dtype="float32", shard_tokens=100)


def rows_of(folder: Path) -> dict[tuple[int, ...], torch.Tensor]:
    """Every row's value by its document, position and token; each of these must be there once."""
    store = ActivationStore(folder, check=True)
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for i in range(len(store.shards)):
        c, values = store.columns(i), store.read(SITE, i)
        places = torch.stack([c.documents, c.positions, c.tokens], dim=1).tolist()
        found |= dict(zip(map(tuple, places), values, strict=True))
    assert len(found) == store.n_tokens
    return found


def same_rows(one: Path, other: Path) -> None:
    a, b = rows_of(one), rows_of(other)
    assert a.keys() == b.keys()
    for place, value in a.items():  # other batches round otherwise
        torch.testing.assert_close(value, b[place], rtol=1e-4, atol=1e-4)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budgets=st.lists(st.integers(1, 220), min_size=2, max_size=3), chosen=st.booleans())
def test_in_however_many_pieces_a_text_is_captured_its_tokens_are_the_same(
    lm: LanguageModel, texts: Make, tmp_path_factory: pytest.TempPathFactory, budgets: list[int], chosen: bool
) -> None:
    root = tmp_path_factory.mktemp("pieces")
    config = dataclasses.replace(SMALL, per_document=9) if chosen else SMALL
    last = None
    for number, tokens in enumerate(budgets):
        config = dataclasses.replace(config, tokens=tokens)
        out = root / str(number)
        store = capture(lm, texts(120), config, out, append=last)
        assert store.n_tokens == sum(budgets[: number + 1])
        last = out
    config = dataclasses.replace(config, tokens=sum(budgets))
    whole = capture(lm, texts(120), config, root / "whole")
    assert last is not None
    same_rows(last, root / "whole")
    grown = ActivationStore(last)
    assert list(grown.documents()) == list(whole.documents())
    assert grown.manifest.inputs["corpus"] == whole.manifest.inputs["corpus"]


def test_full_shards_are_links_and_the_old_capture_stays_as_it_is(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    old = capture(lm, texts(60), dataclasses.replace(SMALL, tokens=250), tmp_path / "old")
    before = bytes_of(tmp_path / "old")
    new = capture(lm, texts(60), dataclasses.replace(SMALL, tokens=250), tmp_path / "new", append=old.folder)
    assert bytes_of(tmp_path / "old") == before and ActivationStore(old.folder, check=True).id == old.id
    same = [os.path.samefile(a, b) for a, b in zip(old.shards, new.shards, strict=False)]
    assert same == [True, True, False] and [new.rows(i) for i in range(5)] == [100] * 5
    assert new.manifest.inputs["appended"] == old.id and new.n_tokens == 500
    assert new.manifest.facts["appended"]["tokens"] == 250
    report = verify(tmp_path)
    assert not report.problems and "appended" not in report.external


def test_where_nothing_can_be_linked_shards_are_copied(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, tokens=250)
    old = capture(lm, texts(60), config, tmp_path / "old")
    capture(lm, texts(60), config, tmp_path / "linked", append=old.folder)

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shards.os, "link", refuse)
    copied = capture(lm, texts(60), config, tmp_path / "copied", append=old.folder)
    assert bytes_of(tmp_path / "copied") == bytes_of(tmp_path / "linked")
    assert not os.path.samefile(old.shards[0], copied.shards[0])


def test_another_corpus_is_appended_whole(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    first, second = list(texts(20)), list(texts(15, seed=1))
    old = capture(lm, first, SMALL, tmp_path / "old")
    new = capture(lm, second, SMALL, tmp_path / "new", append=old.folder)
    capture(lm, [*first, *second], SMALL, tmp_path / "whole")
    same_rows(tmp_path / "new", tmp_path / "whole")
    assert [r["id"] for r in new.documents()] == [d.id for d in [*first, *second]]
    ids = "".join(f'"{document.id}"\n' for document in [*first, *second])
    assert new.manifest.inputs["corpus"] == hashlib.sha256(ids.encode()).hexdigest()
    # The last corpus goes on, one before it cannot.
    longer = list(texts(25, seed=1))
    capture(lm, longer, SMALL, tmp_path / "longer", append=new.folder)
    capture(lm, [*first, *longer], SMALL, tmp_path / "whole longer")
    same_rows(tmp_path / "longer", tmp_path / "whole longer")
    with pytest.raises(UserError, match="from document 1 on, but another one after it"):
        capture(lm, texts(30), SMALL, tmp_path / "other", append=new.folder)
    assert not list(tmp_path.glob(".*"))


def strata(documents: Iterable[Document]) -> Iterator[Document]:
    for n, document in enumerate(documents):
        yield dataclasses.replace(document, stratum="often" if n % 8 else "rare")


def test_counts_of_all_corpora_are_added_up(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def addresses(text: str) -> Iterator[tuple[int, int, str]]:
        return ((found.start(), found.end(), "EMAIL") for found in re.finditer(r"\S+@\S+", text))

    monkeypatch.setattr(scrub, "LIBRARIES", ())  # the counting is looked at, not the finding
    monkeypatch.setattr(scrub, "_finders", lambda: [addresses])

    def documents(n: int, seed: int) -> Iterator[Document]:
        for k, document in enumerate(strata(texts(n, seed=seed))):
            yield dataclasses.replace(document, text=f"{document.text} write to zoe{k}@example.com")

    config = dataclasses.replace(SMALL, per_stratum=4, scrub=True, skip_norm_above=1.1, tokens=350)
    pieces = (("a", 60, 0, None), ("b", 60, 0, "a"), ("c", 60, 1, "b"), ("d", 60, 1, "c"))
    facts: dict[str, Any] = {}
    for out, n, seed, last in pieces:
        append = None if last is None else tmp_path / last
        store = capture(lm, documents(n, seed), config, tmp_path / out, append=append)
        facts[out] = store.manifest.facts
        read = sum(counts["kept"] for counts in store.manifest.facts["strata"].values())
        assert read == store.n_documents == facts[out]["scrub"]["found"]["EMAIL"]
        skipped = facts[out]["skip_norm_above"]
        assert skipped["skipped"] == sum(record["skipped"] for record in store.documents())
        assert store.n_tokens == sum(record["captured"] for record in store.documents())
        assert skipped["skipped"] + store.n_tokens == 350 * (1 + "abcd".index(out))
        assert skipped["medians"] == facts["a"]["skip_norm_above"]["medians"]
    corpora = [facts[out].get("appended", {}).get("corpora") for out in "abcd"]
    assert corpora == [None, [0], [0, facts["b"]["documents"]], [0, facts["b"]["documents"]]]
    # Two pieces of one text choose what one capture of both chooses.
    whole = capture(lm, documents(60, 0), dataclasses.replace(config, tokens=700), tmp_path / "whole")
    assert whole.manifest.facts["strata"] == facts["b"]["strata"]
    assert [r["id"] for r in whole.documents()] == [
        r["id"] for r in ActivationStore(tmp_path / "b").documents()
    ]


def test_a_text_that_is_not_the_one_of_then_is_refused(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, tokens=600)
    old = capture(lm, texts(60), config, tmp_path / "old")
    read = old.n_documents
    other, edited, masked = list(texts(60)), list(texts(60)), list(texts(60))
    other[3] = Document.of_text("wait")
    edited[3] = dataclasses.replace(edited[3], text=f"{edited[3].text} wait wait")
    before = sorted(tmp_path.iterdir())
    for documents, says in (
        (other, rf"document {other[3].id} .* stands where line 4 of .*documents.jsonl has {masked[3].id}"),
        (edited, rf"document {edited[3].id} .* stands where line 4 of"),
        (list(texts(60))[:5], "the text ends where line 6 of .*documents.jsonl"),
        ([], "no documents"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            capture(lm, documents, config, tmp_path / "new", append=old.folder)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before and read > 6
    whole = capture(lm, texts(20), SMALL, tmp_path / "whole")
    with pytest.raises(UserError, match="no token that was not captured before"):
        capture(lm, texts(20), SMALL, tmp_path / "new", append=whole.folder)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context": 32}, "context 64 and not 32"),
        ({"sites": (Site(0, "resid_post"),)}, "sites layers.1.resid_post and not layers.0.resid_post"),
        (
            {"dtype": "float16", "positions": "last"},
            "dtype float32 and not float16, positions all and not last",
        ),
        ({"shard_tokens": 99}, "shard_tokens 100 and not 99"),
    ],
)
def test_other_settings_are_refused_by_name(
    lm: LanguageModel, texts: Make, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    old = capture(lm, texts(5), SMALL, tmp_path / "old")
    with pytest.raises(UserError, match=f"old was captured with {says}; give"):
        capture(lm, texts(9), dataclasses.replace(SMALL, **changes), tmp_path / "new", append=old.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    more = dataclasses.replace(SMALL, tokens=20, batch_tokens=999)
    assert capture(lm, texts(9), more, tmp_path / "new", append=old.folder).n_tokens == old.n_tokens + 20


def test_what_no_capture_made_is_refused(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    old = capture(lm, texts(5), SMALL, tmp_path / "old")
    (old.folder / "settings.json").unlink()
    made = old.manifest
    write_manifest(old.folder, kind=KIND, command="", seed=None, inputs=made.inputs, facts=made.facts)
    with pytest.raises(UserError, match="old was not made by `unbraid capture`"):
        capture(lm, texts(9), SMALL, tmp_path / "new", append=old.folder)
    with pytest.raises(UserError, match="is not an artifact of kind activations"):
        capture(lm, texts(9), SMALL, tmp_path / "new", append=tmp_path)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_damaged_shard_of_the_old_capture_is_named(
    lm: LanguageModel, texts: Make, tmp_path: Path, shard: int
) -> None:
    config = dataclasses.replace(SMALL, tokens=250)
    old = capture(lm, texts(60), config, tmp_path / "old")
    data = bytearray(old.shards[shard].read_bytes())
    data[-9] ^= 1
    old.shards[shard].write_bytes(data)
    with pytest.raises(
        IntegrityError, match=rf"old/shard-0000{shard}.safetensors is missing or not .* restore it"
    ):
        capture(lm, texts(60), config, tmp_path / "new", append=old.folder)
    old.shards[shard].write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=rf"old/shard-0000{shard}.safetensors has \d+ bytes where"):
        capture(lm, texts(60), config, tmp_path / "new", append=old.folder)
    assert not (tmp_path / "new").exists()


class Stop(Exception):
    pass


@pytest.mark.parametrize("rows", [1, 120])
@pytest.mark.parametrize("limit", [None, 1.2])
def test_a_stopped_append_continues_to_the_same_bytes(
    lm: LanguageModel, texts: Make, tmp_path: Path, rows: int, limit: float | None
) -> None:
    config = dataclasses.replace(SMALL, tokens=350, skip_norm_above=limit)
    old = capture(lm, texts(60), config, tmp_path / "old")
    capture(lm, texts(60), config, tmp_path / "whole", append=old.folder)

    def stop(done: int, total: int, note: str = "") -> None:
        if done >= rows:
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            capture(lm, texts(60), config, tmp_path / "out", append=old.folder, progress=stop)
    capture(lm, texts(60), config, tmp_path / "out", append=old.folder)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
