"""Channels of the CIFAR-10 ResNets removed by six methods, at equal multiply-adds: before any training, and after.

    python benchmarks/cifar_channel.py                  # resumable: stages of today's results are not run again
    python benchmarks/cifar_channel.py "resnet20 2.1x"  # only rows whose name has all these words in it

    pip install --no-deps torch-pruning==1.6.1          # comparison only

random        Secateur: the same part of every axis, chosen by chance
uniform L1    Secateur: the same part of every axis, the smallest mean |w|
small dense   the same network with fewer channels everywhere, trained from scratch for as many epochs
tp magnitude  torch-pruning, GroupMagnitudeImportance
tp taylor     torch-pruning, GroupTaylorImportance, gradients of the calibration images
secateur      Secateur with one criterion, allocation and set of axes

All but the small dense one start from the same weights. What is left is counted by Secateur's analysis of the result,
at or below the dense network's multiply-adds divided by the ratio; torch-pruning's ratio is found by bisection.
Criterion, allocation and axes (all, or only those inside of blocks) are chosen once, for torch-pruning as well as for
Secateur, on ResNet-20 at ``CHOICE`` before any training, and then used everywhere. They are chosen, as is the stage
that training starts from, on 2,000 training images that no other step reads; the published weights have seen them, so
they are cropped and mirrored at random, once. The 400 test images choose nothing.

Without a GPU an epoch is a fixed subset of the training images and few epochs are run: a network from scratch learns
little in these. With one: whole epochs, three seeds, both networks at all ratios.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import common
import nets
from common import Row
from secateur import criteria, planning, sensitivity
from secateur.allocate import Strategy
from secateur.apply.shrink import carry_out
from secateur.graph import Graph, analyze
from secateur.graph.types import Cost
from secateur.plan import Plan
from secateur.recover import recalibrate_, reconstruct, recover
from secateur.stats import Stats
from secateur.tasks import Classification, batches, call, clone, mode, paired_difference

CUDA = torch.cuda.is_available()
RATIOS, CHOICE = (2.1, 1.5, 3.0, 5.0), 2.1
EPOCHS, IMAGES = (40, 48_000) if CUDA else (3, 12_800)
CALIBRATION = {"resnet20": 2_048, "resnet56": 1_024}
BLOCKS = {"resnet20": 3, "resnet56": 9}
SEEDS = (0, 1, 2)
METHODS = ("random", "uniform L1", "small dense", "tp magnitude", "tp taylor", "secateur")
STREAM = "*stream*"
"""What the channels between blocks are called: 'residual stream', 'layer3 stream'."""

Widths = tuple[int, int, int]
How = tuple[str, str, str]
"""Criterion, allocation, and axes: "all" or "inner"."""

FIXED: dict[str, How] = {
    "random": ("random", "uniform", "all"),
    "uniform L1": ("magnitude", "uniform", "all"),
    "small dense": ("", "", "all"),
}
CANDIDATES: dict[str, list[How]] = {
    "secateur": list(
        itertools.product(
            ("l2", "magnitude", "taylor", "fisher"), ("uniform", "global", "sensitivity"), ("inner", "all")
        )
    ),
    "tp magnitude": list(itertools.product(("GroupMagnitude",), ("global", "uniform"), ("all", "inner"))),
    "tp taylor": list(itertools.product(("GroupTaylor",), ("global", "uniform"), ("all", "inner"))),
}


COMPENSATION = ("least_squares", "blockwise")
Models = dict[str, nn.Module]
"""By stage."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A dense network, its data, and what it is before anything is removed."""

    name: str
    model: nn.Module
    task: Classification
    graph: Graph
    right: Tensor  # per test image


@functools.cache
def bench(net: str) -> Bench:
    device = "cuda" if CUDA else "cpu"
    task, (x, y) = nets.cifar10(), nets.cifar10_training()
    cut = len(x) - nets.CIFAR_VALIDATION
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(0))
    few, some = order[: CALIBRATION[net]], order[:IMAGES]
    task = Classification(
        train=(x[some], y[some]),
        calibration=(nets.normalise(x[few]), y[few]),
        validation=(nets.crop_and_flip(x[cut:], torch.Generator().manual_seed(0)), y[cut:]),
        test=task.test,
        batch_size=task.batch_size,
        augment=task.augment,
    )
    model = {"resnet20": nets.resnet20, "resnet56": nets.resnet56}[net]().to(device)
    graph = analyze(model, torch.randn(2, 3, 32, 32, device=device))
    return Bench(net, model, task, graph, task.scores(*outputs(model, task, "test")))


# --- how it is judged ------------------------------------------------------------------------------


def outputs(model: nn.Module, task: Classification, split: str) -> tuple[Tensor, Tensor]:
    """Outputs of shape (images, 10) and classes."""
    with mode(model, training=False), torch.inference_mode():
        found = [(call(model, inputs), targets) for inputs, targets in batches(task, split, model)]
    logits, classes = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return logits, classes


def chosen_by(b: Bench, model: nn.Module) -> Row:
    """Accuracy and cross-entropy on the held-out training images, which choose."""
    logits, classes = outputs(model, b.task, "validation")
    return {
        "validation": float(b.task.scores(logits, classes).mean()),
        "loss": float(b.task.loss(logits, classes)),
    }


def judged(b: Bench, model: nn.Module) -> Row:
    """``chosen_by``, and the accuracy on the test images with the interval of its drop."""
    right = b.task.scores(*outputs(model, b.task, "test"))
    drop = paired_difference(b.right.double().numpy(), right.double().numpy())
    return {**chosen_by(b, model), "test": float(right.mean()), "drop": list(drop)}


def left(b: Bench, model: nn.Module) -> Row:
    """Parameters and multiply-adds of an image, dense and of the result."""
    both = (b.graph.cost(), cost(b, model))
    return {"params": [c.params for c in both], "macs": [macs(b, c) for c in both]}


def cost(b: Bench, model: nn.Module) -> Cost:
    return analyze(model, b.graph.inputs).cost()


def macs(b: Bench, found: Cost) -> int:
    """Of one image."""
    return found.macs // len(b.graph.inputs)


def limit(b: Bench, ratio: float) -> int:
    """The multiply-adds of an image that may be left."""
    return int(macs(b, b.graph.cost()) / ratio)


# --- how it is made --------------------------------------------------------------------------------


@functools.cache
def untrained(net: str, ratio: float, method: str, seed: int, how: How) -> Models:
    """The models of a method before any training."""
    b = bench(net)
    if method == "small dense":
        torch.manual_seed(seed)
        return {"small": nets.ResNet(BLOCKS[net], narrow(BLOCKS[net], limit(b, ratio))).to(b.graph.inputs.device)}
    if method.startswith("tp"):
        return recalibrated(b, torch_pruning(b, ratio, how))
    return compensated(b, planned(b, ratio, how, seed))


def planned(b: Bench, ratio: float, how: How, seed: int = 0) -> Plan:
    criterion, allocate, axes = how
    return planning.make(
        b.model,
        b.graph,
        budget=f"macs={limit(b, ratio) * len(b.graph.inputs)}",
        criterion=criterion if criterion == "random" else scored(b.name, criterion),
        allocate=strategy(b.name, criterion) if allocate == "sensitivity" else allocate,
        ignore=[STREAM] if axes == "inner" else [],
        seed=seed,
    )


@functools.cache
def scored(net: str, criterion: str) -> criteria.Criterion:
    """The criterion, its scores taken once."""
    b = bench(net)
    scores = criteria.score(b.model, b.graph, criterion, b.task)

    def again(weight: Tensor, stats: Stats) -> Tensor:
        return scores[stats.name]

    return criteria.in_loss_units(again) if criteria.gives_losses(criterion) else again


@functools.cache
def strategy(net: str, criterion: str) -> str | Strategy:
    b = bench(net)
    return sensitivity.measured("sensitivity", b.model, b.graph, criterion=scored(net, criterion), task=b.task)


def half(b: Bench) -> Plan:
    """Half of the channels inside of every block, by L2 norm."""
    return planning.make(
        b.model, b.graph, budget="macs=60%", criterion="l2", ignore=[STREAM], overrides={"layer*": 0.5}
    )


def compensated(b: Bench, plan: Plan, methods: Sequence[str] = COMPENSATION) -> Models:
    """The plan carried out as it is, with recalibrated batch norms, and with compensation."""
    found = recalibrated(b, carry_out(b.model, plan).model)
    return found | {method: refitted(b, plan, method) for method in methods}


def refitted(b: Bench, plan: Plan, method: str) -> nn.Module:
    return carry_out(reconstruct(b.model, b.graph, plan, b.task, method), plan, b.graph.inputs).model


def recalibrated(b: Bench, model: nn.Module) -> Models:
    copy = clone(model)
    recalibrate_(copy, (inputs for inputs, _ in batches(b.task, "calibration", copy)))
    return {"pruned": model, "recalibrated": copy}


def torch_pruning(b: Bench, ratio: float, how: How) -> nn.Module:
    """The lowest ``pruning_ratio`` that has the multiply-adds, to one thousandth."""
    low, high, found = 0.0, 1.0, None
    while high - low > 1e-3:
        part = (low + high) / 2
        model = step_of_torch_pruning(b, part, how)
        if macs(b, cost(b, model)) <= limit(b, ratio):
            high, found = part, model
        else:
            low = part
    assert found is not None
    return found


@functools.cache
def gradients(net: str) -> list[Tensor]:
    """Of the loss on all calibration images."""
    b = bench(net)
    model = clone(b.model)
    for inputs, targets in batches(b.task, "calibration", model):
        b.task.loss(model(inputs), targets).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def step_of_torch_pruning(b: Bench, part: float, how: How) -> nn.Module:
    import torch_pruning as tp

    importance, allocate, axes = how
    model = clone(b.model)
    for parameter, gradient in zip(model.parameters(), gradients(b.name), strict=True):
        parameter.grad = gradient.clone()
    between = [m for n, m in model.named_modules() if n == "conv1" or n.endswith("conv2")]
    pruner = tp.pruner.BasePruner(
        model,
        b.graph.inputs,
        importance=getattr(tp.importance, f"{importance}Importance")(),
        global_pruning=allocate == "global",
        pruning_ratio=part,
        ignored_layers=[model.linear, *(between if axes == "inner" else [])],
    )
    pruner.step()
    model.zero_grad()
    return model


def narrow(blocks: int, limit: float) -> Widths:
    """The widths near 1 : 2 : 4 with the most multiply-adds of an image up to ``limit``."""
    near = [
        (first, second, third)
        for first in range(1, 17)
        for second in range(2 * first - 1, 2 * first + 2)
        for third in range(4 * first - 3, 4 * first + 4)
        if first % 2 == second % 2 == third % 2
    ]
    return max((w for w in near if products(blocks, w) <= limit), key=partial(products, blocks))


def products(blocks: int, widths: Widths) -> int:
    """Multiply-adds of an image: all 3x3 convolutions at 32, 16 and 8 pixels, and the linear layer."""
    first, second, third = widths
    total = 9 * 32**2 * (3 * first + 2 * blocks * first**2) + 10 * third
    for inputs, width, side in ((first, second, 16), (second, third, 8)):
        total += 9 * side**2 * (inputs * width + (2 * blocks - 1) * width**2)
    return total


# --- rows ------------------------------------------------------------------------------------------


def before_training(rows: dict[str, Row], net: str, ratio: float, method: str, seed: int) -> Row:
    b, how = bench(net), how_of(rows, method)
    models = untrained(net, ratio, method, seed, how)
    stages = {stage: judged(b, model) for stage, model in models.items()}
    return {"how": how, **left(b, models["pruned"]), "stages": stages}


def after_training(rows: dict[str, Row], net: str, ratio: float, method: str, seed: int) -> Row:
    """From the stage that does best on the held-out images."""
    b, how = bench(net), how_of(rows, method)
    models = untrained(net, ratio, method, seed if method in ("random", "small dense") else 0, how)
    start = max(models, key=lambda stage: chosen_by(b, models[stage])["validation"])
    model, history = recover(models[start], b.task, epochs=EPOCHS, seed=seed)
    trained = {"start": start, "epochs": EPOCHS, "images": IMAGES, "validations": [e.validation for e in history]}
    return {"how": how, **left(b, model), **trained, "stages": {"recovered": judged(b, model)}}


def half_row() -> Row:
    b = bench("resnet20")
    models = compensated(b, half(b))
    stages = {stage: judged(b, model) for stage, model in models.items()}
    return {"how": ("l2", "half", "inner"), **left(b, models["pruned"]), "stages": stages}


def dense_row(net: str) -> Row:
    b = bench(net)
    return {**left(b, b.model), "stages": {"dense": judged(b, b.model)}}


def candidate(method: str, how: How) -> Row:
    """What a choice goes by: Secateur's after least squares, torch-pruning's with recalibrated batch norms."""
    b = bench("resnet20")
    if method == "secateur":
        model, stage = refitted(b, planned(b, CHOICE, how), "least_squares"), "least_squares"
    else:
        model, stage = recalibrated(b, torch_pruning(b, CHOICE, how))["recalibrated"], "recalibrated"
    return {"how": how, **left(b, model), "stages": {stage: chosen_by(b, model)}}


def how_of(rows: dict[str, Row], method: str) -> How:
    """The candidate with the best accuracy, of equals the one with the lowest cross-entropy."""
    if method in FIXED:
        return FIXED[method]
    found = [row for key, row in rows.items() if key.startswith(f"choice {method} ")]
    scores = [(next(iter(row["stages"].values())), row["how"]) for row in found]
    criterion, allocate, axes = max(scores, key=lambda s: (s[0]["validation"], -s[0]["loss"]))[1]
    return criterion, allocate, axes


Step = tuple[str, str, Callable[[], Row]]
"""The row, a stage that it has once this is done, and how that is done."""


def steps(rows: dict[str, Row]) -> Iterator[Step]:
    """In order, so that what there is of a run says something."""
    for net in BLOCKS:
        yield f"{net} dense", "dense", partial(dense_row, net)
    yield "resnet20 half", "blockwise", half_row
    for method, candidates in CANDIDATES.items():
        stage = "least_squares" if method == "secateur" else "recalibrated"
        for how in candidates:
            yield " ".join(("choice", method, *how)), stage, partial(candidate, method, how)
    for trained, net, ratio, seed in order():
        for method in METHODS:
            key = f"{net} {ratio:g}x {method} {seed}"
            if trained:
                yield key, "recovered", partial(after_training, rows, net, ratio, method, seed)
            elif method != "small dense" and (method == "random" or seed == 0):
                yield key, "pruned", partial(before_training, rows, net, ratio, method, seed)


def order() -> Iterator[tuple[bool, str, float, int]]:
    """(with training, network, ratio, seed)"""
    if CUDA:
        yield from itertools.product((False, True), BLOCKS, RATIOS, SEEDS)
    else:
        yield from itertools.product((False, True), ("resnet20",), RATIOS, (0,))
        yield False, "resnet56", CHOICE, 0
        yield from itertools.product((False,), ("resnet20",), RATIOS, SEEDS[1:])


def main() -> None:
    torch.set_num_threads(1)
    rows, commit = common.rows("cifar_channel", today=True), common.commit()
    for key, stage, work in steps(rows):
        old = rows.get(key, {"stages": {}})
        if stage in old["stages"] or not all(word in key for word in sys.argv[1:]):
            continue
        print(key, stage, flush=True)
        new = work()
        rows[key] = {**old, **new, "stages": old["stages"] | new["stages"], "commit": commit}
        common.save("cifar_channel", rows)


if __name__ == "__main__":
    main()
