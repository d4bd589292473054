"""A capture read while it is written: the same rows whoever is faster, and a clear word when it stops."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations import follow as following
from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.follow import Following, Stalled
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building, is_held, partial_of
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

Make = Callable[..., Iterator[Document]]
SITE, OTHER = Site(1, "resid_post"), Site(0, "mlp_out")
SMALL = CaptureConfig(sites=(SITE, OTHER), context=64, batch_tokens=256, shard_tokens=300)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def until(tokens: int) -> Callable[..., None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done >= tokens:
            raise Killed

    return progress


def follow(folder: Path, buffer: int = 1000, **more: float) -> Following:
    return Following(folder, buffer_tokens=buffer, **{"patience": 0.05, "poll": 0.01, **more})


def dealt(source: Following, size: int = 128, **more: int) -> list[torch.Tensor]:
    steps = {"seed": 0, "steps": 40, **more}
    return [batch[SITE] for batch in source.batches([SITE], size, **steps)]


@pytest.fixture(scope="module")
def finished(lm: LanguageModel, texts: Make, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return capture(lm, texts(40), SMALL, tmp_path_factory.mktemp("acts") / "acts")


def everything(store: ActivationStore) -> torch.Tensor:
    return torch.cat([store.read(SITE, shard) for shard in range(len(store.shards))]).float()


@settings(deadline=None, max_examples=20)
@given(
    buffer=st.integers(1, 6000), size=st.integers(1, 900), steps=st.integers(1, 12), data=st.data(),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_every_epoch_has_every_row_and_a_start_goes_on_exactly(
    finished: ActivationStore, buffer: int, size: int, steps: int, data: st.DataObject, seed: int
) -> None:
    buffer = max(buffer, 200)
    rows = torch.cat(dealt(follow(finished.folder, buffer), size, seed=seed, steps=steps))
    assert len(rows) == size * steps
    x, n = everything(finished), finished.n_tokens
    for group in range(0, min(n, len(rows)), buffer):  # the first epoch, group by group
        end = min(group + buffer, n)
        if len(rows) >= end:
            assert torch.equal(rows[group:end].sort(dim=0).values, x[group:end].sort(dim=0).values)
    if len(rows) >= 2 * n:
        assert torch.equal(rows[n : 2 * n].sort(dim=0).values, x.sort(dim=0).values)
        assert not torch.equal(rows[:n], rows[n : 2 * n])
    start = data.draw(st.integers(0, steps))
    on = dealt(follow(finished.folder, buffer), size, seed=seed, steps=steps, start=start)
    assert torch.equal(torch.cat([rows[:0], *on]), rows[start * size :])


def test_two_streams_of_one_source_do_not_spoil_each_other(finished: ActivationStore) -> None:
    source = follow(finished.folder, 700)
    alone = [torch.cat(dealt(source, seed=seed)) for seed in (0, 1)]
    both = zip(*(source.batches([SITE], 128, seed=seed, steps=40) for seed in (0, 1)), strict=True)
    together = [torch.cat([b[SITE] for b in stream]) for stream in zip(*both, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(*alone)


def test_it_reads_what_is_there_waits_and_sees_the_rename(
    lm: LanguageModel, texts: Make, tmp_path: Path, finished: ActivationStore
) -> None:
    out, said = tmp_path / "acts", list[str]()
    started, allowed, failed = threading.Event(), threading.Semaphore(0), list[BaseException]()

    def slowly(done: int, total: int, note: str = "") -> None:
        started.set()
        if done >= 900:
            allowed.acquire()

    def write() -> None:
        try:
            capture(lm, texts(40), SMALL, out, progress=slowly)
        except BaseException as error:
            failed.append(error)

    def say(line: str) -> None:
        said.append(line)
        if "1,400 tokens" in line:  # it waits for more than is there
            allowed.release(1000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(300)
        source = Following(out, buffer_tokens=700, patience=0.0, poll=0.01, say=say)
        assert source.sites == (SITE, OTHER) and source.d_in(SITE) == lm.d_in and not source.finished
        begun, parts = source.so_far(700), list[torch.Tensor]()
        for batch in source.batches([SITE], 128, seed=0, steps=60):
            parts.append(batch[SITE])
            if len(parts) == 1:
                assert is_held(out) and not out.exists()
        origin = source.origin(60 * 128)
    finally:
        allowed.release(1000)
        writer.join()
    assert not failed and source.finished and source.so_far(700) == begun
    assert origin.inputs == {"activations": finished.id} and origin.paths == {"activations": out}
    again = follow(finished.folder, 700)
    assert torch.equal(torch.cat(parts), torch.cat(dealt(again, steps=60))) and again.so_far(700) == begun
    assert again.so_far(7680) == source.so_far(7680) != begun
    assert any("waiting for" in line and "1,400 tokens" in line for line in said), said


def test_a_killed_capture_is_told_and_both_go_on(
    lm: LanguageModel, texts: Make, tmp_path: Path, finished: ActivationStore
) -> None:
    out = tmp_path / "acts"
    with pytest.raises(Killed):
        capture(lm, texts(40), SMALL, out, progress=until(1500))
    assert not is_held(out)
    with (partial_of(out) / "shards.jsonl").open("a") as file:
        file.write('{"file": "shard-00')  # torn by the kill
    source, got = follow(out, 600), list[torch.Tensor]()
    with pytest.raises(Stalled, match=r"stopped after 1,500 tokens; run its command again") as caught:
        got += (batch[SITE] for batch in source.batches([SITE], 128, seed=0, steps=40))
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    with pytest.raises(Stalled):
        source.origin(1)
    capture(lm, texts(40), SMALL, out)
    assert torch.equal(torch.cat(dealt(source)), torch.cat(dealt(follow(finished.folder, 600))))
    assert source.origin(1).inputs == {"activations": finished.id}


def test_a_capture_that_ends_while_it_is_looked_at_has_not_stopped(
    lm: LanguageModel,
    texts: Make,
    tmp_path: Path,
    finished: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "acts"
    with pytest.raises(Killed):
        capture(lm, texts(40), SMALL, out, progress=until(1500))

    def ends(folder: Path) -> bool:
        if not out.exists():
            capture(lm, texts(40), SMALL, out)
        return is_held(folder)

    monkeypatch.setattr(following, "is_held", ends)
    source = follow(out, 600, patience=0.0)
    assert torch.equal(torch.cat(dealt(source)), torch.cat(dealt(follow(finished.folder, 600))))


def test_what_is_no_capture_is_said(tmp_path: Path, finished: ActivationStore) -> None:
    with pytest.raises(Stalled, match="not being captured, nor finished"):
        follow(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not an artifact of kind activations"):
        follow(tmp_path / "empty")
    with pytest.raises(UserError, match="--buffer-tokens"):
        follow(finished.folder, 0)
    with pytest.raises(UserError, match=r"no site layers\.2\.resid_post"):
        follow(finished.folder).site("layers.2.resid_post")


def test_a_damaged_growing_shard_is_named(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    with pytest.raises(Killed):
        capture(lm, texts(40), SMALL, out, progress=until(1500))
    shard = partial_of(out) / "shard-00001.safetensors"
    source = follow(out, 900)
    os.truncate(shard, 1000)
    with pytest.raises(IntegrityError, match="shard-00001"):
        dealt(source)
    with pytest.raises(IntegrityError, match="shard-00001"):
        follow(out, 900)


def test_a_capture_that_is_begun_anew_is_not_taken_for_the_old_one(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    out = tmp_path / "acts"
    for tokens in (1500, None):
        with pytest.raises(Killed):
            capture(lm, texts(40), SMALL, out, progress=until(1500))
        source = follow(out, 600)
        assert len(dealt(source, 100, steps=10)) == 10
        for path in partial_of(out).iterdir():
            path.unlink()
        try:
            capture(lm, texts(41, seed=1), SMALL, out, progress=until(tokens or 10**9))
        except Killed:
            assert tokens is not None
        with pytest.raises(UserError, match="captured anew while it was read"):
            dealt(source, 100, start=13)
        for path in partial_of(out).glob("*"):
            path.unlink()


def test_a_wait_ends_when_nobody_waits(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    with pytest.raises(Killed):
        capture(lm, texts(40), SMALL, out, progress=until(1500))
    source, ended = follow(out, 10_000, patience=600.0), list[BaseException]()

    def read() -> None:
        try:
            dealt(source)
        except Stalled as error:
            ended.append(error)

    with pytest.raises(Killed), building(out):  # a writer that is alive, and does nothing
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        source.cancel()
        thread.join(300)
        assert not thread.is_alive() and len(ended) == 1
        raise Killed
