"""``shrink``: carry out a plan of channels or blocks for good, and prove that the result is right."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from secateur.apply.adapt import Adapted, adapt_
from secateur.apply.attributes import Changes, write_
from secateur.apply.blame import relative_error
from secateur.apply.depth import Dropped, Taken, drop, drop_, handed
from secateur.apply.mask import mask
from secateur.apply.movable import attention_dropout_
from secateur.apply.oracle import ZeroedProgram
from secateur.apply.resize import resize_
from secateur.apply.rewrite import rewrite
from secateur.errors import LawError, PlanError, TraceError
from secateur.graph import Graph, analyze
from secateur.graph.program import Program
from secateur.graph.trace import run
from secateur.graph.types import Flags
from secateur.plan import Plan
from secateur.tasks import SEVERAL, clone, plain

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
    oracle: str  # "zeroed original" or "zeroed program"


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A shrunk model. ``form`` is "module" (the user's class) or "program" (its rewritten program, and ``why``).

    ``attributes`` are the numbers that modules of the user's class had to be given besides their tensors; ``factors``
    say which query weights were multiplied because the class derives its attention scale from a width that changed.
    ``unsaved`` says why ``save_pretrained`` of a Hugging Face model would not be loadable, "" where it is. ``taken``
    says how blocks were taken out of the user's class.
    """

    model: nn.Module
    form: str
    why: str
    law: Law | None
    attributes: Changes = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    unsaved: str = ""
    equal: tuple[tuple[str, ...], ...] = ()
    taken: Taken = field(default_factory=dict)


def shrink(model: nn.Module, plan: Plan, inputs: Any = None, *, verify: bool = True) -> nn.Module:
    """A smaller copy of ``model`` without the units that ``plan`` removes; the model itself is not changed.

    The copy is of the same class wherever that class runs with the new sizes. Where it hard-codes them the result is
    its exported program, rewritten: trainable, with the same parameter names. With ``verify`` the copy is held to the
    law on the example inputs: it equals the original with the same units zeroed; where a norm or mean over channels
    makes zeroing inexact, it equals the exported program with every tensor sliced. Blocks that go are left out of both.

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
    become_(model, plan, done, done.model)
    return model


def become_(model: nn.Module, plan: Plan, done: Shrunk, small: nn.Module) -> None:
    """Make the dense model what ``small``, shrunk from it by ``plan``, is: sizes, attributes, blocks and values.

    done: what ``carry_out`` made of the plan; ``small`` may have been trained since.
    """
    if plan.slices and any(isinstance(module, SEVERAL) for module in model.modules()):
        raise PlanError(
            f"a {type(model).__name__} cannot be shrunk in place: it holds on to the old parameters of the "
            "model inside; shrink that one, and wrap it again"
        )
    model = plain(model)
    refit_(model, plan, done.attributes, done.taken)
    model.load_state_dict(small.state_dict())


def refit_(model: nn.Module, plan: Plan, attributes: Changes, taken: Taken) -> None:
    """Give a dense model the sizes, attributes and blocks that ``plan`` leaves; its values are not worked out anew."""
    resize_(model, plan.cuts)
    write_(model, attributes)
    drop_(model, taken)


def carry_out(model: nn.Module, plan: Plan, inputs: Any = None, *, verify: bool = True, evenly: bool = False) -> Shrunk:
    """``shrink``, with what was found on the way: the form of the result and the law's error.

    evenly: stop, with form "", where the class could hold sizes of the same part throughout ``equal`` groups of axes;
    rewriting its program takes another, longer export.
    """
    if not plan.units:
        raise PlanError(
            f"a plan with pattern {plan.pattern!r} sets weights to zero and removes no units, so nothing can shrink; "
            "use mask(model, plan), or make a plan with pattern='channel'"
        )
    model = plain(model)
    plan.check_fits(model)
    graph = plan.graph if inputs is None else _again(model, plan, inputs)
    if graph is None:
        raise PlanError("this plan was loaded from a file; give example inputs: shrink(model, plan, inputs)")
    keep, inputs, gone = _flags(graph, plan), graph.inputs, plan.dropped
    verify = verify and not any(p.is_meta for p in model.parameters())  # without values there is nothing to compare
    if verify:
        _check_captured(model, graph)
    narrow = _narrow(graph, plan)
    small = clone(model)
    resize_(small, narrow.slices)
    alive, tolerance = graph.alive(keep), _tolerance(model)
    written = rewrite(graph.program, small, alive)
    whole = run(written, inputs)
    oracle = run(rewrite(graph.without(gone).program, small, alive), inputs) if gone else whole
    found = adapt_(small, graph, alive, written, inputs, whole, tolerance) if narrow.slices else Adapted()
    dropped = Dropped(small, why=found.why)
    if gone and not found.why:
        dropped = drop(small, gone, handed(model, gone, inputs), inputs, oracle, tolerance)
    small = dropped.model
    if dropped.why and found.equal and evenly:
        return Shrunk(small, "", dropped.why, None, equal=found.equal)
    if dropped.why and graph.program.hidden:
        raise PlanError(
            f"{type(model).__name__} cannot hold the new sizes, {dropped.why}, and its program cannot stand in for it: "
            f"{graph.program.hidden[0]}; ignore the axes concerned, or change that code"
        )
    if dropped.why:
        small = clone(model)
        resize_(small, narrow.slices)
        small = as_program(model, plan, small, inputs, graph)
        error = relative_error(run(small, inputs), oracle)
        if not error <= tolerance:
            raise LawError(f"the program rewritten for any batch size differs from the traced one by {error:.2g}")
    law = _check(model, plan, graph, small) if verify else None
    if dropped.why:
        return Shrunk(small, "program", dropped.why, law, equal=found.equal)
    unsaved = found.unsaved or dropped.unsaved
    return Shrunk(small, "module", "", law, found.attributes, found.factors, unsaved, taken=dropped.taken)


def _narrow(graph: Graph, plan: Plan) -> Plan:
    """The plan without its blocks: the units that axes lose, everywhere."""
    keep = _flags(graph, plan)
    full = graph.slices(keep) if plan.dropped else {}
    slices = {n: {d: torch.from_numpy(f) for d, f in dims.items()} for n, dims in full.items()} | plan.cuts
    return replace(plan, units={name: plan.units[name] for name in keep}, slices=slices)


def _flags(graph: Graph, plan: Plan) -> dict[str, Flags]:
    """The plan's units as flags on this graph's axes; PlanError where they are not the same axes, or blocks."""
    axes = {a.name: a for a in graph.axes}
    blocks = {} if plan.units.keys() <= axes.keys() else {b.name: b for b in graph.blocks}
    for name, flags in plan.units.items():
        if name in blocks and name not in axes and len(flags) == 1:
            if blocks[name].frozen and name in plan.dropped:
                raise PlanError(f"the plan drops block {name!r}, which is frozen: {blocks[name].frozen}")
            continue
        if name not in axes or axes[name].units != len(flags):
            found = f"{axes[name].units} units" if name in axes else "no such axis or block"
            raise PlanError(
                f"the plan keeps units of axis {name!r} ({len(flags)} units), the model has {found}; "
                "make the plan anew for this model and these inputs"
            )
        if axes[name].frozen and not bool(flags.all()):
            raise PlanError(f"the plan removes units of axis {name!r}, which is frozen: {axes[name].frozen}")
        if not bool(flags.any()):
            raise PlanError(f"the plan keeps no unit of axis {name!r}; only blocks can go as a whole")
    return {name: flags.cpu().numpy() for name, flags in plan.units.items() if name in axes}


def as_program(model: nn.Module, plan: Plan, small: nn.Module, inputs: Any, graph: Graph | None = None) -> nn.Module:
    """The rewritten program of ``model`` over the sliced tensors of ``small``.

    It is not tied to the example's batch size where the model allows that: where the open program has the same axes
    and blocks, and runs. Otherwise it is that of ``graph``, which is found anew where it is not given.
    """
    free = _again(model, plan, inputs, dynamic_batch=True)
    with contextlib.suppress(PlanError, TraceError):
        if {b.name for b in free.blocks if not b.frozen} >= set(plan.dropped):  # one may compute the batch for others
            written = _written(free, plan, model, small, inputs)
            run(written, inputs)
            return written
    return _written(graph or _again(model, plan, inputs), plan, model, small, inputs)


def _written(graph: Graph, plan: Plan, model: nn.Module, small: nn.Module, inputs: Any) -> fx.GraphModule:
    """The graph's program with the plan's sizes. Raises PlanError where its axes are not those of the plan."""
    program, alive = graph.without(plan.dropped).program, graph.alive(_flags(graph, plan))
    cuts = {(name, d): tuple(flags.tolist()) for name, dims in plan.cuts.items() for d, flags in dims.items()}
    if program.slices(alive) != cuts:
        raise PlanError("the plan keeps other channels than the axes of this model; make the plan anew")
    written = rewrite(program, small, alive)
    attention_dropout_(written, model, inputs)
    return written


def _again(model: nn.Module, plan: Plan, inputs: Any, dynamic_batch: bool = False) -> Graph:
    """The model analyzed once more, with what the plan's user declared about it."""
    said = plan.declared
    return analyze(model, inputs, ties=said.ties, free_outputs=said.free_outputs, dynamic_batch=dynamic_batch)


def _freed(output: Any, program: Program, alive: Flags) -> Any:
    """An output of the dense model without the channels that freed outputs lost."""
    kept = iter(program.kept_outputs(alive))

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            for dim, flags in next(kept).items():
                value = value.index_select(dim, torch.from_numpy(flags.nonzero()[0]).to(value.device))
        return value

    return tree_map(cut, output)


def _check_captured(model: nn.Module, graph: Graph) -> None:
    """Raise TraceError where the captured program is not what the model computes: axes found in it mean nothing."""
    error = relative_error(run(graph.program.module, graph.inputs), run(model, graph.inputs))
    if not error <= _tolerance(model):
        raise TraceError(
            f"the program that torch.export captured of {type(model).__name__} differs from the model itself by "
            f"{error:.2g} on the example inputs, so nothing can be proved about a smaller one; look for code that "
            "asks whether it is being traced, or draws random numbers, in evaluation mode"
        )


def _check(model: nn.Module, plan: Plan, graph: Graph, small: nn.Module) -> Law:
    narrow, left = _narrow(graph, plan), graph.without(plan.dropped)
    changed = [graph.axis(name) for name, flags in narrow.units.items() if not bool(flags.all())]
    exact, tolerance = all(axis.exact for axis in changed), _tolerance(model)
    alive = graph.alive(_flags(graph, plan))
    zeroed: nn.Module = mask(model, narrow) if exact else ZeroedProgram(left.program, model, alive)
    if exact and plan.dropped:
        zeroed = rewrite(left.program, zeroed, np.ones_like(alive))
    want = _freed(run(zeroed, graph.inputs), left.program, alive)
    name = ("zeroed original" if exact else "zeroed program") + (" without the blocks that go" if plan.dropped else "")
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
