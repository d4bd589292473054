"""Showing how long work goes: a bar on a terminal, plain lines anywhere else; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from unbraid.manifest.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(title: str, unit: str = "") -> Generator[Progress, None, None]:
    """Yield a progress callback that shows done, total, rate and time left of one piece of work.

    `title` is what is being done, `unit` what is counted ("tokens"). On a terminal a bar moves; where
    stderr is a file or a pipe, plain lines come at most every few seconds.
    """
    if sys.stderr.isatty():
        with _bar(title, unit) as progress:
            yield progress
    else:
        yield Lines(title, unit)


@contextmanager
def stages(title: str) -> Generator[Progress, None, None]:
    """As `shown`, for work in stages that count different things: the note of a report is its unit.

    Each stage has a bar, a rate and a time left of its own.
    """
    with ExitStack() as stack:
        unit, progress = "", None

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal unit, progress
            if progress is None or note != unit:
                stack.close()  # a terminal shows one bar at a time
                unit, progress = note, stack.enter_context(shown(title, note))
            progress(done, total)

        yield report


class Lines:
    """Progress as plain lines, for logs: the first report, then one every few seconds, and the last."""

    def __init__(
        self,
        title: str,
        unit: str = "",
        *,
        out: TextIO | None = None,
        seconds: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._unit = unit
        self._out = out
        self._seconds = seconds
        self._clock = clock
        self._first: tuple[float, int] | None = None  # when, and how much was done: a resumed run starts late
        self._last_line = float("-inf")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Print a line when one is due or the work is finished; a total of 0 means that nobody knows it."""
        now = self._clock()
        unfinished = done < total or total == 0
        if self._first is None:
            self._first = (now, done)
        if now - self._last_line < self._seconds and unfinished:
            return
        self._last_line = now
        started, already = self._first
        rate = (done - already) / (now - started) if now > started else 0.0
        count = f"{done:,}/{total:,}" if total else f"{done:,}"
        parts = [f"{count} {self._unit}".rstrip()]
        if total:
            parts[0] += f" ({100 * done // total} %)"
        if rate > 0:
            parts.append(f"{_number(rate)}/s")
        if rate > 0 and total:
            left = duration((total - done) / rate)
            parts.append(f"{left} left" if unfinished else f"in {duration(now - started)}")
        if note:
            parts.append(note)
        print(f"{self._title}: {', '.join(parts)}", file=self._out or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a length of time in the two units that matter: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@contextmanager
def _bar(title: str, unit: str) -> Generator[Progress, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.progress import Task as Work

    class Rate(TextColumn):
        def render(self, task: Work):
            task.fields["rate"] = f"{_number(task.speed)}/s" if task.speed else ""
            return super().render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Rate("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, rate="", note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total or None, note=note)

        yield report
