"""``secateur demo``: the whole road on a network small enough to be trained while you watch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.api import export, prune
from secateur.datasets import digits
from secateur.recover import recover
from secateur.report import Report
from secateur.store import save

EPOCHS, PRUNED_EPOCHS, LR = 20, 15, 0.05


class DigitNet(nn.Module):
    """Residual and depthwise convolutions; input (batch, 1, 8, 8), output (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 32)
        self.residual = nn.Sequential(_conv(32, 32), nn.ReLU(), _conv(32, 32))
        self.separable = nn.Sequential(
            _conv(32, 32, stride=2, groups=32), nn.ReLU(), _conv(32, 64, kernel=1), nn.ReLU(), _conv(64, 64)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.residual(x)).relu()
        features: Tensor = self.separable(x).relu()
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def run(out: Path, seed: int = 0) -> Report:
    """Train on the embedded digits, prune to half the MACs, recover, export to ONNX; write all into ``out``.

    Raises MissingExtra without the packages of ``secateur[demo]``.
    """
    with _one_thread():
        return _run(out, seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On layers this small a second thread gains nothing, and waits for its turn on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int) -> Report:
    task = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = DigitNet()
    dense, _ = recover(untrained, task, epochs=EPOCHS, lr=LR, seed=seed)
    example = task.test[0][:1]
    result = prune(
        dense.eval(),
        example,
        pattern="channel",
        budget="macs=50%",
        task=task,
        epochs=PRUNED_EPOCHS,
        lr=LR,
        seed=seed,
        source="secateur.demo:DigitNet",
    )
    path = export(result.model, example, "onnx", out)
    note = f"{path.name} gives the same outputs in ONNX Runtime."
    report = replace(result.report, title="Handwritten digits, half the MACs", notes=(*result.report.notes, note))
    save(replace(result, report=report), out)
    return report
