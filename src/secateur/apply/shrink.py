"""``shrink``: carry out a channel plan for good, and prove that the result is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.apply.mask import mask
from secateur.apply.resize import resize_
from secateur.apply.rewrite import rewrite
from secateur.errors import LawError, PlanError, TraceError
from secateur.graph import Graph, analyze
from secateur.graph.trace import first_line, run
from secateur.graph.types import Flags
from secateur.plan import Plan
from secateur.tasks import clone

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference from the oracle, relative to the largest output, that rounding alone explains."""


@dataclass(frozen=True)
class Law:
    """What the check found: the error against the oracle named, relative to the largest output."""

    error: float
    tolerance: float
    oracle: str  # "zeroed original" or "sliced program"


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A shrunk model. ``form`` is "module" (the user's class) or "program" (its rewritten program, and ``why``)."""

    model: nn.Module
    form: str
    why: str
    law: Law | None


def shrink(model: nn.Module, plan: Plan, inputs: Any = None, *, verify: bool = True) -> nn.Module:
    """A smaller copy of ``model`` without the units that ``plan`` removes; the model itself is not changed.

    The copy is of the same class wherever that class runs with the new sizes. Where it hard-codes them the result is
    its exported program, rewritten: trainable, with the same parameter names. With ``verify`` the copy is held to the
    law on the example inputs: it equals the original with the same units zeroed; where a norm or mean over channels
    makes zeroing inexact, it equals the exported program with every tensor sliced.

    inputs: example inputs; needed only for a plan that was loaded from a file.
    Raises PlanError for a plan that does not fit, LawError where the check fails.
    """
    return carry_out(model, plan, inputs, verify=verify).model


def shrink_(model: nn.Module, plan: Plan, inputs: Any = None, *, verify: bool = True) -> nn.Module:
    """``shrink`` in place: parameters of ``model`` are replaced, so make optimizers afterwards.

    A copy is shrunk and checked first; on any failure the model is as it was. Raises PlanError, besides, where only
    the rewritten program can hold the new sizes.
    """
    done = carry_out(model, plan, inputs, verify=verify)
    if done.form != "module":
        raise PlanError(f"{type(model).__name__} cannot be shrunk in place, {done.why}; use shrink(model, plan)")
    resize_(model, plan.slices)
    return model


def carry_out(model: nn.Module, plan: Plan, inputs: Any = None, *, verify: bool = True) -> Shrunk:
    """``shrink``, with what was found on the way: the form of the result and the law's error."""
    if not plan.units:
        raise PlanError(
            f"a plan with pattern {plan.pattern!r} sets weights to zero and removes no units, so nothing can shrink; "
            "use mask(model, plan), or make a plan with pattern='channel'"
        )
    plan.check_fits(model)
    graph = plan.graph if inputs is None else analyze(model, inputs)
    if graph is None:
        raise PlanError("this plan was loaded from a file; give example inputs: shrink(model, plan, inputs)")
    keep = _flags(graph, plan)
    inputs = graph.inputs
    small = clone(model)
    resize_(small, plan.slices)
    oracle = run(rewrite(graph.program, small, graph.alive(keep)), inputs)
    form, why = "module", _why_not(small, inputs, oracle, _tolerance(model))
    if why:
        form, small = "program", as_program(model, plan, small, inputs)
        error = relative_error(run(small, inputs), oracle)
        if not error <= _tolerance(model):
            raise LawError(f"the program rewritten for any batch size differs from the traced one by {error:.2g}")
    law = _check(model, plan, graph, small, oracle) if verify else None
    return Shrunk(small, form, why, law)


def _flags(graph: Graph, plan: Plan) -> dict[str, Flags]:
    """The plan's units as flags on this graph's axes; PlanError where they are not the same axes."""
    axes = {a.name: a for a in graph.axes}
    for name, flags in plan.units.items():
        if name not in axes or axes[name].units != len(flags):
            found = f"{axes[name].units} units" if name in axes else "no such axis"
            raise PlanError(
                f"the plan keeps units of axis {name!r} ({len(flags)} units), the model has {found}; "
                "make the plan anew for this model and these inputs"
            )
        if axes[name].frozen and not bool(flags.all()):
            raise PlanError(f"the plan removes units of axis {name!r}, which is frozen: {axes[name].frozen}")
    return {name: flags.cpu().numpy() for name, flags in plan.units.items()}


def _why_not(small: nn.Module, inputs: Any, oracle: Any, tolerance: float) -> str:
    """Why the user's class cannot hold the new sizes; "" where it runs and gives the oracle's outputs."""
    try:
        error = relative_error(run(small, inputs), oracle)
    except TraceError as failure:
        return f"its code holds on to the old sizes ({first_line(failure.__cause__)})"
    if not error <= tolerance:
        return f"its code computes with the old sizes (outputs differ by {error:.2g})"
    return ""


def as_program(model: nn.Module, plan: Plan, small: nn.Module, inputs: Any) -> nn.Module:
    """The rewritten program of ``model`` over the sliced tensors of ``small``.

    It is not tied to the example's batch size where the model allows that.
    """
    free = analyze(model, inputs, dynamic_batch=True)
    return rewrite(free.program, small, free.alive(_flags(free, plan)))


def _check(model: nn.Module, plan: Plan, graph: Graph, small: nn.Module, oracle: Any) -> Law:
    changed = [graph.axis(name) for name, flags in plan.units.items() if not bool(flags.all())]
    exact, tolerance = all(axis.exact for axis in changed), _tolerance(model)
    want = run(mask(model, plan), graph.inputs) if exact else oracle
    name = "zeroed original" if exact else "sliced program"
    error = relative_error(run(small, graph.inputs), want)
    if not error <= tolerance:
        raise LawError(
            f"the shrunk model differs from the {name} by {error:.2g} (relative), expected at most {tolerance:.0e}; "
            "the model was left as it was. This is a defect: please report it with the model's code"
        )
    return Law(error, tolerance, name)


def _tolerance(model: nn.Module) -> float:
    dtypes = {p.dtype for p in model.parameters()}
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float32])


def relative_error(found: Any, expected: Any) -> float:
    """Largest absolute difference of floating-point outputs over the largest absolute output, per tensor; the worst.

    Infinite where shapes differ or one is not finite where the other is.
    """
    floats = [
        [x.detach().double() for x in tree_leaves(o) if isinstance(x, Tensor) and x.is_floating_point()]
        for o in (found, expected)
    ]
    if len(floats[0]) != len(floats[1]):
        return float("inf")
    worst = 0.0
    for a, b in zip(*floats, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().max()
            scale = b[b.isfinite()].abs().max() if b.isfinite().any() else torch.tensor(1.0)
            worst = max(worst, float((gap / scale.clamp_min(1e-12)).nan_to_num(float("inf"))))
    return worst
