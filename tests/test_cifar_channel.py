"""What the benchmark of channels compares with is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from secateur.graph import analyze
from secateur.recipe import load_callable

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cifar_channel  # noqa: E402
import tables  # noqa: E402


@pytest.mark.parametrize("widths", [(16, 32, 64), (7, 15, 27), (2, 4, 8)])
def test_products_are_those_that_analysis_counts(widths: tuple[int, int, int]) -> None:
    resnet = load_callable(f"{BENCHMARKS / 'nets.py'}:ResNet")
    graph = analyze(resnet(3, widths), torch.randn(2, 3, 32, 32))
    assert graph.cost().macs == 2 * cifar_channel.products(3, widths)


@pytest.mark.parametrize("ratio", [1.0, *cifar_channel.RATIOS])
@pytest.mark.parametrize("blocks", [3, 9])
def test_a_small_dense_network_has_about_the_multiply_adds_asked_for(blocks: int, ratio: float) -> None:
    limit = cifar_channel.products(blocks, (16, 32, 64)) / ratio
    found = cifar_channel.narrow(blocks, limit)
    assert 0.95 * limit < cifar_channel.products(blocks, found) <= limit
    if ratio == 1:
        assert found == (16, 32, 64)


def test_a_method_is_one_line_with_the_means_of_its_seeds() -> None:
    def row(**stages: float) -> dict[str, object]:
        found = {
            stage: {"test": value, "drop": [0.9 - value, 0.8 - value, 1.0 - value]} for stage, value in stages.items()
        }
        return {"params": [100, 60], "macs": [1000, 499], "stages": found}

    rows = {
        "choice tp magnitude GroupMagnitude global all": row(recalibrated=0.1),
        "resnet20 dense": row(dense=0.9),
        "resnet20 2.1x random 0": row(pruned=0.2, recovered=0.8) | {"epochs": 3},
        "resnet20 2.1x random 1": row(pruned=0.3),
    }
    head, *lines = tables._channels(rows)
    assert head[8] == "3 epochs"
    assert lines == [
        ("resnet20", "2.1x", "random", "90.0", "25.0", "-", "-", "-", "80.0", "10.0 (0.0 to 20.0)", "60.0%", "49.9%")
    ]
