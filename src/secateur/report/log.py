"""What is measured on the way from the dense model to the pruned one, and the report that comes of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from secateur import patterns
from secateur.allocate import Curve
from secateur.apply.shrink import Shrunk
from secateur.graph import Graph
from secateur.measure import Measurement, measure
from secateur.plan import Plan
from secateur.report import Frozen, Layer, Point, Report, Row
from secateur.tasks import Interval, Scores, Task, judge, paired_difference, proportion

SECONDS = 2.0
"""How long a pair of models is timed."""


@dataclass
class Log:
    """What is measured on the way."""

    dense: nn.Module
    graph: Graph
    plan: Plan
    done: Shrunk
    task: Task | None
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    tried: tuple[Point, ...] = ()
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

    def report(self) -> Report:
        """What was measured, once every stage is noted."""
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
            tried=self.tried,
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
        yield from self.notes
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
                "and size here are those of the dense format. secateur prune --packed stores them without zeros, "
                "secateur bench FOLDER --target cpu-sparse says what they gain on the sparse engine."
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
