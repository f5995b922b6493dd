"""One trip from a dense model to a pruned one: choose, carry out, compensate, recalibrate, fine-tune; in rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import criteria, patterns
from secateur.apply.mask import mask
from secateur.apply.shrink import Shrunk, carry_out
from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.budget import rounds as budget_rounds
from secateur.criteria import Criterion
from secateur.depth import make
from secateur.errors import BudgetError, SpecError
from secateur.graph import Graph
from secateur.graph.trace import run
from secateur.measure import latency
from secateur.plan import Plan
from secateur.progress import track
from secateur.recover import recalibrate_, reconstruct, recover
from secateur.recover.compensate import require_known
from secateur.stats import Stats
from secateur.tasks import Task, batches, clone, evaluate


@dataclass(frozen=True, eq=False)
class Trip:
    """What is asked, apart from the budget. ``wishes`` are arguments of ``depth.make``, ``options`` of ``recover``."""

    model: nn.Module
    graph: Graph
    wishes: Mapping[str, Any]
    task: Task | None = None
    compensate: str | None = None
    rounds: int = 1
    epochs: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    verify: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Arrived:
    """What came of it: the plan, how it was carried out, and the model after every stage, the last one the result."""

    plan: Plan
    done: Shrunk
    stages: tuple[tuple[str, nn.Module], ...]

    @property
    def model(self) -> nn.Module:
        return self.stages[-1][1]


def require_possible(
    pattern: str, budget: str | None, task: Task | None, reconstruct: str | None, rounds: int, epochs: int
) -> None:
    """Raise SpecError for what no trip can do, whatever the model, before anything is computed."""
    shape = patterns.parse(pattern)
    if reconstruct is not None:
        require_known(reconstruct)
        if isinstance(shape, patterns.Layer | patterns.Both):
            raise SpecError(
                f"reconstruct={reconstruct!r} refits the layers after removed channels or weights, and pattern "
                f"{pattern!r} drops whole blocks; leave reconstruct out"
            )
    if rounds != 1:
        wish = parse_budget(budget) if budget is not None and not isinstance(shape, patterns.NM) else None
        if rounds < 1 or wish is None or task is None or not epochs:
            raise SpecError(f"rounds={rounds} needs a budget that can be split, a task, and epochs for every round")
        if wish.kind != "max_drop":  # the candidates of a promise have budgets of their own
            list(budget_rounds(wish, rounds))


def walk(trip: Trip, budget: str | None) -> Arrived:
    """Prune to a budget, and give the model back what it lost. The dense model is not changed."""
    model, wishes = _through_rounds(trip, budget)
    chosen, done = _carried_out(trip, model, {**wishes, "budget": budget})
    stages, refitted = [("pruned", done.model)], None
    if trip.compensate and trip.task is not None:
        refitted = _compensated(trip, model, chosen, done)
        stages.append(("compensated", refitted.model))
        if _validated(refitted.model, trip.task) < _validated(done.model, trip.task):
            stages.append(("taken back", done.model))  # such as where most of the calibration data is padding
        else:
            done = refitted
    if trip.task is not None and _keeps_statistics(done.model):
        fresh = clone(done.model)
        recalibrate_(fresh, (inputs for inputs, _ in batches(trip.task, "calibration", fresh)))
        # Refitted weights already give what the old statistics expect; new ones can do harm then.
        if done is not refitted or _validated(fresh, trip.task) > _validated(done.model, trip.task):
            stages.append(("recalibrated", fresh))
    if trip.epochs and trip.task is not None:
        options = {**trip.options, "epochs": trip.epochs, **(checkpoint(trip, "last round") if trip.rounds > 1 else {})}
        small, _ = recover(stages[-1][1], trip.task, plan=chosen, teacher=trip.model, **options)
        stages.append(("recovered", small))
    return Arrived(chosen, done, tuple(stages))


def _validated(model: nn.Module, task: Task) -> float:
    return float(evaluate(model, task, "validation").mean())


def _keeps_statistics(model: nn.Module) -> bool:
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.running_mean is not None for norm in norms)


def _compensated(trip: Trip, model: nn.Module, chosen: Plan, done: Shrunk) -> Shrunk:
    assert trip.task is not None
    assert trip.compensate is not None
    refitted = reconstruct(model, trip.graph, chosen, trip.task, trip.compensate, trip.seed)
    if not chosen.units:
        return _masked(refitted, chosen)
    return replace(carry_out(refitted, chosen, trip.graph.inputs, verify=trip.verify), equal=done.equal)


def whole(trip: Trip, kind: str) -> Arrived:
    """The dense model, copied, with a plan that removes nothing."""
    masks = kind == "sparsity"
    wishes = {**trip.wishes, "overrides": None, **({"pattern": "unstructured"} if masks else {})}
    everything = make(trip.model, trip.graph, **{**wishes, "budget": of_part(kind, 1.0)})
    copied = clone(trip.model)
    return Arrived(everything, Shrunk(copied, "module", "", None), (("kept whole", copied),))


def of_part(kind: str, part: float) -> str:
    """The budget that leaves a part."""
    return f"sparsity={100 * (1 - part):.4f}%" if kind == "sparsity" else f"{kind}={100 * part:.4f}%"


# --- rounds ----------------------------------------------------------------------------------------


def _through_rounds(trip: Trip, budget: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The dense-shaped model after all rounds but the last, and the wishes of the last: what went stays gone.

    In between, removed units are zeros in the full model: one plan in the end says all.
    """
    model, wishes = trip.model, dict(trip.wishes)
    if trip.rounds == 1:
        return model, wishes
    assert budget is not None
    assert trip.task is not None
    for now in list(budget_rounds(parse_budget(budget), trip.rounds))[:-1]:
        chosen = _choose(model, trip.graph, {**wishes, "budget": str(now)})
        _require_exact(trip.graph, chosen)
        if trip.compensate:
            model = reconstruct(model, trip.graph, chosen, trip.task, trip.compensate, trip.seed)
        zeros = replace(chosen, masks={n: chosen.keep(n) for n in chosen.tensors}, units={}, slices={})
        options = {**trip.options, "epochs": trip.epochs, **checkpoint(trip, f"round {now}")}
        model, _ = recover(mask(model, zeros), trip.task, plan=zeros, teacher=trip.model, **options)
        wishes["criterion"] = _after(wishes.get("criterion") or "magnitude", chosen)
    return model, wishes


def checkpoint(trip: Trip, name: str) -> dict[str, Any]:
    """A folder of its own for each of several trainings, where they are to be resumable."""
    folder = trip.options.get("checkpoint")
    return {"checkpoint": Path(folder) / name} if folder is not None else {}


def _require_exact(graph: Graph, chosen: Plan) -> None:
    if chosen.dropped:
        raise SpecError(
            f"rounds train with zeros in place, and a dropped block ({chosen.dropped[0]}) is none; rounds=1"
        )
    for name, flags in chosen.units.items():
        if not bool(flags.all()) and not graph.axis(name).exact:
            raise SpecError(
                f"rounds train with zeros in place of removed units, and a norm or mean runs over axis {name!r}, so "
                f"that zeros are not the same as removal there; give ignore={name!r}, or rounds=1"
            )


def _after(criterion: str | Criterion, before: Plan) -> Criterion:
    """The criterion, with the lowest scores for what an earlier plan removed."""
    function = criteria.resolve(criterion)

    def after(weight: Tensor, stats: Stats) -> Tensor:
        scores = function(weight, stats)
        if stats.name not in before.tensors:
            return scores
        return torch.where(before.keep(stats.name).to(scores.device), scores, scores.min().clamp_max(0))

    after.__name__ = getattr(function, "__name__", "custom")
    vars(after).update(vars(function))
    return after


# --- choosing --------------------------------------------------------------------------------------


def _carried_out(trip: Trip, model: nn.Module, wishes: dict[str, Any]) -> tuple[Plan, Shrunk]:
    """A plan and what comes of it. Where a class remembers one size for several axes, a plan that respects that."""
    chosen = _choose(model, trip.graph, wishes)
    if not chosen.units:
        return chosen, _masked(model, chosen)
    # The graph holds the dense model's values: one with others is traced anew.
    inputs = None if model is trip.model else trip.graph.inputs
    done = carry_out(model, chosen, inputs, verify=trip.verify, evenly=True)
    if done.form:
        return chosen, done
    with contextlib.suppress(BudgetError):
        even = _choose(model, trip.graph, {**wishes, "equal": done.equal})
        kept = carry_out(model, even, inputs, verify=trip.verify)
        if kept.form == "module":
            return even, replace(kept, equal=done.equal)
    return chosen, carry_out(model, chosen, inputs, verify=trip.verify)


def _choose(model: nn.Module, graph: Graph, wishes: dict[str, Any]) -> Plan:
    """A plan that meets the budget; latency is the one kind that takes measuring."""
    wish = parse_budget(wishes["budget"]) if wishes["budget"] is not None else None
    removes = isinstance(patterns.parse(wishes["pattern"]), patterns.Channel | patterns.Layer | patterns.Both)
    if wish is not None and wish.kind == "latency" and removes:
        return meet_latency(model, graph, wish, {k: v for k, v in wishes.items() if k != "budget"})
    return make(model, graph, **wishes)


def _masked(model: nn.Module, chosen: Plan) -> Shrunk:
    masked = mask(model, chosen)
    run(masked, chosen.graph.inputs if chosen.graph else None)
    return Shrunk(masked, "module", "", None)


# --- latency ---------------------------------------------------------------------------------------

_STEPS, SECONDS = 7, 0.5
"""Halvings of the range of MACs, and how long a pair of models is timed at each."""


def meet_latency(model: nn.Module, graph: Graph, wish: Budget, wishes: Mapping[str, Any]) -> Plan:
    """The plan with the most MACs whose shrunk model, measured here in turns with the dense one, meets the wish."""

    def attempt(part: float) -> tuple[Plan, float]:
        chosen = make(model, graph, budget=f"macs={100 * part:.4f}%", **wishes)
        small = carry_out(model, chosen, verify=False).model
        times = latency({"dense": model, "small": small}, graph.inputs, SECONDS)
        if wish.relative:
            return chosen, times["small"].ratio(times["dense"]).value
        return chosen, times["small"].spread.value

    limit = float(wish.value)
    low, high = least_part(model, graph, wishes, "macs"), 1.0
    best, nearest = attempt(low)
    if nearest > limit:
        unit = "of the dense model's time" if wish.relative else "ms"
        value = f"{nearest:.1%}" if wish.relative else f"{nearest:.3g}"
        raise BudgetError(
            f"{wish} cannot be met on this machine: at the fewest units, {low:.1%} of the MACs, the model "
            f"takes {value} {unit}; that is the nearest possible",
            nearest if wish.relative else None,
        )
    for _ in track(range(_STEPS), "Measuring latency"):
        middle = (low * high) ** 0.5
        chosen, found = attempt(middle)
        if found <= limit:
            low, best = middle, chosen
        else:
            high = middle
    return replace(best, budget=str(wish))


def least_part(model: nn.Module, graph: Graph, wishes: Mapping[str, Any], kind: str) -> float:
    """The smallest part that a plan can leave: of MACs or parameters, or of the weights where ``kind`` is sparsity."""
    try:
        make(model, graph, **{**wishes, "budget": of_part(kind, 1e-6)})
    except BudgetError as error:
        if error.nearest is not None:
            return min(1.0, error.nearest + 1e-5)
        raise
    return 1e-6
