import io
import re
from contextlib import redirect_stderr

import pytest
import torch
from torch import nn

from secateur import progress
from secateur.progress import note, track
from secateur.recover import recover
from secateur.tasks import Classification


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def patience(monkeypatch):
    """No waiting, and a display of this test alone."""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    progress._display.cache_clear()
    yield
    progress._display.cache_clear()


def test_items_pass_through_and_nothing_is_printed_without_a_terminal(capsys, patience):
    assert list(track(iter("abc"), "Reading")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_short_loop_stays_silent_on_a_terminal():
    with redirect_stderr(Terminal()) as screen:
        assert list(track(range(5), "Reading")) == [0, 1, 2, 3, 4]
    assert screen.getvalue() == ""


@pytest.mark.parametrize("total", [None, 3])
def test_a_long_loop_shows_its_description_on_a_terminal(patience, total):
    with redirect_stderr(Terminal()) as screen:
        assert list(track(iter("abc"), "Reading", total)) == ["a", "b", "c"]
    assert "Reading" in screen.getvalue()


def test_bars_nest_and_the_display_ends_with_the_last(patience):
    with redirect_stderr(Terminal()) as screen:
        pairs = [(a, b) for a in track(range(3), "Outer") for b in track(range(3), "Inner")]
    assert len(pairs) == 9
    assert "Outer" in screen.getvalue()
    assert "Inner" in screen.getvalue()
    assert progress._display().tasks == []
    assert not progress._display().live.is_started


def test_an_abandoned_or_failing_loop_takes_its_bar_away(patience):
    def failing():
        yield 1
        yield 2
        raise RuntimeError("no more")

    with redirect_stderr(Terminal()):
        with pytest.raises(RuntimeError, match="no more"):
            list(track(failing(), "Failing"))
        left = track(range(9), "Left")
        next(left)
        next(left)
        left.close()
        assert progress._display().tasks == []
        assert list(track(range(2), "Again")) == [0, 1]


@pytest.mark.parametrize(
    ("total", "completed", "shown"),
    [(4, 1, "1:02:05, 3:06:16 left"), (4, 4, "1:02:05, 0:00:00 left"), (4, 0, "1:02:05"), (None, 3, "1:02:05")],
)
def test_times_gone_and_left_are_shown(total, completed, shown):
    """Of items that take an hour each too."""
    bar = progress._display().add_task("Fine-tuning", total=total, completed=completed)
    task = progress._display().tasks[-1]
    task.start_time, task.stop_time = 0.0, 3725.4
    assert progress._Times().render(task).plain == shown
    progress._display().remove_task(bar)


def test_a_note_stands_above_the_bars_and_is_silent_without_them(patience):
    with redirect_stderr(Terminal()) as screen:
        note("before any bar")
        for item in track(range(3), "Fine-tuning"):
            note(f"[epoch] {item + 1}")
    assert "before any bar" not in screen.getvalue()
    assert "[epoch] 3" in screen.getvalue()


def test_an_epoch_is_told_while_the_bar_is_shown(patience):
    x, y = torch.eye(4), torch.arange(4)
    with redirect_stderr(Terminal()) as screen:
        recover(nn.Linear(4, 4), Classification((x, y), (x, y), (x, y)), epochs=3)
    assert re.search(r"epoch 3 of 3: loss 1\.\d{4}, validation score [01]\.\d{4}", screen.getvalue())
