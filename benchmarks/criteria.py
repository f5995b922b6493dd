"""What each criterion, and each allocation, keeps of two networks' accuracy before any fine-tuning.

    python benchmarks/criteria.py            # resumable: rows of today's results are not run again
    python benchmarks/criteria.py resnet20   # only rows whose name has that in it

Accuracy is on the validation split, after batch norms are recalibrated, with half and with 70 % of the multiply-adds
left: these numbers chose the defaults, so they are not numbers to report. Criteria in units of the loss come twice, as
they are and as if their scores were of no unit (the mean over a unit's weights, relative to that of its axis).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import common
import nets
import texts
from secateur import criteria
from secateur.allocate import Sensitivity, Strategy
from secateur.apply.shrink import carry_out
from secateur.depth import make
from secateur.graph import Graph, analyze
from secateur.recover import recalibrate_
from secateur.sensitivity import measure
from secateur.stats import Stats
from secateur.tasks import Classification, batches, evaluate

BUDGETS = ("macs=50%", "macs=70%")
SEEDS = (0, 1, 2)
"""Of the random baseline."""

ALLOCATED = ("magnitude", "block_fisher")
"""Criteria that every allocation is tried with."""

NETS: dict[str, Callable[[], tuple[nn.Module, Classification]]] = {
    "resnet20": lambda: (nets.resnet20(), nets.cifar10()),
    "encoder": lambda: (texts.encoder(), texts.sst2()),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = common.rows("criteria", today=True)
    for net, load in NETS.items():
        wanted = [key for key in _keys() if f"{net} {' '.join(key)}" not in rows]
        if not wanted or not any(word in net for word in sys.argv[1:] or [net]):
            continue
        model, task = load()
        graph = analyze(model, task.validation[0][:2])
        scores: dict[str, dict[str, Tensor]] = {}
        for criterion, pooled, allocate in wanted:
            name, _, seed = criterion.partition("-")
            if criterion not in scores:
                scores[criterion] = criteria.score(model, graph, name, task, int(seed or 0))
            by = _again(scores[criterion], losses=pooled == "sum per cost")
            strategy: str | Strategy = allocate
            if allocate == "sensitivity":
                strategy = Sensitivity(measure(model, graph, criterion=by, task=task))
            found = [_accuracy(model, graph, task, by, strategy, budget) for budget in BUDGETS]
            row = {"net": net, "criterion": criterion, "pooled": pooled, "allocate": allocate}
            rows[f"{net} {criterion} {pooled} {allocate}"] = row | dict(zip(BUDGETS, found, strict=True))
            print(*row.values(), *found, flush=True)
            common.save("criteria", rows)


def _keys() -> list[tuple[str, str, str]]:
    """(criterion, how its scores are pooled, allocation)"""
    found = []
    for name in criteria.BUILT_IN:
        for criterion in [f"random-{seed}" for seed in SEEDS] if name == "random" else [name]:
            if criteria.gives_losses(name):
                found.append((criterion, "sum per cost", "global"))
            found.append((criterion, "relative mean", "global"))
    for name in ALLOCATED:
        pooled = "sum per cost" if criteria.gives_losses(name) else "relative mean"
        found += [(name, pooled, allocate) for allocate in ("uniform", "erk", "sensitivity")]
    return found


def _again(scores: dict[str, Tensor], *, losses: bool) -> criteria.Criterion:
    def scored(weight: Tensor, stats: Stats) -> Tensor:
        return scores[stats.name]

    return criteria.in_loss_units(scored) if losses else scored


def _accuracy(
    model: nn.Module, graph: Graph, task: Classification, by: criteria.Criterion, allocate: str | Strategy, budget: str
) -> float:
    """On the validation split, with the batch norms recalibrated on the calibration split."""
    plan = make(model, graph, budget=budget, criterion=by, allocate=allocate, task=task)
    small = carry_out(model, plan, verify=False).model
    if any(isinstance(m, nn.BatchNorm2d) for m in small.modules()):
        recalibrate_(small, (inputs for inputs, _ in batches(task, "calibration", small)))
    return float(evaluate(small, task, "validation").mean())


if __name__ == "__main__":
    main()
