"""The whole road in one call, and its steps: analyze, score, allocate, plan, apply, recover, verify, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur import patterns
from secateur.allocate import Strategy, curves_of
from secateur.apply.shrink import become_
from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.criteria import Criterion
from secateur.depth import make, measured
from secateur.errors import PlanError, SpecError
from secateur.graph import Graph, analyze
from secateur.names import Choice
from secateur.plan import Plan
from secateur.planning import Least
from secateur.promise import CHECKING, CHOOSING, Half, HalfTask, keep
from secateur.recover import Recovery
from secateur.report import Point
from secateur.report.log import Log
from secateur.road import Arrived, Trip, checkpoint, least_part, of_part, require_possible, walk, whole
from secateur.runtime.lowering import Lowering
from secateur.store import Result
from secateur.targets import cpu_sparse, cuda_24
from secateur.targets.onnx import export_onnx
from secateur.tasks import Task, evaluate, plain


def plan(model: nn.Module, inputs: Any, **wishes: Any) -> Plan:
    """Choose what stays, without touching the model: ``analyze`` and ``secateur.depth.make`` in one call.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword); or the Graph that ``analyze`` made of them,
    given ties or freed outputs. wishes: the keyword arguments of ``make``: pattern, budget, criterion, allocate, task,
    ignore, overrides, minimum, seed.
    """
    return make(model, inputs if isinstance(inputs, Graph) else analyze(model, inputs), **wishes)


def prune(
    model: nn.Module,
    inputs: Any,
    *,
    pattern: str = "channel",
    budget: str | None = "macs=50%",
    criterion: str | Criterion | None = None,
    allocate: str | Strategy = "global",
    task: Task | None = None,
    ignore: Choice | Sequence[Choice] = (),
    overrides: Mapping[str, float] | None = None,
    minimum: Least | Mapping[str, Least] = 1,
    reconstruct: str | None = None,
    rounds: int = 1,
    epochs: int = 0,
    lr: float = 0.01,
    amp: bool | str = False,
    patience: int | None = None,
    recovery: Mapping[str, Any] | None = None,
    inplace: bool = False,
    verify: bool = True,
    seed: int = 0,
    source: str = "",
) -> Result:
    """Prune a model to a budget, and measure what came of it.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword); latency and MACs are taken on them. Or the
        Graph that ``analyze`` made of them, given ties or freed outputs.
    pattern, budget, criterion, allocate: see the modules of those names; the criterion is by default magnitude, for
        blocks influence. The budget ``max_drop=1%`` is a promise about the score, see the module ``promise``: where no
        model keeps it, the result is the dense one, and the report's first note says so.
    task: data, loss and score; with it batch norms are recalibrated, accuracy is measured on the test split, and the
        model is fine-tuned for ``epochs`` with distillation from the dense one.
    reconstruct: compensate before any training: "bias", "least_squares" or "blockwise"; see ``recover.reconstruct``.
        Batch norms are then recalibrated only where that helps on the validation split.
    rounds: reach the budget in that many rounds of pruning and ``epochs`` of fine-tuning, each of which keeps the same
        part. Zeros stand for removed units in between.
    recovery: further options of ``recover``, such as {"checkpoint": "folder", "ema": 0.999}; see ``Recovery``.
    ignore: weights, axes and blocks to leave alone: globs, modules, or functions of their names.
    overrides: glob -> part to remove there. minimum: units that every axis keeps at least, a count or a part; or
        glob -> such.
    inplace: change ``model`` itself, at the very end, after everything else has succeeded. Without it a model that is
        compiled or wrapped for several devices gives a plain one. verify: hold a shrunk model to the law that removing
        is zeroing, on the example inputs. source: where the model comes from, noted for ``save``.

    Raises PruneError's children, each saying what was found and what to do; the model is then as it was.
    """
    _require_task(task, epochs=epochs or None, reconstruct=reconstruct)
    require_possible(pattern, budget, task, reconstruct, rounds, epochs)
    options = {"lr": lr, "amp": amp, "patience": patience, "seed": seed, **(recovery or {})}
    Recovery(epochs=epochs, **options)  # read now, so that a mistake does not end an hour of pruning
    given, model = model, plain(model)
    graph = inputs if isinstance(inputs, Graph) else analyze(model, inputs)
    _require_values(model)
    wishes: dict[str, Any] = {"pattern": pattern, "budget": budget, "criterion": criterion, "task": task, "seed": seed}
    wishes |= {"ignore": ignore, "overrides": overrides, "minimum": minimum}
    wishes["allocate"] = measured(allocate, model, graph, wishes)
    trip = Trip(model, graph, wishes, task, reconstruct, rounds, epochs, options, verify, seed)
    return _finished(trip, budget, given, inplace, source)


def _finished(trip: Trip, budget: str | None, given: nn.Module, inplace: bool, source: str) -> Result:
    """The trip to a budget and what was measured of it."""
    wish = parse_budget(budget) if budget is not None else None
    notes, tried = tuple[str, ...](), tuple[Point, ...]()
    if wish is not None and wish.kind == "max_drop":
        arrived, notes, tried = _promised(trip, wish)
    else:
        arrived = walk(trip, budget)
    plan, done, small = arrived.plan, arrived.done, arrived.model
    if inplace and done.form != "module":
        raise PlanError(f"{type(trip.model).__name__} cannot be shrunk in place, {done.why}; use inplace=False")
    log = Log(trip.model, trip.graph, plan, done, trip.task, curves_of(trip.wishes["allocate"]), notes, tried)
    for name, stage in arrived.stages:
        log.stage(name, stage)
    if inplace:
        become_(given, plan, done, small)
        small = given
    return Result(small, plan, log.report(), trip.graph.inputs, done.form, source, done.attributes, done.taken)


def _promised(trip: Trip, wish: Budget) -> tuple[Arrived, tuple[str, ...], tuple[Point, ...]]:
    """The smallest model that keeps ``max_drop``, or the dense one; and what to say of it."""
    _require_task(trip.task, budget=str(wish))
    assert trip.task is not None
    kind, least, largest = _scale(trip)
    tasks = [HalfTask(trip.task, half) for half in (CHOOSING, CHECKING)]
    chooses = replace(trip, task=tasks[CHOOSING])  # what fine-tuning sees of the validation split, too
    found: dict[float, Arrived] = {}

    def scores(model: nn.Module) -> Half:
        return lambda half: evaluate(model, tasks[half], "validation")

    def attempt(part: float) -> Half:
        budget = None if least == largest else of_part(kind, part)
        apart = {**trip.options, **checkpoint(trip, of_part(kind, part))}
        found[part] = walk(replace(chooses, options=apart), budget)
        return scores(found[part].model)

    verdict = keep(scores(trip.model), attempt, float(wish.value), least, largest)
    arrived = found[verdict.kept.part] if verdict.kept is not None else whole(trip, kind)
    named = replace(arrived, plan=replace(arrived.plan, budget=str(wish)))
    what = "weights" if kind == "sparsity" else kind
    tried = (Point(f"validation, {what}", c.part, c.score) for c in verdict.candidates)
    return named, verdict.told(what), tuple(tried)


def _scale(trip: Trip) -> tuple[str, float, float]:
    """What the sizes of candidates are measured in, and the smallest and largest part of the dense model's."""
    shape = patterns.parse(trip.wishes["pattern"])
    if isinstance(shape, patterns.NM):
        return "sparsity", shape.n / shape.m, shape.n / shape.m
    kind = "sparsity" if isinstance(shape, patterns.Unstructured | patterns.Block) else "macs"
    if kind == "macs" and trip.graph.program.hidden:  # those cannot be counted
        kind = "params"
    return kind, max(0.01, least_part(trip.model, trip.graph, trip.wishes, kind)), 1.0


def _require_task(task: Task | None, **wishes: Any) -> None:
    for name, wish in wishes.items():
        if wish is not None and task is None:
            raise SpecError(f"{name}={wish!r} needs task=: data, a loss and a score")


def _require_values(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise SpecError(
            "the model has no values (device meta), so nothing can be measured; use analyze, plan and shrink"
        )


def lower(model: nn.Module | Result, inputs: Any = None, *, target: str = "cpu-sparse", **wishes: Any) -> nn.Module:
    """A model that runs on a target, never slower there than the one given, which is not changed.

    model: a module and example inputs (Tensor | tuple | dict), or the Result of ``prune``, which has its own. target:
    "cpu-sparse", the sparse engine for CPUs; "cuda-2:4", the sparse tensor cores of NVIDIA's GPUs. wishes: the keyword
    arguments of ``secateur.targets.cpu_sparse.lower`` or ``secateur.targets.cuda_24.lower_24``.

    The attribute ``lowering`` of what is returned, a ``Lowering``, says what was chosen for each layer, and why. Raises
    SpecError for another target or missing inputs, TargetError where the target cannot be used here.
    """
    if target not in ("cpu-sparse", "cuda-2:4"):
        raise SpecError(f"target {target!r} is unknown; expected 'cpu-sparse' or 'cuda-2:4'")
    if isinstance(model, Result):
        model, inputs = model.model, model.inputs if inputs is None else inputs
    if inputs is None:
        raise SpecError("lower needs example inputs, because layers are tuned for their shapes: lower(model, inputs)")
    if target == "cuda-2:4":
        lowered, choices = cuda_24.lower_24(model, inputs, **wishes)
        form = "module" if any(choice.form != "dense" for choice in choices) else "dense"
        lowered.lowering = Lowering(form, choices)  # type: ignore[assignment]
        return lowered
    return cpu_sparse.lower(model, inputs, **wishes)


def export(model: nn.Module, inputs: Any, target: str, folder: Path | str) -> Path:
    """Write ``model`` for another runtime, checked against eager PyTorch on the inputs; returns the file's path.

    target: "onnx". Raises SpecError for another one, TargetError where the runtime disagrees.
    """
    if target != "onnx":
        raise SpecError(f"target {target!r} is unknown; expected 'onnx'")
    return export_onnx(model, inputs, Path(folder))
