"""Is the promise kept? ``max_drop`` on 100 resampled splits, held to examples that it never looked at.

    python benchmarks/promise_audit.py            # resumable: rows of today's results are not run again
    python benchmarks/promise_audit.py encoder    # only rows whose name has that in it

Each split draws 40 % of a pool of examples, half of them to choose on and half to check on; the rest is never looked
at. The promise holds in a split where the model returned, which is the dense one where none could be shown to keep the
limit, loses no more than the limit on that rest. Candidates are pruned and compensated once for each size, on other
examples, and not fine-tuned; which of them are tried, and which is returned, is decided anew in every split.

The pools: the 10,000 test images of MNIST, for a small convolutional network that is trained here on 12,800 others; the
6,735 sentences of SST-2's train-dev split, for the encoder.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import common
import texts
from secateur.graph import analyze
from secateur.promise import Half, keep
from secateur.recover import recover
from secateur.road import Trip, of_part, walk
from secateur.tasks import Classification, Scores, evaluate
from weights import data_folder

SPLITS, LOOKED_AT = 100, 0.4
LEAST = 0.02


@dataclass(frozen=True)
class Net:
    """``task.test`` is the pool."""

    model: nn.Module
    task: Classification


def mnist() -> Net:
    def read(name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(data_folder() / f"mnist/mnist_{name}.npz") as file:
            x, y = file["x"][rows], file["y"][rows]
        return torch.from_numpy(x).float()[:, None] / 255, torch.from_numpy(y).long()

    train, held = read("train", slice(12_800)), read("train", slice(59_000, 60_000))
    task = Classification(train, held, read("test", slice(None)), (train[0][:1024], train[1][:1024]), 64)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return Net(recover(model, task, epochs=3, lr=0.02)[0].eval(), task)


def encoder() -> Net:
    task = texts.sst2()
    return Net(texts.encoder(), replace(task, calibration=(task.train[0][:1024], task.train[1][:1024])))


CASES: tuple[tuple[Callable[[], Net], str, str, float], ...] = (
    (mnist, "channel", "macs", 0.01),
    (mnist, "unstructured", "sparsity", 0.01),
    (mnist, "channel", "macs", 0.005),
    (encoder, "unstructured", "sparsity", 0.02),
    (encoder, "channel", "macs", 0.02),
)


def audit(net: Net, pattern: str, kind: str, limit: float) -> dict[str, Any]:
    wishes = {"pattern": pattern, "allocate": "global", "task": net.task}
    trip = Trip(net.model, analyze(net.model, net.task.test[0][:2]), wishes, net.task, "least_squares", verify=False)
    before = evaluate(net.model, net.task, "test")
    known: dict[float, Scores] = {}

    def scores(part: float) -> Scores:
        if part not in known:
            known[part] = evaluate(walk(trip, of_part(kind, part)).model, net.task, "test")
        return known[part]

    parts: list[float] = []
    drops: list[float] = []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(before))
        half = int(LOOKED_AT * len(before) / 2)
        halves, rest = (order[:half], order[half : 2 * half]), order[2 * half :]

        def attempt(part: float, halves: Any = halves) -> Half:
            return lambda which: scores(part)[halves[which]]

        verdict = keep(lambda which, halves=halves: before[halves[which]], attempt, limit, LEAST)
        parts.append(verdict.kept.part if verdict.kept else 1.0)
        drops.append(float((before - scores(parts[-1]))[rest].mean()) if verdict.kept else 0.0)
        if split % 10 == 9:
            print(f"  {split + 1} splits, {sum(d <= limit for d in drops)} kept, {len(known)} sizes", flush=True)
    return {
        "pattern": pattern,
        "of": kind,
        "limit": limit,
        "pool": len(before),
        "dense": float(before.mean()),
        "splits": SPLITS,
        "kept": sum(drop <= limit for drop in drops),
        "dense returned": sum(part == 1.0 for part in parts),
        "drop": [float(np.median(drops)), min(drops), max(drops)],
        "part": [float(np.median(parts)), min(parts), max(parts)],
        "returned": {f"{part:.4f}": n for part, n in sorted(Counter(parts).items())},
        "sizes": {f"{part:.4f}": float((before - found).mean()) for part, found in sorted(known.items())},
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = common.rows("promise_audit", today=True)
    nets: dict[str, Net] = {}
    for load, pattern, kind, limit in CASES:
        name = load.__name__
        key = f"{name} {pattern} {100 * limit:g}%"
        if key in rows or not all(word in key for word in sys.argv[1:]):
            continue
        print(key, flush=True)
        net = nets.setdefault(name, load()) if name not in nets else nets[name]
        rows[key] = {"net": name, **audit(net, pattern, kind, limit)}
        common.save("promise_audit", rows)


if __name__ == "__main__":
    main()
