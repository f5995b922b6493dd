"""Progress bars: only on a terminal, and only where there is time to read them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from operator import length_hint
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds before a bar appears."""


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable``, with a progress bar on stderr once it takes over two seconds.

    Silent where stderr is no terminal. Loops may be nested: their bars stand below each other.
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    expected = total if total is not None else length_hint(iterable) or None
    started = time.monotonic()
    bar: TaskID | None = None
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            if bar is None and time.monotonic() - started > PATIENCE:
                bar = _open(description, expected, started)
            if bar is not None:
                _display().update(bar, completed=done)
    finally:
        if bar is not None:
            _close(bar)


def note(line: str) -> None:
    """Print a line above the bars on stderr; nothing where none is shown."""
    if sys.stderr.isatty() and _display().live.is_started:
        _display().console.print(line, highlight=False, markup=False)


class _Times(ProgressColumn):
    """Time gone and, from the average of all items so far, time left.

    Rich's own column looks at the last half minute alone, in which a long epoch does not show.
    """

    def render(self, task: Task) -> Text:
        gone = task.elapsed or 0.0
        left = None if task.total is None or not task.completed else gone * (task.total / task.completed - 1)
        return Text(_clock(gone) if left is None else f"{_clock(gone)}, {_clock(left)} left", "progress.elapsed")


def _clock(seconds: float) -> str:
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


@cache
def _display() -> Progress:
    """The one display that all bars share: two would fight over the terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Times())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _open(description: str, total: int | None, started: float) -> TaskID:
    display = _display()
    bar = display.add_task(description, total=total)
    display.tasks[-1].start_time = started
    display.start()
    return bar


def _close(bar: TaskID) -> None:
    display = _display()
    display.remove_task(bar)
    if not display.tasks:
        display.stop()
