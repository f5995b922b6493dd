"""What pruning while training costs: the step between updates, an update of the masks, memory.

    python benchmarks/training_cost.py

A step is forward, backward, optimizer and ``pruner.step()``; steps of the dense and of the pruned copy take turns in
one process, so that both meet the same machine. An update is one of 100 million weights in ten layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common
import nets
from common import Row
from secateur import train as methods

ROUNDS = 30
STEPS = 1_000


def perceptron() -> tuple[nn.Module, Tensor, Tensor]:
    """Twenty million weights, 128 examples."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(2000, 2000), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(128, 2000), torch.randint(2000, (128,))


def resnet20() -> tuple[nn.Module, Tensor, Tensor]:
    return nets.ResNet(3), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    """A transformer of 9.5 million weights, 16 texts of 64 tokens."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 3), torch.randn(16, 64, 512), torch.randint(512, (16, 64))


def gradual(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return methods.Gradual(model, optimizer, "sparsity=90%", STEPS, schedule=[(1, "sparsity=90%")])


def acdc(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return methods.ACDC(model, optimizer, "sparsity=90%", STEPS, warmup=1 / STEPS)


NETS = {"resnet20": resnet20, "perceptron": perceptron, "encoder": encoder}
METHODS = {"gradual": gradual, "ac/dc": acdc}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class Loop:
    """A training loop of one batch again and again."""

    def __init__(self, net: str, optimizer: str, method: str | None) -> None:
        self.model, self.inputs, self.targets = NETS[net]()
        options = {"momentum": 0.9} if optimizer == "sgd" else {}
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=1e-4, **options)
        self.pruner = METHODS[method](self.model, self.optimizer) if method else None

    def step(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        F.cross_entropy(self.model(self.inputs).flatten(0, -2), self.targets.flatten()).backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def between_updates(net: str, optimizer: str, method: str) -> Row:
    dense, pruned = Loop(net, optimizer, None), Loop(net, optimizer, method)
    for loop in (dense, pruned):
        for _ in range(3):  # the mask is made in the first one
            loop.step()
    assert pruned.pruner is not None
    assert pruned.pruner.sparsity > 0.89
    pairs = [(dense.step(), pruned.step()) for _ in range(ROUNDS)]
    ratios = sorted(b / a for a, b in pairs)
    kept = sum(v.nbytes for values in pruned.pruner.state.values() for v in values.values())
    return {
        "dense_ms": round(1e3 * median(a for a, _ in pairs), 2),
        "ratio": round(median(ratios), 4),
        "quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[3 * len(ratios) // 4], 4)],
        "bits_per_weight": round(8 * (sum(b.nbytes for b in pruned.pruner.bits.values()) + kept) / size(pruned), 3),
    }


def size(loop: Loop) -> int:
    return sum(w.numel for w in loop.pruner.weights.values()) if loop.pruner is not None else 0


def update() -> Row:
    """Seconds of the update of 100 million weights, of five."""
    model = nn.Sequential(*(nn.Linear(3163, 3163, bias=False) for _ in range(10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    every = [(i, f"sparsity={50 + 5 * i}%") for i in range(1, 7)]
    pruner = methods.Gradual(model, optimizer, "sparsity=80%", STEPS, schedule=every)
    found = []
    for _ in every:
        optimizer.step()
        began = time.perf_counter()
        assert pruner.step()
        found.append(time.perf_counter() - began)
    weights = sum(w.numel for w in pruner.weights.values())
    return {"weights": weights, "seconds": [round(s, 3) for s in found], "median": round(median(found[1:]), 3)}


def main() -> None:
    torch.set_num_threads(2)
    rows, commit = {}, common.commit()
    rows["update"] = {**update(), "commit": commit}
    for net in NETS:
        for optimizer in OPTIMIZERS:
            for method in METHODS:
                if all(word in f"{net} {optimizer} {method}" for word in sys.argv[1:]):
                    print(net, optimizer, method, flush=True)
                    rows[f"{net} {optimizer} {method}"] = {**between_updates(net, optimizer, method), "commit": commit}
    common.save("training_cost", rows)


if __name__ == "__main__":
    main()
