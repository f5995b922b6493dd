"""Optimizers as they come: inside wrappers of other libraries, and with closures that make the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from secateur.errors import PlanError, SpecError
from secateur.train.shards import local

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of an optimizer's ``step``, itself first."""


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's and Lightning's wrappers. Raises SpecError for what is no optimizer of torch's.

    One that wraps something else (DeepSpeed's) has no hooks to act in.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise SpecError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer that takes the steps"
        )
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


def left_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler lets a fused optimizer leave out, inside, the step that it takes now."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def unscale_(optimizer: torch.optim.Optimizer) -> None:
    """Do what a gradient scaler leaves to fused optimizers: make gradients those of the loss."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                local(parameter.grad).div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def require_trained(optimizer: torch.optim.Optimizer, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise PlanError where the optimizer does not have one of the weights, by name."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in weights:
        if id(tensor) not in owned:
            raise PlanError(
                f"the optimizer does not train {name!r}: it was replaced, or belongs to another model; make the "
                "optimizer from this model's parameters, then the method, or put the weight into ignore="
            )
