"""What each criterion and each compensation costs, in passes over the calibration data: the time of scoring every
weight, or of refitting for half the multiply-adds, over that of running the model on the same data once, in evaluation
mode and without gradients.

    python benchmarks/criteria_cost.py

All are timed in turns in one process, after one untimed turn; median, lowest and highest of the ratios of each round.
Calibration data are 128 examples in batches of 32, so that single examples' gradients are seen beside batches of a
usual size. Tracing is not counted, but for the export at the data's shape that ``activation`` and ``apoz`` make.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import common
import nets
import texts
from secateur.criteria import BUILT_IN, score
from secateur.graph import Graph, analyze
from secateur.plan import Plan
from secateur.planning import make
from secateur.recover import METHODS, reconstruct
from secateur.tasks import Classification, batches, call, mode

EXAMPLES, BATCH = 128, 32
ROUNDS = 3


@dataclass(frozen=True)
class Net:
    model: nn.Module
    graph: Graph
    task: Classification
    plan: Plan  # half of the multiply-adds, by magnitude


def forward(net: Net) -> None:
    """The unit: one pass over the calibration data."""
    with mode(net.model, training=False), torch.no_grad():
        for inputs, _ in batches(net.task, "calibration", net.model):
            call(net.model, inputs)


def criterion(name: str, net: Net) -> None:
    score(net.model, net.graph, name, net.task)


def compensation(method: str, net: Net) -> None:
    reconstruct(net.model, net.graph, net.plan, net.task, method)


CONTENDERS: dict[str, Callable[[Net], None]] = {
    "forward": forward,
    **{name: functools.partial(criterion, name) for name in BUILT_IN},
    **{f"reconstruct {name}": functools.partial(compensation, name) for name in METHODS},
}
"""What is timed; the first one is what the others are compared with."""


def resnet56() -> Net:
    return _net(nets.resnet56(), nets.cifar10())


def encoder() -> Net:
    return _net(texts.encoder(), texts.sst2())


def _net(model: nn.Module, task: Classification) -> Net:
    x, y = task.calibration or task.train
    few = replace(task, calibration=(x[:EXAMPLES], y[:EXAMPLES]), batch_size=BATCH)
    graph = analyze(model, x[:1])
    return Net(model, graph, few, make(model, graph, pattern="channel", budget="macs=50%"))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for load in (resnet56, encoder):
        net = load()
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for counted in [False, *[True] * ROUNDS]:
            for name, run in CONTENDERS.items():
                start = time.perf_counter()
                run(net)
                if counted:
                    seconds[name].append(time.perf_counter() - start)
        found[load.__name__] = seconds
    unit = next(iter(CONTENDERS))
    rows = {
        name: {
            **{net: _ratio(seconds[name], seconds[unit]) for net, seconds in found.items()},
            "seconds": {net: statistics.median(seconds[name]) for net, seconds in found.items()},
        }
        for name in CONTENDERS
    }
    for name, row in rows.items():
        print(f"{name:14}", *(f"{net} {row[net][0]:.2f}" for net in found))
    print(common.save("criteria_cost", rows))


def _ratio(seconds: list[float], unit: list[float]) -> list[float]:
    """Median, lowest and highest over the rounds."""
    ratios = [a / b for a, b in zip(seconds, unit, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


if __name__ == "__main__":
    main()
