"""Fine-tuning after pruning: any loop's epochs, but masked, taught, and able to go on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from secateur.apply.mask import keep_zeros
from secateur.errors import DataError
from secateur.plan import Plan
from secateur.recover.loop import train
from secateur.recover.options import Recovery
from secateur.recover.randomness import seed_all, untouched
from secateur.recover.run import Epoch, Run
from secateur.tasks import Task, clone, device_of, mode


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
    with ExitStack() as stack:
        student, optimizer = stack.enter_context(prepared(model, how, teacher))
        masks = plan.masks if plan is not None else {}
        if plan is not None and masks:
            stack.enter_context(keep_zeros(student, plan, optimizer))
        run = Run(student, task, how, optimizer, teacher, masks)
        train(run, "Fine-tuning")
        return student, tuple(run.at.history)


@contextmanager
def prepared(
    model: nn.Module, how: Recovery, teacher: nn.Module | None
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """A copy of the model to train, and its optimizer, under the seed; the random states are as before afterwards.

    Raises DataError where there is nothing to train.
    """
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
        yield student, optimizer
