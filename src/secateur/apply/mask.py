"""Zeros in real weights: ``mask`` puts them there, ``keep_zeros`` keeps them there while a loop trains.

No hooks on the model, no extra parameters or buffers: what has zeros is an ordinary model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.tasks import clone, plain


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` in which everything that ``plan`` removes is zero; the model itself is not changed.

    Raises PlanError where the plan is not for this model.
    """
    model = plain(model)
    plan.check_fits(model)
    return mask_(clone(model), plan)


def mask_(model: nn.Module, plan: Plan) -> nn.Module:
    """``mask`` in place: the same parameters, with zeros. Ties stay tied. Nothing changes where PlanError is raised."""
    inner = plain(model)
    plan.check_fits(inner)
    if plan.dropped:
        raise PlanError(
            f"the plan drops whole blocks ({plan.dropped[0]}, …), which zeros do not show: a block of zeros need not "
            "hand its input on; use shrink(model, plan)"
        )
    with torch.no_grad():
        for tensor, gone in _removed(inner, plan):
            tensor.masked_fill_(gone, 0)
    return model


@contextlib.contextmanager
def keep_zeros(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> Iterator[nn.Module]:
    """Inside, what the plan removes stays exactly zero after every step of ``optimizer``.

    Zeros are put in place on entry; whatever a step writes over them, infinities included, is wiped. Moments that the
    optimizer holds for removed weights are cleared on entry and exit. The one hook is the optimizer's, and is gone
    afterwards; the model can be copied, pickled and saved meanwhile.

    Raises PlanError where the plan is not for this model, or the optimizer trains none of what it touches; inside,
    where a parameter is replaced by another one.
    """
    mask_(model, plan)
    inner = plain(model)
    removed = _removed(inner, plan)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if removed and not any(id(tensor) in owned for tensor, _ in removed):
        raise PlanError(
            "the optimizer trains none of the parameters that the plan masks; make it from this model's parameters"
        )
    expected = {name: id(_named(inner)[name]) for name in plan.tensors}

    def wipe(*_: Any) -> None:
        named = _named(inner)
        for name, identity in expected.items():
            if id(named.get(name)) != identity:
                raise PlanError(
                    f"parameter {name!r} was replaced inside keep_zeros; enter it again with a new optimizer"
                )
        with torch.no_grad():
            for tensor, gone in removed:
                tensor.masked_fill_(gone, 0)

    _clear_moments(optimizer, removed)
    handle = optimizer.register_step_post_hook(wipe)
    try:
        yield model
    finally:
        handle.remove()
        _clear_moments(optimizer, removed)


def _named(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _removed(model: nn.Module, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Every tensor that the plan touches, with flags of its shape: True goes."""
    named = _named(model)
    return [(named[name], (~plan.keep(name)).to(named[name].device)) for name in plan.tensors]


def _clear_moments(optimizer: torch.optim.Optimizer, removed: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, gone in removed:
            for value in optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    value.masked_fill_(gone, 0)
