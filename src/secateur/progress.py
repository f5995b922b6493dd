"""Progress bars: only on a terminal, and only where there is time to read them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from operator import length_hint
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

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
                bar = _open(description, expected)
            if bar is not None:
                _display().update(bar, completed=done)
    finally:
        if bar is not None:
            _close(bar)


@cache
def _display() -> Progress:
    """The one display that all bars share: two would fight over the terminal."""
    return Progress(console=Console(stderr=True), transient=True)


def _open(description: str, total: int | None) -> TaskID:
    display = _display()
    bar = display.add_task(description, total=total)
    display.start()
    return bar


def _close(bar: TaskID) -> None:
    display = _display()
    display.remove_task(bar)
    if not display.tasks:
        display.stop()
