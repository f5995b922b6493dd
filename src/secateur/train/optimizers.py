"""Optimizers as they come: inside wrappers of other libraries, and with closures that make the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from secateur.errors import SpecError

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of an optimizer's ``step``, itself first."""


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's and Lightning's wrappers. Raises SpecError for what is no optimizer."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    return optimizer


def once_there_are_gradients(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Given | None:
    """Call ``then``: at once, or after the closure that makes the gradients inside the step, as Lightning's does.

    For a step's pre-hook: the arguments to go on with, None where they stay. Raises SpecError, inside the step, where
    the optimizer calls the closure again.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        then()
        return None
    called = False

    def once() -> Any:
        nonlocal called
        if called:
            raise SpecError(
                f"{type(args[0]).__name__} evaluates the loss several times in one step, and pruning while training "
                "needs the gradients of one; use another optimizer"
            )
        called = True
        loss = closure()
        then()
        return loss

    return (args[0], *args[2:]), {**kwargs, "closure": once}
