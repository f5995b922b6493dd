"""What callbacks of every library do: make a method once the training has its optimizer, step it, finish it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from secateur.errors import DataError, SpecError
from secateur.plan import Plan
from secateur.train.optimizers import innermost
from secateur.train.pruner import Pruner


class Make(Protocol):
    """Makes the method, such as ``functools.partial(Gradual, budget="sparsity=90%")``."""

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> Pruner: ...


@dataclass(eq=False)
class Work:
    """A method in a loop that others run."""

    make: Make
    pruner: Pruner | None = None
    plan: Plan | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        done: int,
        state: Mapping[str, Any] | None,
    ) -> Pruner:
        """Make the method, and let it go on from ``state`` where ``done`` steps lie behind.

        Raises SpecError where another method is at work already, DataError where the state is missing.
        """
        if self.pruner is not None:
            self.pruner.detach()  # of a training that was cut off
            self.pruner = self.plan = None
        hooks = getattr(innermost(optimizer), "_optimizer_step_pre_hooks", {})
        if others := [hook for hook in hooks.values() if isinstance(getattr(hook, "__self__", None), Pruner)]:
            raise SpecError(
                f"a {type(others[0].__self__).__name__} prunes with this optimizer already; give one callback, or call "
                "detach() on a method of before"
            )
        if done and state is None:
            raise DataError(
                f"the training goes on from step {done}, and its checkpoint holds no state of a pruning method: it was "
                "saved without this callback, or without the optimizer; load its weights, and train from step 0"
            )
        pruner = self.make(model, optimizer, steps=steps)
        if not isinstance(pruner, Pruner):
            raise SpecError(f"make gave a {type(pruner).__name__}, expected a method such as Gradual")
        try:
            if done and state is not None:
                pruner.load_state_dict(state)
        except DataError:
            pruner.detach()
            raise
        self.pruner = pruner
        return pruner

    def step(self) -> None:
        if self.pruner is not None and not self.pruner.finished:
            self.pruner.step()

    def finish(self) -> None:
        """Raises PlanError where the training ended before the schedule did."""
        if self.pruner is not None and not self.pruner.finished:
            self.plan = self.pruner.finish()
