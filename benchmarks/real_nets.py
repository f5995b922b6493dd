"""Real weights of four kinds of network lose 30 % of their parameters, at random and by magnitude.

    python benchmarks/real_nets.py             # resumable: rows of today's results are not run again
    python benchmarks/real_nets.py fastestdet  # only rows whose name has that in it

Each network is held to the law, and its own metric is taken before and after, on examples that neither recalibration
nor fine-tuning has seen: mAP50 of FastestDet on 64 COCO images (a ShuffleNetV2, which shuffles channels), accuracy of
the encoder (``nn.TransformerEncoder``) on the train-dev split of SST-2, perplexity of the Llama (grouped queries, tied
embeddings) on held-out stories, and accuracy of MobileNetV2 on 200 ImageNet images. The interval of the change is
that of 400 paired bootstrap samples of the examples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import detector
import texts
from secateur import prune
from secateur.recipe import load_callable
from secateur.recover import recalibrate_, recover
from secateur.tasks import Task, evaluate
from secateur.tasks.detection import mean_ap

BUDGET, SAMPLES = "params=70%", 400


@dataclass(frozen=True)
class Net:
    """A network, its example inputs, and how it is judged: ``metric`` of what ``examples`` says of each example."""

    model: nn.Module
    inputs: Any
    unit: str
    examples: Callable[[nn.Module], Sequence[Any]]
    metric: Callable[[Sequence[Any]], float]
    calibration: Iterable[Tensor] | None = None  # batches of inputs, where there are batch norms
    task: Task | None = None  # to fine-tune on
    epochs: int = 0
    lr: float = 0.01


def fastestdet() -> Net:
    images, truths = detector.coco()
    half = len(images) // 2
    return Net(
        model=detector.fastestdet(),
        inputs=images[:2],
        unit="mAP50",
        examples=lambda model: detector.examples(model, images[half:], truths[half:]),
        metric=lambda found: 100 * mean_ap(found),
        calibration=images[:half].split(16),
    )


def encoder() -> Net:
    task = texts.sst2()
    return Net(texts.encoder(), task.test[0][:2], "accuracy", *_accuracy(task), task=task, epochs=1)


def mobilenetv2() -> Net:
    nets = Path(__file__).with_name("nets.py")
    task = load_callable(f"{nets}:imagenet")()
    return Net(
        load_callable(f"{nets}:mobilenetv2")(),
        task.test[0][:2],
        "accuracy",
        *_accuracy(task),
        task=task,
        epochs=2,
        lr=0.001,
    )


def llama() -> Net:
    task = texts.stories()
    lengths = [len(story) - 1 for story in task.test]

    def perplexity(found: Sequence[Any]) -> float:
        loss, tokens = np.sum(found, axis=0)
        return math.exp(loss / tokens)

    def examples(model: nn.Module) -> Sequence[Any]:
        likelihoods = evaluate(model, task, "test")
        return [(-score * tokens, tokens) for score, tokens in zip(likelihoods, lengths, strict=True)]

    inputs = {"input_ids": task.train[0][None, :32]}
    return Net(texts.llama(), inputs, "perplexity", examples, perplexity, task=task, epochs=3)


def _accuracy(task: Task) -> tuple[Callable[[nn.Module], Sequence[Any]], Callable[[Sequence[Any]], float]]:
    return lambda model: list(evaluate(model, task, "test")), lambda found: 100 * float(np.mean(found))


NETS = (fastestdet, encoder, llama, mobilenetv2)


def shrink(net: Net, criterion: str) -> dict[str, Any]:
    """One row: the network without 30 % of its parameters, its metric after every step."""
    result = prune(net.model, net.inputs, budget=BUDGET, criterion=criterion)
    small, law, rows = result.model, result.report.law, result.report.rows
    assert law is not None
    found = {"dense": net.examples(net.model), "pruned": net.examples(small)}
    if net.calibration is not None:
        recalibrate_(small, net.calibration)
        found["recalibrated"] = net.examples(small)
    if net.task is not None:
        small, _ = recover(small, net.task, epochs=net.epochs, lr=net.lr, teacher=net.model)
        found["recovered"] = net.examples(small)
    return {
        "criterion": criterion,
        "unit": net.unit,
        "examples": len(found["dense"]),
        "stages": {stage: net.metric(examples) for stage, examples in found.items()},
        "change": _change(net, found["dense"], list(found.values())[-1]),
        "epochs": net.epochs,
        "params": [rows[0].params, rows[-1].params],
        "macs": [rows[0].macs, rows[-1].macs],
        "law": {"error": law.error, "oracle": law.oracle},
        "form": result.form,
        "why": result.report.meta["why"],
    }


def _change(net: Net, before: Sequence[Any], after: Sequence[Any]) -> list[float]:
    """How much the metric grew, and the bounds of its 95 % interval: the same examples drawn for both."""
    draw = np.random.default_rng(0)
    grown = []
    for _ in range(SAMPLES):
        rows = draw.integers(len(before), size=len(before))
        grown.append(net.metric([after[i] for i in rows]) - net.metric([before[i] for i in rows]))
    return [net.metric(after) - net.metric(before), *map(float, np.percentile(grown, (2.5, 97.5)))]


def main() -> None:
    rows = common.rows("real_nets", today=True)
    for load in NETS:
        net = None
        for criterion in ("magnitude", "random"):
            key = f"{load.__name__} {criterion}"
            if key in rows or not all(word in key for word in sys.argv[1:]):
                continue
            print(key, flush=True)
            torch.manual_seed(0)
            net = net or load()
            rows[key] = {"net": load.__name__, **shrink(net, criterion)}
            common.save("real_nets", rows)


if __name__ == "__main__":
    main()
