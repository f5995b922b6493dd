"""Training with a method that prunes, for those without a loop: that of ``recover``, walked with a pruner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError
from secateur.plan import Plan
from secateur.recover.checkpoint import Tree
from secateur.recover.finetune import prepared
from secateur.recover.loop import Listener
from secateur.recover.loop import train as walk
from secateur.recover.options import Recovery
from secateur.recover.randomness import restore
from secateur.recover.run import Epoch, Run, put_, snapshot, tensors_of
from secateur.tasks import Task, evaluate
from secateur.train.pruner import Pruner

Make = Callable[[nn.Module, torch.optim.Optimizer, int, nn.Module | None], Pruner]
"""Model, optimizer, steps, running average or None -> the method at work on them."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of a training. ``model`` has the zeros of ``plan``, ``chosen`` is the epoch that its weights are of,
    ``ended`` the one in which the schedule came to its end; both count from 1.
    """

    model: nn.Module
    plan: Plan
    history: tuple[Epoch, ...]
    chosen: int
    ended: int


def train(
    model: nn.Module,
    task: Task,
    make: Make,
    how: Recovery,
    *,
    about: Mapping[str, Any],
    teacher: nn.Module | None = None,
    tell: Listener | None = None,
) -> Trained:
    """Train a copy of ``model`` on the task's training split while what ``make`` gives prunes it.

    The weights are those of the best validation score among the epochs after the schedule's end; of the last epoch
    where there is none. With ``how.checkpoint`` a run that was stopped goes on as one of ``recover`` does.

    about: what tells the method's wishes from others, as JSON: the checkpoint of other ones is refused.
    teacher: as in ``recover``. tell: told of every epoch; of the last one twice where the process died after it.

    Raises what ``recover`` raises, and PlanError where the schedule does not come to its end.
    """
    with prepared(model, how, teacher) as (student, optimizer):
        run = _Training(student, task, how, optimizer, teacher, make, about)
        walk(run, "Training", tell)
        plan = run.pruner.finish()
        return Trained(run.judged, plan, tuple(run.at.history), run.chosen["epoch"], run.ended)


class _Training(Run):
    """A run whose zeros a method chooses on the way.

    A step in fp16 whose gradients overflow is made again at a lower scale, so that all steps are applied which the
    method's schedule counts on.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        how: Recovery,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None,
        make: Make,
        about: Mapping[str, Any],
    ) -> None:
        super().__init__(student, task, how, optimizer, teacher, {})
        self.about, self.ended = about, 0
        self.averages = self.judged is not student
        self.at.batches = self.count()
        if not self.at.batches:
            raise DataError("the train split has no batches; give it at least one example")
        steps = self.steps(self.at.batches)
        self.pruner = make(student, optimizer, steps, self.judged if self.averages else None)
        self.chosen: dict[str, Any] = {}

    @property
    def sparsity(self) -> float:
        return self.pruner.sparsity

    def begin(self) -> None:
        """The weights given are not judged: they are dense."""

    def advance(self, group: Sequence[Any]) -> None:
        while not self.apply():
            self.gradients(group)
        self.at.applied += 1
        self.pruner.step()
        self.average()

    def mask_gradients(self) -> None:
        self.pruner.mask_gradients()

    def validate(self) -> tuple[float, bool]:
        self._mask_average()
        score = float(evaluate(self.judged, self.task, "validation").mean())
        if not self.ended and self.pruner.done == len(self.pruner.schedule):
            self.ended = self.at.epoch + 1
        better = bool(self.ended) and score > self.at.best
        if better:
            self.at.best = score
        if better or not self.ended:
            self.best = snapshot(self.judged)
            weights = snapshot(self.student) if self.averages else {}
            self.chosen = {"epoch": self.at.epoch + 1, "weights": weights, "pruner": self.pruner.state_dict()}
        return score, better

    def end(self) -> None:
        """Model, average and method as they were after the chosen epoch."""
        put_(self.student, self.chosen["weights"] if self.averages else self.best)
        put_(self.judged, self.best)
        self.pruner.load_state_dict(self.chosen["pruner"])
        self.optimizer.zero_grad()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **self.about}

    def state(self) -> Tree:
        own = {"chosen": self.chosen, "ended": self.ended, "pruner": self.pruner.state_dict()}
        return {**super().state(), **own}

    def load(self, state: Tree) -> None:
        super().load(state)
        self.chosen, self.ended = state["chosen"], state["ended"]
        self.pruner.load_state_dict(state["pruner"])
        restore(state["model"], self.device)  # a method may have drawn

    def _mask_average(self) -> None:
        """A method may change masks with every step; the average is judged with the zeros that it would end with."""
        if self.averages:
            named = tensors_of(self.judged)
            with torch.no_grad():
                for name in self.pruner.bits:
                    if name in named and (keep := self.pruner.mask(name)) is not None:
                        named[name].masked_fill_(~keep, 0)
