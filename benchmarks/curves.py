"""What a network's accuracy does from 50 to 90 % sparsity: every pattern by every criterion, before any training.

    python benchmarks/curves.py                     # resumable: rows of today's results are not run again
    python benchmarks/curves.py encoder 2:4         # only rows whose name has all of that in it
    python benchmarks/curves.py --html curves.html  # the page of curves, from the results

MobileNetV2-0.35 (357 k parameters, batch norm folded) on 200 images of ImageNet, and the encoder of SST-2 (1.45 M) on
1,000 sentences of its train-dev split, both never used to choose. Criteria with data and compensation see the same
calibration examples: 200 images, 512 sentences. Masks are global; of channels, that part of the parameters goes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
import nets
import texts
from secateur.criteria import BUILT_IN
from secateur.errors import PruneError
from secateur.graph import Graph, analyze
from secateur.report import Point, Report
from secateur.road import Trip, walk
from secateur.tasks import Classification, Interval, evaluate, proportion

SPARSITIES = (50, 70, 90)


@dataclass(frozen=True)
class Net:
    model: nn.Module
    graph: Graph
    task: Classification
    dense: Interval


def mobilenetv2() -> Net:
    return _net(nets.mobilenetv2(), nets.imagenet())


def encoder() -> Net:
    task = texts.sst2()
    x, y = task.test
    return _net(texts.encoder(), replace(task, test=(x[:1000], y[:1000])))


def _net(model: nn.Module, task: Classification) -> Net:
    dense = proportion(evaluate(model, task, "test"))
    return Net(model, analyze(model, task.test[0][:2]), task, dense)


def wishes() -> Iterator[tuple[str, str | None, float]]:
    """Pattern, budget, and the part that is left of the weights, or of the parameters."""
    for sparsity in SPARSITIES:
        left = 1 - sparsity / 100
        yield "unstructured", f"sparsity={sparsity}%", left
        yield "block:4x1", f"sparsity={sparsity}%", left
        yield "channel", f"params={100 - sparsity}%", left
    yield "2:4", None, 0.5


def measured(net: Net, pattern: str, budget: str | None, criterion: str) -> dict[str, Any]:
    asked = {"pattern": pattern, "criterion": criterion, "allocate": "global", "task": net.task}
    trip = Trip(net.model, net.graph, asked, net.task, "least_squares", verify=False)
    try:
        stages = walk(trip, budget).stages
    except PruneError as error:
        return {"refused": str(error)}
    return {"stages": {name: proportion(evaluate(model, net.task, "test")) for name, model in stages}}


def run(words: list[str]) -> None:
    torch.set_num_threads(1)
    rows = common.rows("curves", today=True)
    for load in (mobilenetv2, encoder):
        net: Net | None = None
        for pattern, budget, left in wishes():
            for criterion in BUILT_IN:
                key = f"{load.__name__} {pattern} {100 * left:.0f}% {criterion}"
                if key in rows or not all(word in key for word in words):
                    continue
                net = net or load()
                row = {"net": load.__name__, "pattern": pattern, "left": left, "criterion": criterion}
                rows[key] = {**row, "dense": net.dense, **measured(net, pattern, budget, criterion)}
                common.save("curves", rows)
                print(key, {n: f"{100 * s[0]:.1f}" for n, s in rows[key].get("stages", {}).items()}, flush=True)


def page(path: Path) -> None:
    """Curves of every network, pattern and criterion, after compensation."""
    rows = [row for row in common.rows("curves").values() if "stages" in row]
    points = [
        Point(f"{row['net']} {row['pattern']} {row['criterion']}", row["left"], Interval(*row["stages"]["compensated"]))
        for row in rows
    ]
    Report("Accuracy from 50 to 90 % sparsity, compensated, not trained", (), tried=tuple(points)).save_html(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy by pattern, sparsity and criterion.")
    parser.add_argument("words", nargs="*", help="only rows whose name has all of these in it")
    parser.add_argument("--html", type=Path, help="write the page of curves from the results instead")
    wish = parser.parse_args()
    if wish.html is not None:
        page(wish.html)
        return
    run(wish.words)


if __name__ == "__main__":
    sys.exit(main())
