"""Dropping whole blocks of real networks: what each criterion keeps of the accuracy, with random choices beside it.

    python benchmarks/depth.py             # resumable: rows of today's results are not run again
    python benchmarks/depth.py resnet56    # only rows whose name has that in it

One row a network, pattern and criterion: the score on the test split of the dense model, after dropping, after batch
norms are recalibrated, and after training with distillation. Accuracy for ResNet-56; for the Llama, which was trained
on stories, perplexity: the exponential of the mean negative log likelihood a token of each story.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

import common
import nets
import secateur as sc
import texts
from secateur import api
from secateur.tasks import Classification

RANDOM = 2
"""Seeds of the random baseline."""

EPOCHS, IMAGES, CALIBRATION = 1, 3_200, 128
"""Training after dropping: epochs, and how many of the training images; and how many to score and recalibrate on."""


@dataclass(frozen=True)
class Road:
    net: str
    budget: str
    epochs: int
    lr: float


ROADS = (Road("resnet56", "macs=70%", EPOCHS, 0.01), Road("llama", "params=80%", 0, 0.0))
PATTERNS = {"layer": ("influence", "reconstruction", "taylor", "magnitude"), "channel+layer": ("magnitude",)}


def main() -> None:
    api.SECONDS = 1.0
    torch.set_num_threads(1)
    rows = common.rows("depth", today=True)
    for road in ROADS:
        for pattern, criteria in PATTERNS.items():
            seeded = [(c, 0) for c in criteria] + [
                ("random", seed) for seed in range(RANDOM if pattern == "layer" else 0)
            ]
            for criterion, seed in seeded:
                key = " ".join(
                    (road.net, pattern, road.budget, criterion, *([str(seed)] if criterion == "random" else []))
                )
                if key in rows or not all(word in key for word in sys.argv[1:]):
                    continue
                print(key, flush=True)
                rows[key] = walk(road, pattern, criterion, seed)
                common.save("depth", rows)


def walk(road: Road, pattern: str, criterion: str, seed: int) -> dict[str, Any]:
    """One plan and what is left of the score, stage by stage."""
    if road.net == "llama":
        model, task = texts.llama(), texts.stories()
        inputs: Any = next(iter(task.batches("calibration")))[0]
    else:
        model, task, inputs = nets.resnet56(), _fewer(nets.cifar10()), torch.randn(1, 3, 32, 32)
    result = sc.prune(
        model,
        inputs,
        pattern=pattern,
        budget=road.budget,
        criterion=criterion,
        task=task,
        epochs=road.epochs,
        lr=road.lr or 0.01,
        amp=True,
        seed=seed,
    )
    dense, last = result.report.rows[0], result.report.rows[-1]
    shown = _perplexity if road.net == "llama" else float
    return {
        "net": road.net,
        "pattern": pattern,
        "budget": road.budget,
        "criterion": result.plan.meta["criterion"],
        "seed": seed,
        "epochs": road.epochs,
        "dropped": list(result.plan.dropped),
        "score": {row.stage: shown(row.accuracy.value) for row in result.report.rows if row.accuracy},
        "drop": {row.stage: list(row.drop) for row in result.report.rows if row.drop},
        "params": [dense.params, last.params],
        "macs": [dense.macs, last.macs],
        "latency_ratio": result.report.meta["latency ratio"],
        "law": [result.report.law.error, result.report.law.oracle] if result.report.law else None,
        "form": result.form,
    }


def _perplexity(score: float) -> float:
    return math.exp(-score)


def _fewer(task: Classification) -> Classification:
    """The task with fewer training images, the first of them in an order drawn once; and few to calibrate on."""
    x, y = task.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:IMAGES]
    assert task.calibration is not None
    few = tuple(part[:CALIBRATION] for part in task.calibration)
    return Classification(
        train=(x[order], y[order]),
        calibration=(few[0], few[1]),
        validation=task.validation,
        test=task.test,
        batch_size=task.batch_size,
        augment=task.augment,
    )


if __name__ == "__main__":
    main()
