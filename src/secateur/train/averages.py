"""Running averages of a model, and the moments that optimizers keep: both have to know which weights have gone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.tasks import plain
from secateur.train.bits import keep_
from secateur.train.shards import Group, local, total

OTHER = ("momentum_buffer", "exp_inf", "square_avg", "grad_avg", "acc_delta", "sum")
"""What torch's optimizers call their moments, besides those with exp_avg in their names."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of theirs."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def inner(average: nn.Module) -> nn.Module:
    """The model inside torch's ``AveragedModel``, or the copy itself."""
    if isinstance(average, torch.optim.swa_utils.AveragedModel):
        average = average.module
    return plain(average)


def require_same(average: nn.Module, model: nn.Module) -> None:
    """Raise PlanError where the average is not one of this model."""
    theirs, ours = tensors_of(inner(average)), tensors_of(model)
    for name, tensor in ours.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = list(theirs[name].shape) if name in theirs else "no such tensor"
            raise PlanError(f"average= is no average of this model: for {name!r}, {list(tensor.shape)}, it has {found}")
        if local(theirs[name]).shape != local(tensor).shape:
            raise PlanError(f"average= is not split over processes as the model is, such as {name!r}; shard it alike")


def mask(average: nn.Module, masks: Iterable[tuple[str, Tensor]]) -> None:
    """Zero in the average what masks do not keep, by name and of the shape of what is here."""
    named = tensors_of(inner(average))
    for name, kept in masks:
        here = local(named[name]).detach()
        keep_(here, kept.to(here.device))


def clear_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Zero what the optimizer remembers of the elements ``where`` (of the shape of what is here)."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
            local(value).masked_fill_(where, 0)


def level_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, grown: Tensor, others: Tensor, group: Group | None = None
) -> None:
    """Give ``grown`` elements the mean second moment of ``others``, over all processes of a group.

    From zero Adam's first step would be (1 - beta1) / sqrt(1 - beta2), about 3 times the learning rate.
    """
    state = optimizer.state.get(parameter, {})
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in state:
            here = local(state[name])
            count = int(total(others.sum(), group))
            sums = total(here[others].sum(dtype=torch.float32), group)
            if count:
                here.masked_fill_(grown, float(sums) / count)


def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer forget all gradients: moments of all parameters, and the count of steps that corrects them."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if name == "step" and not isinstance(value, Tensor):
                state[name] = 0
            elif isinstance(value, Tensor) and (name == "step" or name in OTHER or "exp_avg" in name):
                local(value).zero_()
