"""Global magnitude pruning of 100 M weights: time and memory, beside ``torch.nn.utils.prune.global_unstructured``.

    python benchmarks/cost_global.py

Both go from dense weights to weights of which the smallest 90 % are zeros. Every call runs in a process of its own, the
two in turns; tracing, which analyze_cost.py times, and making the network are not counted. Memory is how much the
process's peak grew during the call, in units of the weights' own bytes.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import common
from secateur import analyze, mask_
from secateur.planning import make

ROUNDS = 5
LAYERS, WIDTH = 6, 4096


def secateur(model: nn.Module) -> Callable[[], object]:
    graph = analyze(model, torch.randn(1, WIDTH))
    return lambda: mask_(model, make(model, graph, pattern="unstructured", budget="sparsity=90%"))


def torch_prune(model: nn.Module) -> Callable[[], object]:
    places = [(layer, "weight") for layer in model.children()]

    def run() -> None:
        prune.global_unstructured(places, prune.L1Unstructured, amount=0.9)
        for place in places:
            prune.remove(*place)

    return run


CONTENDERS = {"secateur": secateur, "torch.nn.utils.prune": torch_prune}


def once(name: str) -> dict[str, float]:
    """One call of a contender in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    run = CONTENDERS[name](model)
    before, start = peak(), time.perf_counter()
    run()
    seconds, extra = time.perf_counter() - start, peak() - before
    kept = sum(int(p.count_nonzero()) for p in model.parameters())
    return {"seconds": seconds, "memory": extra / size, "kept": kept}


def peak() -> int:
    """The most bytes of memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            command = [sys.executable, str(Path(__file__)), name]
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    rows = {}
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "lowest_to_highest": [min(seconds), max(seconds)],
            "extra_memory_of_the_weights": max(run["memory"] for run in runs),
            "weights": LAYERS * WIDTH**2,
            "kept": int(runs[0]["kept"]),
        }
        print(f"{name:22} {rows[name]['seconds']:.2f} s  {rows[name]['extra_memory_of_the_weights']:.2f}x")
    print(common.save("cost_global", rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(once(sys.argv[1])))
    else:
        main()
