"""Fine-tuning after pruning."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.mask import keep_zeros
from secateur.errors import DataError
from secateur.plan import Plan
from secateur.progress import track
from secateur.recover.distill import distillation_loss
from secateur.tasks import Task, batches, call, clone, device_of, evaluate, mode

WARMUP = 0.05
"""Part of the steps over which the learning rate rises: momentum starts from nothing."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data: mean training loss, then the mean validation score it led to.

    ``seconds`` counts training and validation, ``lr`` is the rate of the last step.
    """

    loss: float
    validation: float
    seconds: float
    lr: float


def recover(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 2,
    lr: float = 0.01,
    plan: Plan | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    patience: int | None = None,
    amp: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Fine-tune a copy of ``model`` on the task's training split; returns it and its history.

    SGD with Nesterov momentum 0.9, no weight decay, the rate rising over the first 5 % of the steps
    and falling to zero along a cosine. The default rate is high on purpose: the usual 0.001 costs a
    pruned network accuracy (Le and Hua 2021).

    plan: its masked weights stay zero. A plan of channels asks for nothing: they are gone.
    teacher: the loss becomes ``alpha`` · distillation + (1 - ``alpha``) · task loss, against the
        teacher's outputs in evaluation mode (see ``distillation_loss``).
    patience: stop after that many epochs in a row without a better validation score.
    amp: compute in bfloat16 where autocast finds it safe.
    seed: of shuffling, augmentation and dropout; the caller's random state stays as it was.

    The returned weights are those of the best validation score, the given ones included: recovery
    does not make a model worse there. Raises DataError for a loss that is NaN or infinite, an empty
    split, or a model without trainable parameters.
    """
    student = clone(model)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("the model has no trainable parameters; set requires_grad on those to fine-tune")
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
    device = device_of(student)

    def loss_of(inputs: Any, targets: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = call(student, inputs)
            loss = task.loss(output, targets)
            if teacher is None:
                return loss
            with torch.no_grad():
                told = call(teacher, inputs)
            return alpha * distillation_loss(output, told, temperature) + (1 - alpha) * loss

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        if teacher is not None:
            stack.enter_context(mode(teacher, training=False))
        if plan is not None and plan.masks:
            stack.enter_context(keep_zeros(student, plan, optimizer))
        return student, _train(student, task, optimizer, loss_of, epochs, lr, patience)


def _train(
    student: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Any, Any], Tensor],
    epochs: int,
    lr: float,
    patience: int | None,
) -> tuple[Epoch, ...]:
    """Train ``student`` in place and leave it with the weights of its best validation score."""
    per_epoch = _count(task.batches("train"))
    best, stale = _validate(student, task), 0
    weights = copy.deepcopy(student.state_dict())
    history: list[Epoch] = []
    for epoch in track(range(epochs), "Fine-tuning"):
        start = time.perf_counter()
        losses: list[float] = []
        with mode(student, training=True):
            for inputs, targets in track(batches(task, "train", student), "Epoch", per_epoch):
                rate = lr * _rate(epoch * per_epoch + len(losses), epochs * per_epoch)
                losses.append(_step(optimizer, rate, loss_of, inputs, targets))
        score = _validate(student, task)
        history.append(Epoch(sum(losses) / len(losses), score, time.perf_counter() - start, rate))
        if score > best:
            best, stale = score, 0
            weights = copy.deepcopy(student.state_dict())
        else:
            stale += 1
        if stale == patience:
            break
    student.load_state_dict(weights)
    optimizer.zero_grad()
    return tuple(history)


def _step(
    optimizer: torch.optim.Optimizer,
    rate: float,
    loss_of: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = loss_of(inputs, targets)
    value = loss.item()
    if not math.isfinite(value):
        raise DataError(f"the training loss became {value}; lower lr (now {rate:.3g}) or check the data")
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value


def _rate(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear rise, then half a cosine down to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def _validate(model: nn.Module, task: Task) -> float:
    return float(evaluate(model, task, "validation").mean())


def _count(passes: Iterable[Any]) -> int:
    return len(passes) if isinstance(passes, Sized) else sum(1 for _ in passes)
