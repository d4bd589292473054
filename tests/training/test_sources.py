"""Trained while the capture is written, on the finished capture in its order, or straight from the model:
the same autoencoder, bit for bit, whatever was killed on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.follow import Following, Stalled
from unbraid.activations.live import Live
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import partial_of
from unbraid.manifest.record import check_files
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.sites import Site
from unbraid.training.checkpoint import Checkpoint
from unbraid.training.config import TrainConfig
from unbraid.training.sources import choose_sources
from unbraid.training.trainer import train

SITES = (Site(1, "resid_post"), Site(1, "mlp_out"))
READ = CaptureConfig(sites=SITES, context=64, batch_tokens=512, shard_tokens=400)
SMALL = TrainConfig(
    d_sae=64, k=4, steps=60, batch_size=100, checkpoint_every=16, log_every=20, calibration_tokens=800
)
BUFFER = 1000
WORDS = ["once", "upon", "a", "time", "the", "doctor", "had", "package", "red", "ball", "wait"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def texts(n: int = 60) -> Iterator[Document]:
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield Document.of_text(" ".join(rng.choice(WORDS, size=int(rng.integers(1, 60)))))


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def finished(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    store = capture(lm, texts(), READ, tmp_path_factory.mktemp("acts") / "acts")
    assert 3 * BUFFER < store.n_tokens < SMALL.steps * SMALL.batch_size  # over the end of an epoch
    return store


@pytest.fixture(scope="module")
def expected(finished: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run on the finished capture, in its order."""
    out = tmp_path_factory.mktemp("sae") / "sae"
    train(follow(finished.folder), "layers.1.resid_post", SMALL, out)
    return files(out)


def live(lm: LanguageModel) -> Live:
    return Live(lm, texts, READ, buffer_tokens=BUFFER)


def follow(folder: Path, patience: float = 0.0) -> Following:
    return Following(folder, buffer_tokens=BUFFER, patience=patience, poll=0.01)


def files(folder: Path, *, manifest: bool = True) -> dict[str, bytes]:
    check_files(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir() if manifest or p.name != "manifest.json"}


def killed_at(*moments: int) -> Callable[..., None]:
    left = list(moments)

    def progress(done: int, total: int, note: str = "") -> None:
        if left and done == left[0]:
            left.pop(0)
            raise Killed

    return progress


def without_paths(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name != "manifest.json"}


def test_live_is_follow_is_finished_whatever_is_killed(
    lm: LanguageModel, finished: ActivationStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "live"
    progress = killed_at(7, 20, 45, 60)  # before a checkpoint, after one, in the second epoch, at the end
    for _ in range(4):
        with pytest.raises(Killed):
            train(live(lm), "layers.1.resid_post", SMALL, out, progress=progress)
    train(live(lm), "layers.1.resid_post", SMALL, out, progress=progress)
    assert files(out, manifest=False) == without_paths(expected)
    train(live(lm), "layers.1.resid_post", SMALL, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")

    manifest = check_files(out)
    assert manifest.inputs == finished.manifest.inputs and manifest.paths is None
    reading = manifest.facts["reading"]
    assert (reading["order"], reading["buffer_tokens"]) == ("capture", BUFFER)
    assert reading["read"] == finished.manifest.facts["read"] and reading["context"] == 64
    followed = tmp_path / "followed"
    progress = killed_at(3, 33)
    for _ in range(2):
        with pytest.raises(Killed):
            train(follow(finished.folder), "layers.1.resid_post", SMALL, followed, progress=progress)
    train(follow(finished.folder), "layers.1.resid_post", SMALL, followed)
    assert without_paths(files(followed)) == without_paths(expected)
    manifest = check_files(followed)
    assert manifest.inputs == {"activations": finished.id}
    assert manifest.facts["reading"] == {"order": "capture", "buffer_tokens": BUFFER}


def test_a_run_that_follows_a_capture_is_the_run_on_the_finished_one(
    lm: LanguageModel, finished: ActivationStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    acts, out, allowed, failed = tmp_path / "acts", tmp_path / "sae", threading.Semaphore(0), []
    begun: list[bool] = []
    started = threading.Event()

    def slowly(done: int, total: int, note: str = "") -> None:
        started.set()
        if done >= 1.5 * BUFFER:
            allowed.acquire()

    def write() -> None:
        try:
            capture(lm, texts(), READ, acts, progress=slowly)
        except BaseException as error:
            failed.append(error)

    def progress(done: int, total: int, note: str = "") -> None:
        begun.append(not acts.exists())
        allowed.release(2)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(300)
        train(follow(acts), "layers.1.resid_post", SMALL, out, progress=progress)
    finally:
        allowed.release(1000)
        writer.join()
    assert not failed and begun[0] and not begun[-1]
    assert without_paths(files(out)) == without_paths(expected)
    assert check_files(out).inputs == {"activations": finished.id}


@pytest.mark.parametrize("steps", [60, 8])  # short of rows within the steps, or of the capture's end alone
def test_a_capture_that_is_killed_while_it_is_followed(
    lm: LanguageModel, finished: ActivationStore, tmp_path: Path, steps: int
) -> None:
    acts, out, config = tmp_path / "acts", tmp_path / "sae", replace(SMALL, steps=steps)

    def kill(done: int, total: int, note: str = "") -> None:
        if done > 1.2 * BUFFER:
            raise Killed

    with pytest.raises(Killed):
        capture(lm, texts(), READ, acts, progress=kill)
    for _ in range(2):
        with pytest.raises(Stalled, match="has stopped after 1,200 tokens; run its command again"):
            train(follow(acts), "layers.1.resid_post", config, out)
        checkpoint = Checkpoint.read(partial_of(out))
        assert checkpoint is not None and checkpoint.facts["step"] == min(steps, BUFFER // 100)
    capture(lm, texts(), READ, acts)
    train(follow(acts), "layers.1.resid_post", config, out)
    train(follow(finished.folder), "layers.1.resid_post", config, tmp_path / "whole")
    assert without_paths(files(out)) == without_paths(files(tmp_path / "whole"))
    assert check_files(out).id == check_files(tmp_path / "whole").id


def test_pairs_of_sites_come_from_one_pass(
    lm: LanguageModel, finished: ActivationStore, tmp_path: Path
) -> None:
    config = replace(SMALL, architecture="transcoder", k=SMALL.k, steps=20)
    given: dict[str, Any] = {"target_site": "layers.1.mlp_out"}
    train(live(lm), "layers.1.resid_post", config, tmp_path / "live", **given)
    train(follow(finished.folder), "layers.1.resid_post", config, tmp_path / "follow", **given)
    one, other = (files(tmp_path / name, manifest=False) for name in ("live", "follow"))
    assert one == other and check_files(tmp_path / "live").facts["target_site"] == "layers.1.mlp_out"


def test_another_corpus_or_buffer_does_not_go_on(lm: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "sae"

    def changed() -> Iterator[Document]:
        """Not in what the first group has, but in what had been read when the run was killed."""
        for n, document in enumerate(texts()):
            yield Document.of_text("a red ball") if n == 40 else document

    read = replace(READ, batch_tokens=64)  # which looks ahead less far
    first, other = (Live(lm, given, read, buffer_tokens=BUFFER) for given in (texts, changed))
    assert first.so_far(1) == other.so_far(1) and first.so_far(3200) != other.so_far(3200)
    with pytest.raises(Killed):
        train(first, "layers.1.resid_post", SMALL, out, progress=killed_at(33))
    for other in (
        Live(lm, lambda: list(texts())[1:], read, buffer_tokens=BUFFER),
        Live(lm, texts, replace(read, dtype="float32"), buffer_tokens=BUFFER),
        Live(lm, texts, read, buffer_tokens=BUFFER + 1),
        Live(lm, changed, read, buffer_tokens=BUFFER),
    ):
        with pytest.raises(UserError, match="with other settings"):
            train(other, "layers.1.resid_post", SMALL, out)
    train(Live(lm, texts, read, buffer_tokens=BUFFER), "layers.1.resid_post", SMALL, out)


def test_sources_in_the_order_of_capture_stand_alone(lm: LanguageModel, finished: ActivationStore) -> None:
    with pytest.raises(UserError, match="cannot be read together"):
        choose_sources([finished, follow(finished.folder)], str(SITES[0]), None, "sites", "crosscoder")
    with pytest.raises(UserError, match="holds several sites"):
        choose_sources([live(lm)], None, None, "site", "topk")
