"""The whole road in one call, and its steps: analyze, score, allocate, plan, apply, recover, verify, report."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import patterns
from secateur.allocate import Curve, Strategy, curves_of
from secateur.apply.mask import mask
from secateur.apply.shrink import Shrunk, become_, carry_out
from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.criteria import Criterion
from secateur.depth import make, measured
from secateur.errors import BudgetError, PlanError, SpecError
from secateur.graph import Graph, analyze
from secateur.graph.trace import run
from secateur.measure import Measurement, latency, measure
from secateur.names import Choice
from secateur.plan import Plan
from secateur.planning import Least
from secateur.progress import track
from secateur.recover import Recovery, recalibrate_, recover
from secateur.report import Frozen, Layer, Report, Row
from secateur.store import Result
from secateur.targets.onnx import export_onnx
from secateur.tasks import Interval, Scores, Task, batches, judge, paired_difference, plain, proportion

SECONDS = 2.0
"""How long a pair of models is timed."""


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
        blocks influence.
    task: data, loss and score; with it batch norms are recalibrated, accuracy is measured on the test split, and the
        model is fine-tuned for ``epochs`` with distillation from the dense one.
    recovery: further options of ``recover``, such as {"checkpoint": "folder", "ema": 0.999}; see ``Recovery``.
    ignore: weights, axes and blocks to leave alone: globs, modules, or functions of their names.
    overrides: glob -> part to remove there. minimum: units that every axis keeps at least, a count or a part; or
        glob -> such.
    inplace: change ``model`` itself, at the very end, after everything else has succeeded. Without it a model that is
        compiled or wrapped for several devices gives a plain one. verify: hold a shrunk model to the law that removing
        is zeroing, on the example inputs. source: where the model comes from, noted for ``save``.

    Raises PruneError's children, each saying what was found and what to do; the model is then as it was.
    """
    if epochs and task is None:
        raise SpecError(f"epochs={epochs} needs task=: data to train on, a loss and a score")
    options = {"lr": lr, "amp": amp, "patience": patience, "seed": seed, **(recovery or {})}
    Recovery(epochs=epochs, **options)  # read now, so that a mistake does not end an hour of pruning
    given, model = model, plain(model)
    graph = inputs if isinstance(inputs, Graph) else analyze(model, inputs)
    _require_values(model)
    wishes: dict[str, Any] = {"pattern": pattern, "budget": budget, "criterion": criterion, "task": task, "seed": seed}
    wishes |= {"ignore": ignore, "overrides": overrides, "minimum": minimum}
    wishes["allocate"] = measured(allocate, model, graph, wishes)
    chosen, done = _carried_out(model, graph, wishes, verify)
    if inplace and done.form != "module":
        raise PlanError(f"{type(model).__name__} cannot be shrunk in place, {done.why}; use inplace=False")
    log = _Log(model, graph, chosen, done, task, curves_of(wishes["allocate"]))
    small = _recover(done.model, model, log, task, chosen, epochs, options)
    report = log.report(small)
    if inplace:
        become_(given, chosen, done, small)
        small = given
    return Result(small, chosen, report, graph.inputs, done.form, source, done.attributes, done.taken)


def _carried_out(model: nn.Module, graph: Graph, wishes: dict[str, Any], verify: bool) -> tuple[Plan, Shrunk]:
    """A plan and what comes of it. Where a class remembers one size for several axes, a plan that respects that."""
    chosen = _choose(model, graph, wishes)
    if not chosen.units:
        return chosen, _masked(model, chosen)
    done = carry_out(model, chosen, verify=verify, evenly=True)
    if done.form:
        return chosen, done
    with contextlib.suppress(BudgetError):
        even = _choose(model, graph, {**wishes, "equal": done.equal})
        kept = carry_out(model, even, verify=verify)
        if kept.form == "module":
            return even, replace(kept, equal=done.equal)
    return chosen, carry_out(model, chosen, verify=verify)


def _require_values(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise SpecError(
            "the model has no values (device meta), so nothing can be measured; use analyze, plan and shrink"
        )


def _choose(model: nn.Module, graph: Graph, wishes: dict[str, Any]) -> Plan:
    """A plan that meets the budget; latency is the one kind that takes measuring."""
    wish = parse_budget(wishes["budget"]) if wishes["budget"] is not None else None
    removes = isinstance(patterns.parse(wishes["pattern"]), patterns.Channel | patterns.Layer | patterns.Both)
    if wish is not None and wish.kind == "latency" and removes:
        return _meet_latency(model, graph, wish, {k: v for k, v in wishes.items() if k != "budget"})
    return make(model, graph, **wishes)


def export(model: nn.Module, inputs: Any, target: str, folder: Path | str) -> Path:
    """Write ``model`` for another runtime, checked against eager PyTorch on the inputs; returns the file's path.

    target: "onnx". Raises SpecError for another one, TargetError where the runtime disagrees.
    """
    if target != "onnx":
        raise SpecError(f"target {target!r} is unknown; expected 'onnx'")
    return export_onnx(model, inputs, Path(folder))


def _masked(model: nn.Module, chosen: Plan) -> Shrunk:
    masked = mask(model, chosen)
    run(masked, chosen.graph.inputs if chosen.graph else None)
    return Shrunk(masked, "module", "", None)


def _recover(
    small: nn.Module,
    dense: nn.Module,
    log: _Log,
    task: Task | None,
    chosen: Plan,
    epochs: int,
    options: Mapping[str, Any],
) -> nn.Module:
    log.stage("pruned", small)
    if task is None:
        return small
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None for m in small.modules()):
        recalibrate_(small, (inputs for inputs, _ in batches(task, "calibration", small)))
        log.stage("recalibrated", small)
    if epochs:
        small, _ = recover(small, task, epochs=epochs, plan=chosen, teacher=dense, **options)
        log.stage("recovered", small)
    return small


# --- latency ---------------------------------------------------------------------------------------

_STEPS = 7  # halvings of the range of MACs


def _meet_latency(model: nn.Module, graph: Graph, wish: Budget, wishes: Mapping[str, Any]) -> Plan:
    """The plan with the most MACs whose shrunk model, measured here in turns with the dense one, meets the wish."""

    def attempt(part: float) -> tuple[Plan, float]:
        chosen = make(model, graph, budget=f"macs={100 * part:.4f}%", **wishes)
        small = carry_out(model, chosen, verify=False).model
        times = latency({"dense": model, "small": small}, graph.inputs, SECONDS / 4)
        if wish.relative:
            return chosen, times["small"].ratio(times["dense"]).value
        return chosen, times["small"].spread.value

    limit = float(wish.value)
    low, high = _least_macs(model, graph, wishes), 1.0
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


def _least_macs(model: nn.Module, graph: Graph, wishes: Mapping[str, Any]) -> float:
    try:
        make(model, graph, budget="macs=0.0001%", **wishes)
    except BudgetError as error:
        if error.nearest is not None:
            return min(1.0, error.nearest + 1e-5)
        raise
    return 1e-6


# --- report ----------------------------------------------------------------------------------------


@dataclass
class _Log:
    """What is measured on the way."""

    dense: nn.Module
    graph: Graph
    plan: Plan
    done: Shrunk
    task: Task | None
    curves: tuple[Curve, ...] = ()
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Both are timed in turns: on a shared machine nothing else compares.
        inputs = self.graph.inputs
        self.costs = measure(self.done.model, inputs, {"dense": self.dense}, SECONDS)
        timed = self.costs.against["dense"]
        self.ratio = self.costs.latency.ratio(timed)
        self.before: Scores | None = None
        self.stage("dense", self.dense, replace(measure(self.dense, inputs, seconds=0), latency=timed))

    def stage(self, name: str, model: nn.Module, costs: Measurement | None = None) -> None:
        """One row: what the model is now, and how well it does on the test split."""
        accuracy = drop = None
        metrics: dict[str, float] = {}
        if self.task is not None:
            scores, metrics = judge(model, self.task, "test")
            accuracy = proportion(scores)
            if self.before is None:
                self.before = scores
            else:
                drop = paired_difference(self.before, scores)
        row = _row(name, costs or self.costs, model, accuracy, drop)
        self.rows.append(replace(row, metrics=metrics))

    def report(self, small: nn.Module) -> Report:
        kind = type(self.dense).__name__
        return Report(
            title=f"{kind}, {self.plan.pattern}, {self.plan.budget or 'no budget'}",
            rows=tuple(self.rows),
            layers=tuple(_layers(self.graph, self.plan)),
            frozen=tuple(self._frozen()),
            law=self.done.law,
            meta={**self.plan.meta, **_machine(), **self._how()},
            notes=tuple(self._notes()),
            sensitivity=self.curves,
        )

    def _frozen(self) -> Iterable[Frozen]:
        pattern = patterns.parse(self.plan.pattern)
        if not isinstance(pattern, patterns.Layer):
            yield from (Frozen(a.name, a.units, a.frozen) for a in self.graph.axes if a.frozen)
        if isinstance(pattern, patterns.Layer | patterns.Both):
            yield from (Frozen(b.name, 1, b.frozen) for b in self.graph.blocks if b.frozen)

    def _how(self) -> dict[str, str | int]:
        return {
            "pattern": self.plan.pattern,
            "budget": self.plan.budget,
            "form": self.done.form,
            "why": self.done.why,
            "latency ratio": "{:.3f} ({:.3f} to {:.3f})".format(*self.ratio),
        }

    def _notes(self) -> Iterable[str]:
        if self.done.form == "program":
            yield (
                "The result is the exported program rewritten with the new sizes, because "
                f"{self.done.why}. Parameter names are the same; outside norms and "
                "dropout it behaves as in evaluation mode."
            )
        elif self.done.equal:
            groups = "; ".join(", ".join(group) for group in self.done.equal)
            yield f"The class remembers one size for these axes, so they keep the same part of their units: {groups}."
        if self.done.unsaved:
            yield f"save_pretrained would not be loadable, {self.done.unsaved}; secateur.save keeps the model."
        if self.plan.masks:
            yield (
                "Zeros in dense tensors take the same time and bytes as other values on this machine: the latency "
                "and size here are those of the dense format."
            )
        pattern = patterns.parse(self.plan.pattern)
        for name, weight in self.graph.weights.items():
            if self.plan.masks and (why := patterns.why_not(pattern, weight)):
                yield f"{name} stays dense: it {why}."


def _row(name: str, costs: Measurement, model: nn.Module, accuracy: Interval | None, drop: Interval | None) -> Row:
    return Row(
        stage=name,
        params=costs.params,
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=costs.macs,
        bytes=costs.bytes,
        accuracy=accuracy,
        drop=drop,
        latency=costs.latency.spread,
        memory=costs.memory,
    )


def _layers(graph: Graph, chosen: Plan) -> Iterable[Layer]:
    for name, weight in graph.weights.items():
        after = list(weight.shape)
        for dim, flags in chosen.slices.get(name, {}).items():
            after[dim] = int(flags.sum())
        kept = float(chosen.masks[name].double().mean()) if name in chosen.masks else 1.0
        for new, old in zip(after, weight.shape, strict=True):
            kept *= new / old
        yield Layer(name, weight.shape, tuple(after), kept, weight.macs)


def _machine() -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "secateur": metadata.version("secateur"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
