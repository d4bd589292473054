"""Activations straight from the model: the rows of a capture that is read in order, and no more work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unbraid.activations import live as room
from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.follow import Following
from unbraid.activations.live import Live
from unbraid.activations.plan import LOOK_AHEAD
from unbraid.activations.reading import CaptureConfig
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

Make = Callable[..., Iterator[Document]]
SITE, OTHER = Site(1, "resid_post"), Site(0, "mlp_in")
SMALL = CaptureConfig(sites=(SITE, OTHER), context=64, batch_tokens=64, shard_tokens=300)


def dealt(source: Live | Following, steps: int = 60, start: int = 0) -> dict[Site, torch.Tensor]:
    parts = list(source.batches((SITE, OTHER), 100, seed=3, steps=steps, start=start))
    assert all(len(part[site]) == 100 for part in parts for site in part)
    return {site: torch.cat([part[site] for part in parts]) for site in (SITE, OTHER)}


def same(one: dict[Site, torch.Tensor], other: dict[Site, torch.Tensor]) -> bool:
    return all(torch.equal(one[site], other[site]) for site in (SITE, OTHER))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "tokens": 2345},
        {"dtype": "int8"},
        {"per_document": 7, "per_stratum": 20, "positions": "all"},
    ],
)
def test_the_rows_are_those_of_a_capture_bit_for_bit(
    lm: LanguageModel, texts: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Over several epochs, whose last groups are not full."""

    def documents() -> Iterable[Document]:
        return (replace(document, stratum=str(n % 3)) for n, document in enumerate(texts(40)))

    config = replace(SMALL, **options)
    store = capture(lm, documents(), config, tmp_path / "acts", seed=5)
    live = Live(lm, documents, config, buffer_tokens=700, seed=5)
    followed = Following(store.folder, buffer_tokens=700)
    rows = dealt(live)
    assert 1.5 * store.n_tokens < 6000 and live.length == store.n_tokens
    assert same(rows, dealt(followed))
    assert live.origin(6000).inputs == store.manifest.inputs
    assert live.origin(6000).facts["reading"]["read"] == store.manifest.facts["read"]
    assert (live.model_name, live.d_in(OTHER)) == (store.model_name, store.d_in(OTHER))


def test_what_was_dealt_out_is_not_read_again(
    lm: LanguageModel, texts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = room.read_batch

    def counted(lm: LanguageModel, batch: Any, config: CaptureConfig) -> Any:
        read.append(sum(piece.rows for piece in batch))
        return real(lm, batch, config)

    monkeypatch.setattr(room, "read_batch", counted)
    whole = Live(lm, lambda: texts(40), SMALL, buffer_tokens=500)
    expected = dealt(whole, 60)
    total = sum(read)
    assert whole.length is not None and whole.length < 6000 < 2 * whole.length
    for start in (0, 4, 5, 33, whole.length // 100, 59):
        read.clear()
        again = Live(lm, lambda: texts(40), SMALL, buffer_tokens=500)
        rest = dealt(again, 60, start)
        assert same(rest, {site: rows[100 * start :] for site, rows in expected.items()})
        skipped = start * 100 // 500 * 500  # whole groups
        assert sum(read) <= total - skipped + 2 * max(read)
        assert again.so_far(6000) == whole.so_far(6000) and again.origin(6000) == whole.origin(6000)
    # The first group is looked at several times before training, and computed once.
    read.clear()
    again = Live(lm, lambda: texts(40), SMALL, buffer_tokens=500)
    for _ in range(3):
        assert again.first_group((SITE, OTHER)) == 500
        dealt(again, 3)
    assert sum(read) < 500 + 64


def test_memory_is_a_buffer_whatever_the_corpus(lm: LanguageModel) -> None:
    """An endless corpus; only what the buffer and one look-ahead of the plan hold is ever taken of it."""
    taken = 0

    def endless() -> Iterator[Document]:
        nonlocal taken
        while True:
            taken += 1
            yield Document.of_text("wait red ball " * 10, id=str(taken))

    live = Live(lm, endless, SMALL, buffer_tokens=500)
    dealt(live, 5)
    per_document = live._pass.plan.planned / live._pass.plan.read  # type: ignore[union-attr]
    assert taken * per_document < 500 + 2 * LOOK_AHEAD * SMALL.batch_tokens
    before = taken
    assert live.origin(500).facts["reading"]["documents"] == before == taken
    held = {site: buffer.values.data_ptr() for site, buffer in live._buffers.items()}
    dealt(live, 30)
    assert {site: buffer.values.data_ptr() for site, buffer in live._buffers.items()} == held
    assert all(len(buffer) == 500 for buffer in live._buffers.values())


def test_the_model_is_run_with_the_same_threads_each_time(
    lm: LanguageModel, texts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = room.read_batch

    def watched(*arguments: Any) -> Any:
        seen.add(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(room, "read_batch", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        live = Live(lm, lambda: texts(60), SMALL, buffer_tokens=300)
        for _ in live.batches((SITE, OTHER), 100, seed=0, steps=12):
            torch.set_num_threads(1)  # as the compiled loops do
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


def test_what_cannot_be_read_is_refused(lm: LanguageModel, texts: Make) -> None:
    for config, word in (
        (replace(SMALL, sites=(Site(77, "resid_post"),)), "77"),
        (replace(SMALL, context=9999), "--context"),
        (replace(SMALL, skip_norm_above=3.0), "capture on disk"),
    ):
        with pytest.raises(UserError, match=word):
            Live(lm, lambda: texts(9), config)
    with pytest.raises(UserError, match="no tokens to train on"):
        dealt(Live(lm, lambda: iter(()), SMALL))
    with pytest.raises(UserError, match="is not read; choose one of"):
        Live(lm, lambda: texts(9), SMALL).site("layers.2.resid_post")
