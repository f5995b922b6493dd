"""Fine-tuning after pruning: any loop's epochs, but masked, taught, and able to go on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur.apply.mask import keep_zeros
from secateur.errors import DataError
from secateur.plan import Plan
from secateur.progress import note, track
from secateur.recover import checkpoint
from secateur.recover.options import Recovery
from secateur.recover.randomness import restore, seed_all, untouched
from secateur.recover.run import Epoch, Run, put_, tensors_of
from secateur.tasks import Task, clone, device_of, mode

_END = object()


def recover(
    model: nn.Module, task: Task, *, plan: Plan | None = None, teacher: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Fine-tune a copy of ``model`` on the task's training split; returns it and its history.

    plan: its masked weights stay zero. A plan of channels asks for nothing: they are gone.
    teacher: the loss becomes ``alpha`` · distillation at ``temperature`` + (1 - ``alpha``) · task loss, against the
        teacher's outputs in evaluation mode (see ``distillation_loss``).
    options: the fields of ``Recovery``: epochs, lr, schedule, optimizer, accumulate, clip, ema, temperature, alpha,
        patience, amp, seed, checkpoint, every.

    The returned weights are those of the best validation score, the given ones included: recovery does not make a
    model worse there. The caller's random states stay as they were.

    With ``checkpoint`` a run that was stopped, at whatever moment, goes on where it was when called again with the
    same arguments, and gives the same weights as one that was not: bit by bit on a CPU, on a GPU as far as its kernels
    repeat themselves. For that the batches of a task must follow from the global random states of torch, NumPy and
    Python, which is checked at the beginning. A run that had finished returns at once.

    Raises SpecError for an option out of range. Raises DataError for a loss that is NaN or infinite, an empty split,
    a model without trainable parameters, a teacher with other outputs, and for the checkpoint of another run.
    """
    how = Recovery(**options)
    student = clone(model)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the model has no trainable parameters; set requires_grad on those to fine-tune")
    with ExitStack() as stack:
        stack.enter_context(untouched(device_of(student)))
        seed_all(how.seed)
        optimizer = how.factory()(parameters, lr=how.lr)
        if teacher is not None:
            stack.enter_context(mode(teacher, training=False))
        masks = plan.masks if plan is not None else {}
        if plan is not None and masks:
            stack.enter_context(keep_zeros(student, plan, optimizer))
        run = Run(student, task, how, optimizer, teacher, masks)
        _train(run, None if how.checkpoint is None else _Keeper(run, Path(how.checkpoint)))
        return student, tuple(run.at.history)


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


def _train(run: Run, keeper: _Keeper | None) -> None:
    """Train the student in place, and leave it with the weights of its best validation score."""
    at, what = run.at, "Fine-tuning"
    if keeper is not None and keeper.load():
        what = f"Fine-tuning, continued in epoch {at.epoch + 1}"
    else:
        at.batches = _count(run)
        run.validate()
    for _ in track(range(at.epoch, 0 if at.finished else run.how.epochs), what):
        _epoch(run, keeper)
        if keeper is not None:
            keeper.save()
        if at.finished:
            break
    put_(run.student, run.best)
    run.optimizer.zero_grad()


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
    epoch = Epoch(at.loss / at.batch, score, time.perf_counter() - began, at.rate)
    at.end_epoch(epoch, better)
    at.finished = at.epoch == how.epochs or at.stale == how.patience
    best = ", the best so far" if better else ""
    note(f"epoch {at.epoch} of {how.epochs}: loss {epoch.loss:.4f}, validation score {score:.4f}{best}")


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


def _count(run: Run) -> int:
    """Batches of a training pass; counted where it does not know its length."""
    with untouched(run.device):
        restore(run.data.state, run.device)
        batches = run.task.batches("train")
        return len(batches) if isinstance(batches, Sized) else sum(1 for _ in track(batches, "Counting batches"))


# --- what a checkpoint is of ------------------------------------------------------------------------


def _about(run: Run) -> dict[str, Any]:
    """What tells this run from others, as JSON; digests stand for tensors.

    Raises DataError where the first training batch is another one when drawn again.
    """
    train = _first(run, "train")
    if _first(run, "train") != train:
        raise DataError(
            f"{_kind(run.task)} gives other training batches each time, so that a stopped run could not be continued; "
            "draw whatever is random in it from torch's, NumPy's or Python's global random state, or use no checkpoint"
        )
    trained = [name for name, p in run.student.named_parameters() if p.requires_grad]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
    return {
        **run.how.identity(),
        "optimizer": f"{_kind(run.optimizer)} {groups}",
        "model": f"{_weights(run.student)} {checkpoint.digest(trained)}",
        "teacher": None if run.teacher is None else _weights(run.teacher),
        "plan": checkpoint.digest(sorted(run.masks.items())) if run.masks else None,
        "task": _kind(run.task),
        "data": f"{train} {_first(run, 'validation')}",
    }


def _first(run: Run, split: str) -> str:
    with untouched(run.device):
        restore(run.data.state, run.device)
        return checkpoint.digest(next(iter(run.task.batches(split)), None))


def _weights(model: nn.Module) -> str:
    return f"{_kind(model)} {checkpoint.digest(list(tensors_of(model).items()))}"


def _kind(value: object) -> str:
    return type(value).__qualname__
