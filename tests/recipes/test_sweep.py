"""A sweep on a tiny model: what it makes, that it goes on where it was stopped, and which points are best."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.follow import Following
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.evaluation.evaluate import evaluate
from unbraid.manifest.errors import UserError
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import read_manifest
from unbraid.model.load import LanguageModel, load_model
from unbraid.recipes import sweep as recipe
from unbraid.recipes.sweep import Text, render, run_sweep, summarise
from unbraid.training.config import LoopOptions
from unbraid.training.grid import Grid, trials
from unbraid.training.trainer import train

TEXT = "the delayed package was a red ball that wanted two tablets with water and a pan"
SITES = ("layers.0.mlp_out", "layers.1.resid_post")
GRID = Grid(arch=("topk", "relu"), k=(2, 4), width=(16,), seed=(0, 1), site=SITES)
LOOP = LoopOptions(
    steps=20, batch_size=32, checkpoint_every=8, calibration_tokens=64, dead_after=100, threads=1
)


def _documents(first: int) -> list[Document]:
    """Sixteen texts; those of different `first` differ."""
    words = TEXT.split()
    return [
        Document.of_text(" ".join(words[(i * j + first) % len(words)] for i in range(12)))
        for j in range(1, 17)
    ]


HELD_OUT = Text(lambda: _documents(5), "held out", 60, 256)


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def store(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("acts") / "acts"
    capture(lm, _documents(0), CaptureConfig(sites=SITES), out)
    return ActivationStore(out)


@contextmanager
def _silent(title: str, unit: str = ""):
    yield lambda done, total, note="": None


def _run(
    store: ActivationStore, lm: LanguageModel, out: Path, stage: Callable[..., Any] = _silent
) -> dict[str, Any]:
    return run_sweep(store, lm, HELD_OUT, GRID, LOOP, out, command="unbraid sweep", stage=stage)


@pytest.fixture(scope="module")
def finished(
    store: ActivationStore, lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return out, _run(store, lm, out)


def test_everything_is_there_and_verifies(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert len(summary["points"]) == 2 * 3  # two sites; topk with two k, relu
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(summary))
    assert not verify(out).problems
    assert all(point["seeds"] == 2 for point in summary["points"])
    page = (out / "report.html").read_text()
    assert all(point["point"] in page for point in summary["points"])


def test_each_is_what_train_makes_and_what_evaluate_measures(
    finished: tuple[Path, dict[str, Any]], store: ActivationStore, lm: LanguageModel, tmp_path: Path
) -> None:
    out, summary = finished
    values: list[float] = []
    for trial in (t for t in trials(GRID, LOOP, store) if t.point == "layers.1.resid_post-topk-w16-k4"):
        sae = train(store, "layers.1.resid_post", trial.config, tmp_path / trial.name)
        one, other = ((f / trial.name / "sae_weights.safetensors") for f in (out, tmp_path))
        assert one.read_bytes() == other.read_bytes()
        found = evaluate(sae, lm, _documents(5), tokens=60)
        assert json.loads((out / "measured" / f"{trial.name}.json").read_text()) == found.as_dict()
        values.append(found.metrics["fvu"].value)
    (point,) = (p for p in summary["points"] if p["point"] == "layers.1.resid_post-topk-w16-k4")
    assert point["metrics"]["fvu"]["value"] == pytest.approx(sum(values) / 2)
    assert point["metrics"]["fvu"]["n"] == 2


@pytest.mark.parametrize("stop_in", ["train 6 of 12, seed 1", "evaluate 9 to 12 of 12"])
def test_stopped_it_goes_on_with_what_is_left(
    finished: tuple[Path, dict[str, Any]],
    store: ActivationStore,
    lm: LanguageModel,
    tmp_path: Path,
    stop_in: str,
) -> None:
    stages: list[str] = []

    @contextmanager
    def stopping(title: str, unit: str = ""):
        stages.append(title)

        def progress(done: int, total: int, note: str = "") -> None:
            if title == stop_in and done > total // 2:
                raise KeyboardInterrupt

        yield progress

    with pytest.raises(KeyboardInterrupt):
        _run(store, lm, tmp_path / "sweep", stopping)
    assert stages[-1] == stop_in and not (tmp_path / "sweep").exists()
    again: list[str] = []

    @contextmanager
    def listening(title: str, unit: str = ""):
        again.append(title)
        yield lambda done, total, note="": None

    summary = _run(store, lm, tmp_path / "sweep", listening)
    assert summary == finished[1]
    assert not set(again) & set(stages[:-1])
    names = sorted(p.relative_to(finished[0]) for p in finished[0].rglob("*.safetensors"))
    assert all((finished[0] / n).read_bytes() == (tmp_path / "sweep" / n).read_bytes() for n in names)


def test_other_settings_in_a_begun_folder_are_refused(
    store: ActivationStore, lm: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / ".sweep.partial").mkdir()
    (tmp_path / ".sweep.partial" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="begun with other settings"):
        _run(store, lm, tmp_path / "sweep")


def test_what_does_not_fit_together_is_trained_in_turn(
    store: ActivationStore, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = trials(GRID, LOOP, store)
    size = recipe.needed(recipe.sae_config(every[0].sources, every[0].config), every[0].config.batch_size)
    monkeypatch.setattr(recipe, "available", lambda: int(2 * 2.5 * size))
    groups = list(recipe._groups(every))  # pyright: ignore[reportPrivateUsage]
    assert [t for g in groups for t in g] == sorted(every, key=lambda t: t.config.seed)
    assert max(map(len, groups)) == 2 and all(len({t.config.seed for t in g}) == 1 for g in groups)


def test_beside_a_running_capture_it_makes_what_it_makes_of_the_finished_one(
    lm: LanguageModel, tmp_path: Path
) -> None:
    acts, swept, documents = tmp_path / "acts", tmp_path / "beside", _documents(0) * 4
    started, allowed, failed = threading.Event(), threading.Semaphore(0), list[BaseException]()
    config = CaptureConfig(sites=SITES, shard_tokens=64, batch_tokens=64)
    ended: list[bool] = []

    def slowly(done: int, total: int, note: str = "") -> None:
        if done >= 256:  # the first group of 128 rows is there, and the capture stays unfinished
            started.set()
            allowed.acquire()

    def write() -> None:
        try:
            capture(lm, documents, config, acts, progress=slowly)
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    @contextmanager
    def releasing(title: str, unit: str = ""):
        def progress(done: int, total: int, note: str = "") -> None:
            ended.append(acts.exists())
            allowed.release(2)

        yield progress

    def sweep(out: Path, stage: Callable[..., Any]) -> dict[str, Any]:
        source = Following(acts, buffer_tokens=128, patience=0.0, poll=0.01)
        return run_sweep(source, lm, HELD_OUT, GRID, LOOP, out, command="", stage=stage)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(300)
        found = sweep(swept, releasing)
    finally:
        allowed.release(1000)
        writer.join()
    assert not failed and not ended[0] and ended[-1]
    assert sweep(tmp_path / "after", _silent) == found
    names = sorted(p.relative_to(swept) for p in swept.rglob("sae_weights.safetensors"))
    assert len(names) == 12 and all(
        (swept / n).read_bytes() == (tmp_path / "after" / n).read_bytes() for n in names
    )
    manifest = read_manifest(swept)
    assert manifest.inputs["activations"] == ActivationStore(acts).id and not verify(swept).problems
    assert manifest.facts["reading"] == {"order": "capture", "buffer_tokens": 128}
    (tmp_path / ".other.partial").mkdir()
    shutil.copyfile(swept / "settings.json", tmp_path / ".other.partial" / "settings.json")
    with pytest.raises(UserError, match="begun with other settings"):
        _run(ActivationStore(acts), lm, tmp_path / "other")


def _evaluation(site: str, l0: float, fvu: float, delta_ce: float) -> dict[str, Any]:
    names = {"l0": l0, "fvu": fvu, "delta_ce": delta_ce, "recovered_mean": 0.5, "dead": 0.0}
    metrics = {n: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for n, v in names.items()}
    return {"site": site, "model": "m", "tokens": 1, "documents": 1, "context": 1, "metrics": metrics}


def test_the_front_is_what_nothing_beats_at_its_own_site(store: ActivationStore) -> None:
    grid = Grid(arch=("topk",), k=(1, 2, 3, 4), width=(16,), seed=(0,), site=SITES)
    every = trials(grid, LOOP, store)
    rows = {1: (10.0, 0.5, 0.2), 2: (20.0, 0.4, 0.3), 3: (30.0, 0.45, 0.1), 4: (20.4, 0.39, 0.1)}
    found = {
        t.name: _evaluation(t.point.split("-")[0], *rows[t.config.k])
        if t.point.startswith(SITES[0])
        else _evaluation(SITES[1], 99.0, 0.9, 0.9)
        for t in every
    }
    summary = summarise(every, found)
    first = [p for p in summary["points"] if p["site"] == SITES[0]]
    assert [p["front_fvu"] for p in first] == [True, False, False, True]  # 4 has 2's L0, as good as
    assert [p["front_delta_ce"] for p in first] == [True, False, False, True]
    assert all(p["front_fvu"] for p in summary["points"] if p["site"] == SITES[1])
    # A single seed keeps the interval over documents.
    assert first[0]["metrics"]["fvu"] == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}


def test_the_page_escapes_what_it_is_given(store: ActivationStore) -> None:
    every = trials(Grid(arch=("topk",), k=(1,), width=(16,), seed=(0,), site=SITES[:1]), LOOP, store)
    summary = summarise(every, {every[0].name: _evaluation(SITES[0], 1.0, 0.5, -0.1)})
    page = render(summary | {"model": "<script>alert(1)</script>"}, "<img src=x>")
    assert "<script" not in page and "<img" not in page and "http" not in page.replace("http-equiv", "")


def test_a_store_of_another_tokenizer_is_refused_before_anything_is_trained(
    store: ActivationStore, lm: LanguageModel, tmp_path: Path
) -> None:
    other = dataclasses.replace(lm, tokenizer_id="0" * 64)
    with pytest.raises(UserError, match="was made with tokenizer"):
        _run(store, other, tmp_path / "out")
    assert not list(tmp_path.iterdir())
