import io
from contextlib import redirect_stderr

import pytest

from secateur import progress
from secateur.progress import track


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
