"""What ``analyze`` costs beside the ``torch.export`` that it contains, on a network of ResNet-50's size.

    python benchmarks/analyze_cost.py

Both are timed in turns in one process, after one untimed call of each; median, lowest and highest of five.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import common
from secateur import analyze

ROUNDS = 5


class Bottleneck(nn.Module):
    """He et al. 2016, figure 5 right, the stride on the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    """25.6 M parameters, 4.1 G MACs at 224 x 224, random weights."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks, inputs = [], 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            blocks.append(Bottleneck(inputs, 64 << stage, 2 if stage and not block else 1))
            inputs = 256 << stage
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    return nn.Sequential(*stem, *blocks, *head).eval()


def main() -> None:
    model, inputs = resnet50(), torch.randn(1, 3, 224, 224)
    contenders: dict[str, Callable[[], object]] = {
        "torch.export": lambda: torch.export.export(model, (inputs,), strict=False),
        "analyze": lambda: analyze(model, inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False, *[True] * ROUNDS]:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    graph = analyze(model, inputs)
    size = {"params": graph.cost().params, "macs": graph.cost().macs, "axes": len(graph.axes)}
    export = statistics.median(seconds["torch.export"])
    rows = {
        name: {
            "seconds": [statistics.median(taken), min(taken), max(taken)],
            "ratio": statistics.median(taken) / export,
            **size,
        }
        for name, taken in seconds.items()
    }
    print(common.save("analyze_cost", rows))
    for name, row in rows.items():
        print(f"{name:14} {row['seconds'][0]:.2f} s  {row['ratio']:.2f}x")


if __name__ == "__main__":
    main()
