"""The loop: epochs of a run, each validated, kept on disk so that a stopped run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import DataError
from secateur.progress import note, track
from secateur.recover import checkpoint
from secateur.recover.randomness import restore, untouched
from secateur.recover.run import Epoch, Run, kind_of
from secateur.tasks import mode

_END = object()

Listener = Callable[[int, Epoch], None]
"""Told the number of every epoch, from 1, and what came of it, before that is written to disk."""


@dataclass(eq=False)
class _Keeper:
    """The checkpoint of a run."""

    run: Run
    folder: Path
    about: dict[str, Any] = field(init=False)
    written: float = field(init=False)

    def __post_init__(self) -> None:
        self.about, self.written = _about(self.run), time.monotonic()

    def load(self) -> bool:
        """Bring the run to where it was; False where it has not been anywhere yet."""
        state = checkpoint.read(self.folder, self.about)
        if state is not None:
            self.run.load(state)
        return state is not None

    def save(self) -> None:
        checkpoint.write(self.folder, self.about, self.run.state())
        self.written = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.written >= self.run.how.every


def train(run: Run, what: str, tell: Listener | None = None) -> None:
    """Go through the epochs of a run that are left, and leave it at its end (``Run.end``). ``what``: for the bar."""
    at, folder = run.at, run.how.checkpoint
    keeper = None if folder is None else _Keeper(run, Path(folder))
    if keeper is not None and keeper.load():
        what = f"{what}, continued in epoch {at.epoch + 1}"
    else:
        run.begin()
    for _ in track(range(at.epoch, 0 if at.finished else run.how.epochs), what):
        _epoch(run, keeper)
        if tell is not None:
            tell(at.epoch, at.history[-1])
        if keeper is not None:
            keeper.save()
        if at.finished:
            break
    run.end()


def _epoch(run: Run, keeper: _Keeper | None) -> None:
    """What is left of the running epoch, and its validation."""
    at, how = run.at, run.how
    began = time.perf_counter() - at.seconds
    steps = -(-(at.batches - at.batch) // how.accumulate)
    with mode(run.student, training=True):
        for group in track(_groups(run), f"Epoch {at.epoch + 1}", steps):
            run.step(group)
            at.seconds = time.perf_counter() - began
            if keeper is not None and keeper.due:
                keeper.save()
    if not at.batch:
        raise DataError("the train split has no batches; give it at least one example")
    score, better = run.validate()
    epoch = Epoch(at.loss / at.batch, score, time.perf_counter() - began, at.rate, run.sparsity)
    at.end_epoch(epoch, better)
    at.finished = at.epoch == how.epochs or at.stale == how.patience
    best = ", the best so far" if better else ""
    zeros = f", {epoch.sparsity:.1%} zeros" if epoch.sparsity else ""
    note(f"epoch {at.epoch} of {how.epochs}: loss {epoch.loss:.4f}, validation score {score:.4f}{best}{zeros}")


def _groups(run: Run) -> Iterator[list[Any]]:
    """The rest of this epoch's batches, ``accumulate`` at a time.

    The pass is opened as it was at the epoch's beginning, so that its order is the same. Batches that are done are
    drawn again and left, except from a Sequence, which makes only those that it is asked for.
    """
    done, now = run.at.batch, run.data.state
    if done:
        run.data.state = run.data_start
    else:
        run.data_start = now
    with run.data.drawing():
        batches = run.task.batches("train")
        source: Iterator[Any]
        if isinstance(batches, Sequence):
            skipped, source = 0, (batches[i] for i in range(done, len(batches)))
        else:
            skipped, source = done, iter(batches)
    for _ in track(range(skipped), "Skipping batches that are done"):
        if _draw(run, source) is _END:
            raise DataError(f"the train split gave fewer batches than the {done} that the checkpoint has done")
    run.data.state = now if done else run.data.state
    while group := [b for _ in range(run.how.accumulate) if (b := _draw(run, source)) is not _END]:
        yield group


def _draw(run: Run, source: Iterator[Any]) -> Any:
    with run.data.drawing():
        return next(source, _END)


# --- what a checkpoint is of ------------------------------------------------------------------------


def _about(run: Run) -> dict[str, Any]:
    """What tells this run from others, as JSON; digests stand for tensors.

    Raises DataError where the first training batch is another one when drawn again.
    """
    train = _first(run, "train")
    if _first(run, "train") != train:
        raise DataError(
            f"{kind_of(run.task)} gives other training batches each time, so that a stopped run could not be "
            "continued; draw whatever is random in it from torch's, NumPy's or Python's global random state, or use "
            "no checkpoint"
        )
    return {**run.identity(), "task": kind_of(run.task), "data": f"{train} {_first(run, 'validation')}"}


def _first(run: Run, split: str) -> str:
    with untouched(run.device):
        restore(run.data.state, run.device)
        return checkpoint.digest(next(iter(run.task.batches(split)), None))
