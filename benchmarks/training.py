"""Pruning while training, method by method, against pruning afterwards, at equal epochs.

    python benchmarks/training.py             # resumable: rows of today's results are not run again
    python benchmarks/training.py "mnist 90%" # only rows whose name has all these words in it

dense         nothing is removed
small dense   a dense network with as many parameters as the sparse ones have weights left, from the same start
random        a random mask (ERK) from the start
post          pruned once by magnitude at half of the training, the rest of it with a learning rate that starts anew
torchao pat   torchao's optimizer for sparsity, with the same schedule as gradual
tp ...        torch-pruning's regularizers, with their defaults; channels go at half of the training, as with ours
the others    methods of ``secateur.train``, with their defaults

From scratch (digits, MNIST) every row trains for as many epochs: post trains dense for half of them. From published
weights (CIFAR-10) every row trains for as many epochs after them; only the small dense network has no such start,
which these few epochs do not make up for.
One recipe for all: SGD with Nesterov momentum 0.9, one cosine, no augmentation but CIFAR's usual. Its highest rate is
chosen on the validation split for ``post`` at 90 %, which favours what the methods are compared with. Test images
choose nothing; they are looked at once, after the last step.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import common
import nets
import training_peers as peers
from common import Row
from secateur import train as methods
from secateur.apply.shrink import shrink
from secateur.datasets import load as dataset
from secateur.graph import analyze
from secateur.tasks import Classification, evaluate
from secateur.train.places import weights_of
from weights import data_folder

SPARSITIES = ("90%", "80%", "95%")
FEWEST = "98%"
"""Of the fully connected networks, which lose little before."""

MODERATE = ("20%", "50%", "70%")
"""Of the claim that moderate pruning does not hurt."""

CLAIM = ("post", "gradual", "ac/dc")
GROUPS, HALF = "2:4", "channel 2x"
"""Two of every four weights; channels, for half of the multiply-adds."""

RATES = (0.02, 0.05, 0.1, 0.2)
CHOICE = "90%"
IMAGES = 12_800

Make = Callable[["Start"], Any]


@dataclass(frozen=True, eq=False)
class Setting:
    """A network, its data, and how long it trains; ``build`` takes a factor on hidden widths."""

    name: str
    build: Callable[[float], nn.Module]
    task: Callable[[], Classification]
    epochs: int
    seeds: int
    pretrained: bool = False


# --- networks and data -----------------------------------------------------------------------------


class Perceptron(nn.Sequential):
    """Linear layers with ReLU between them, on flattened inputs."""

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


def mnist() -> Classification:
    """MNIST (LeCun et al. 1998): 55,000 training, 5,000 validation and 10,000 test images."""
    parts = []
    for name in ("train", "test"):
        with np.load(data_folder() / f"mnist/mnist_{name}.npz") as file:
            parts += [torch.from_numpy(file["x"]).float()[:, None] / 255, torch.from_numpy(file["y"]).long()]
    x, y, test_x, test_y = parts
    return Classification((x[:55_000], y[:55_000]), (x[55_000:], y[55_000:]), (test_x, test_y), batch_size=128)


def cifar10() -> Classification:
    """CIFAR-10 of which an epoch is a fixed part of the training images."""
    task = nets.cifar10()
    x, y = task.train
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:IMAGES]
    return replace(task, train=(x[some], y[some]))


def perceptron(inputs: int, *sizes: int) -> Callable[[float], nn.Module]:
    return lambda width: Perceptron(inputs, *(max(1, round(width * n)) for n in sizes), 10)


def resnet20(width: float) -> nn.Module:
    """With the published weights, or narrower, from scratch."""
    if width == 1:
        return nets.resnet20()
    first, second, third = (2 * max(1, round(width * n / 2)) for n in (16, 32, 64))
    return nets.ResNet(3, (first, second, third))


def digits() -> Classification:
    task = dataset("digits")
    assert isinstance(task, Classification)
    return replace(task, batch_size=32)


SETTINGS = (
    Setting("digits", perceptron(64, 256, 128), digits, 60, 5),
    Setting("mnist", perceptron(784, 300, 100), mnist, 20, 3),
    Setting("cifar10", resnet20, cifar10, 6, 1, pretrained=True),
)


@functools.cache
def data(setting: Setting) -> Classification:
    return setting.task()


# --- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Start:
    """What a method is made for."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    goal: str
    pretrained: bool
    seed: int

    def make(self, name: str, **options: Any) -> Any:
        """The method of ``secateur.train`` of that name."""
        budget: str | None = f"sparsity={self.goal}"
        if self.goal == GROUPS:
            budget, options = None, {"pattern": GROUPS, **options}
        if self.goal == HALF:
            graph = analyze(self.model, torch.randn(2, 3, 32, 32))
            budget, options = "macs=50%", {"pattern": "channel", "graph": graph, **options}
        return getattr(methods, name)(self.model, self.optimizer, budget, self.steps, seed=self.seed, **options)

    def once(self, step: int, **options: Any) -> Any:
        """All at once after a step."""
        goal = {GROUPS: "sparsity=50%", HALF: "macs=50%"}.get(self.goal, f"sparsity={self.goal}")
        return self.make("Gradual", schedule=[(step, goal)], **options)

    def pat(self) -> Any:
        ours = self.make("Gradual", **({"begin": 0} if self.pretrained else {}))
        begin, end = ours.schedule[0].step, ours.schedule[-1].step
        ours.detach()
        return peers.Pat(self.model, self.optimizer, float(self.goal[:-1]) / 100, begin, end)

    def torch_pruning(self, kind: str) -> Any:
        images, limit = torch.randn(2, 3, 32, 32), macs(self.model) / 2
        kept = [self.model.get_submodule("linear")]
        return peers.TorchPruning(kind, self.model, self.optimizer, images, limit, self.steps // 2, kept)


def method(name: str, **pretrained: Any) -> Make:
    """A method with its defaults, and with ``pretrained`` where it starts from trained weights."""
    return lambda start: start.make(name, **(pretrained if start.pretrained else {}))


METHODS: dict[str, Make | None] = {
    "dense": None,
    "small dense": None,
    "random": lambda start: start.once(1, criterion="random", allocate="erk"),
    "post": lambda start: start.once(1 if start.pretrained else start.steps // 2),
    "gradual": method("Gradual", begin=0),
    "ac/dc": method("ACDC"),
    "rigl": method("RigL", start="magnitude"),
    "set": method("SET", start="magnitude"),
    "movement": method("Movement"),
    "soft movement": method("SoftMovement"),
    "second order": method("SecondOrder"),
    "str": method("STR"),
    "l0": method("L0"),
    "proximal": method("Proximal"),
    "torchao pat": lambda start: start.pat(),
}
OF_GROUPS: dict[str, Make | None] = {name: METHODS[name] for name in ("post", "gradual")} | {
    "asp": method("ASP"),
    "sr-ste": method("SRSTE"),
}
OF_CHANNELS: dict[str, Make | None] = {
    "random": lambda start: start.once(1, criterion="random", allocate="uniform"),
    **{name: METHODS[name] for name in ("small dense", "post", "gradual", "proximal")},
    "group lasso": method("GroupLasso"),
    "growing": method("GrowingReg"),
    "slimming": method("Slimming"),
    "tp group norm": lambda start: start.torch_pruning("GroupNormPruner"),
    "tp growing": lambda start: start.torch_pruning("GrowingRegPruner"),
}


def of(goal: str) -> dict[str, Make | None]:
    return {GROUPS: OF_GROUPS, HALF: OF_CHANNELS}.get(goal, METHODS)


def cosine(done: float) -> float:
    """A rise over the first 5 %, then down to zero."""
    return min(1.0, done / 0.05 + 0.01) * 0.5 * (1 + math.cos(math.pi * done))


# --- one row ---------------------------------------------------------------------------------------


def trained(setting: Setting, method: str, goal: str, rate: float, seed: int) -> tuple[nn.Module, Row]:
    """A network trained by a method, and what it took."""
    task = data(setting)
    torch.manual_seed(seed)
    model = setting.build(narrow(setting, goal) if method == "small dense" else 1.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps, make = setting.epochs * len(task.batches("train")), of(goal)[method] if goal else None
    pruner = make(Start(model, optimizer, steps, goal, setting.pretrained, seed)) if make is not None else None
    stepper = optimizer if pruner is None else pruner.optimizer
    began, step = time.perf_counter(), 0
    for _ in range(setting.epochs):
        for inputs, targets in task.batches("train"):
            done = step / steps
            for group in stepper.param_groups:
                group["lr"] = rate * cosine(2 * done % 1 if method == "post" and not setting.pretrained else done)
            task.loss(model(inputs), targets).backward()
            stepper.step()
            if pruner is not None:
                pruner.step()
            stepper.zero_grad()
            step += 1
    row: Row = {"seconds": round(time.perf_counter() - began, 1), "steps": steps, "rate": rate}
    if pruner is not None:
        plan = pruner.finish()
        if goal == HALF and plan is not None:
            model = shrink(model, plan)
    row["weights"] = [sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1), dense_size(setting)]
    if setting.pretrained:
        row["macs"] = [macs(model), macs(setting.build(1.0))]
    return model.eval(), row


def macs(model: nn.Module) -> int:
    """Of an image."""
    return analyze(model, torch.randn(1, 3, 32, 32)).cost().macs


@functools.cache
def narrow(setting: Setting, goal: str) -> float:
    """The largest factor on widths with which a dense network has no more weights, or multiply-adds, than are left."""
    cost, part = (macs, 0.5) if goal == HALF else (size, 1 - float(goal[:-1]) / 100)
    limit = part * cost(setting.build(1.0))
    widths = (i / 16 for i in range(1, 16)) if goal == HALF else (i / 200 for i in range(1, 200))
    return max(w for w in widths if cost(setting.build(w)) <= limit)


@functools.cache
def dense_size(setting: Setting) -> int:
    return size(setting.build(1.0))


def size(model: nn.Module) -> int:
    return sum(weight.numel for weight in weights_of(model).values())


def row_of(rows: dict[str, Row], setting: Setting, method: str, goal: str, seed: int) -> Row:
    """With the numbers of the test examples that are got wrong, so that any two rows can be compared in pairs."""
    model, row = trained(setting, method, goal, best_rate(rows, setting), seed)
    wrong = np.flatnonzero(evaluate(model, data(setting), "test") == 0)
    tested = len(data(setting).test[1])
    return {**row, "test": 1 - len(wrong) / tested, "wrong": wrong.tolist(), "tested": tested}


def choice(setting: Setting, rate: float) -> Row:
    model, row = trained(setting, "post", CHOICE, rate, seed=0)
    return {**row, "validation": float(evaluate(model, data(setting), "validation").mean())}


def best_rate(rows: dict[str, Row], setting: Setting) -> float:
    found = {row["rate"]: row["validation"] for key, row in rows.items() if key.startswith(f"{setting.name} choice")}
    return max(found, key=found.__getitem__)


def steps(rows: dict[str, Row]) -> Iterator[tuple[str, Callable[[], Row]]]:
    """In order, so that what there is of a run says something."""
    for setting in SETTINGS:
        for rate in RATES:
            yield f"{setting.name} choice {rate}", partial(choice, setting, rate)
        for seed in range(setting.seeds):
            yield f"{setting.name} dense {seed}", partial(row_of, rows, setting, "dense", "", seed)
            for goal in goals(setting):
                for method in of(goal):
                    if method != "dense" and (goal not in MODERATE or method in CLAIM):
                        key = f"{setting.name} {goal} {method} {seed}"
                        yield key, partial(row_of, rows, setting, method, goal, seed)


def goals(setting: Setting) -> tuple[str, ...]:
    return (*SPARSITIES, GROUPS, HALF) if setting.pretrained else (*SPARSITIES, FEWEST, GROUPS, *MODERATE)


def main() -> None:
    torch.set_num_threads(1)
    rows, commit = common.rows("training", today=True), common.commit()
    for key, work in steps(rows):
        if key in rows or not all(word in key for word in sys.argv[1:]):
            continue
        print(key, flush=True)
        rows[key] = {**work(), "commit": commit}
        common.save("training", rows)


if __name__ == "__main__":
    main()
