"""Logs to other tools: every line of every run reaches them, and nothing else does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from unbraid.cli import sinks
from unbraid.cli.sinks import Tool, logging_to
from unbraid.manifest.errors import UserError

ROW = {"step": 50, "fvu": 0.25, "l0": 8.0, "dead": 0.0, "note": "a sentence"}


class Recorder:
    """Stands for a tool's module, its runs and its writers alike; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> Recorder:
        print("welcome to the tool")
        self.told.append(("init", options))
        return self

    def SummaryWriter(self, log_dir: str) -> Recorder:
        self.told.append(("writer", log_dir))
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.told.append(("log", row, step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append(("log", {name: value}, step))

    def finish(self) -> None:
        self.told.append(("end",))

    close = finish


@pytest.mark.parametrize("tool", ["trackio", "wandb", "tensorboard"])
def test_every_run_gets_its_own_lines(tool: Tool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, sinks.MODULES[tool], recorder)  # type: ignore[arg-type]
    with logging_to((tool,)) as on_log:
        assert on_log is not None and recorder.told == []
        on_log("a", ROW)
        on_log("b", ROW)
        on_log("a", ROW | {"step": 100})
    kinds = [t[0] for t in recorder.told]
    assert kinds.count("log") == (9 if tool == "tensorboard" else 3) and kinds[-2:] == ["end", "end"]
    opened = [t[1] for t in recorder.told if t[0] in ("init", "writer")]
    assert [o if isinstance(o, str) else o["name"] for o in opened] == (
        [str(Path("runs") / n) for n in "ab"] if tool == "tensorboard" else ["a", "b"]
    )
    logged: dict[int, dict[str, float]] = {}
    for _, row, step in (t for t in recorder.told if t[0] == "log"):
        logged.setdefault(step, {}).update(row)
    assert logged == {step: {"fvu": 0.25, "l0": 8.0, "dead": 0.0} for step in (50, 100)}
    assert capsys.readouterr().out == ""


def test_wandb_itself_takes_two_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with logging_to(("wandb",)) as on_log:
        assert on_log is not None
        for step in (50, 100):
            for name in ("a", "b"):
                on_log(name, ROW | {"step": step})
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_without_tools_there_is_nothing_to_call() -> None:
    with logging_to(()) as on_log:
        assert on_log is None


def test_a_missing_tool_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--log-to trackio .* pip install trackio"), logging_to(("trackio",)):
        raise AssertionError("not reached")
