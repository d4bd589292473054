"""Progress, plain and on a terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from unbraid.cli.progress import Lines, duration, shown, stages


def test_plain_lines_come_seldom_and_say_rate_and_time_left() -> None:
    now = [0.0]
    out = io.StringIO()
    lines = Lines("capture", "tokens", out=out, seconds=5, clock=lambda: now[0])
    for done in range(100, 1001, 100):  # one report a second; resumed at 100
        lines(done, 1000, "fvu 0.2" if done == 600 else "")
        now[0] += 1
    assert out.getvalue().splitlines() == [
        "capture: 100/1,000 tokens (10 %)",
        "capture: 600/1,000 tokens (60 %), 100/s, 4 s left, fvu 0.2",
        "capture: 1,000/1,000 tokens (100 %), 100/s, in 9 s",
    ]


def test_nothing_to_do_is_said_once() -> None:
    out = io.StringIO()
    Lines("find", out=out)(0, 0)
    assert out.getvalue() == "find: 0\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_stdout_stays_clean(capsys) -> None:
    with shown("train", "steps") as progress:
        progress(1, 2)
        progress(2, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("train: 2/2 steps (100 %)")


def test_each_stage_is_counted_in_its_own_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("index") as progress:
        for done in (100, 200):
            progress(done, 200, "tokens")
        for done in (8, 16):
            progress(done, 16, "latents")
    lines = [line.partition(")")[0] for line in capsys.readouterr().err.splitlines()]
    # The first line of each stage and its last one.
    assert lines == [
        "index: 100/200 tokens (50 %", "index: 200/200 tokens (100 %",
        "index: 8/16 latents (50 %", "index: 16/16 latents (100 %",
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_there_is_a_bar() -> None:
    import pty

    code = (
        "import time; from unbraid.cli.progress import shown\n"
        "with shown('train', 'steps') as progress:\n"
        "    for step in range(1, 4): progress(step, 3, '[fvu] 0.1'); time.sleep(0.15)\n"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=env, check=True
    )
    os.close(theirs)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.stdout == b""
    assert "train" in seen and "3/3" in seen and "/s" in seen and "[fvu] 0.1" in seen


def test_an_unknown_total_shows_the_count_alone_and_not_at_every_call() -> None:
    out, now = io.StringIO(), [0.0]
    lines = Lines("index", "tokens", out=out, seconds=5, clock=lambda: now[0])
    for i in range(10):
        now[0] = float(i)
        lines(100 * i, 0)
    assert out.getvalue().splitlines() == ["index: 0 tokens", "index: 500 tokens, 100/s"]
