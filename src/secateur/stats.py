"""What calibration data and the network around it say about a weight: only what a criterion asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import DataError, SpecError
from secateur.graph.graph import Graph
from secateur.progress import track
from secateur.tasks import Task, batches, call, mode

COLLECTED = {
    "grad_abs": "the mean over calibration batches of |dL/dw|, of the weight's shape",
    "norm_scale": "|gamma| of the batch norm over the outputs that follows, one value each; ones where none does",
}


@dataclass(frozen=True, eq=False)
class Stats:
    """What a criterion may know about one weight: ``stats["grad_abs"]`` and the like, if it was asked for."""

    name: str
    out_dim: int
    seed: int = 0
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, what: str) -> Tensor:
        if what not in self.values:
            known = "; ".join(f"{name!r}: {meaning}" for name, meaning in COLLECTED.items())
            raise DataError(f"{what!r} was not collected; declare it: @needs({what!r}). There are {known}")
        return self.values[what]


def collect(
    model: nn.Module, graph: Graph, needs: Iterable[str], task: Task | None = None, seed: int = 0
) -> dict[str, Stats]:
    """Statistics of every maskable weight. The model, its mode and its gradients are left as they were.

    Raises SpecError for something that cannot be collected, DataError where data are needed and there are none.
    """
    wanted = set(needs)
    if unknown := wanted - COLLECTED.keys():
        raise SpecError(f"no statistic is called {min(unknown)!r}; there are {', '.join(COLLECTED)}")
    named = dict(model.named_parameters())
    values: dict[str, dict[str, Tensor]] = {name: {} for name in graph.weights}
    if "grad_abs" in wanted:
        if task is None:
            raise DataError("this criterion needs gradients, so give task= with calibration data and a loss")
        for name, grad in _gradients(model, {n: named[n] for n in graph.weights}, task).items():
            values[name]["grad_abs"] = grad
    if "norm_scale" in wanted:
        for name, weight in graph.weights.items():
            outputs = weight.shape[weight.out_dim]
            follows = weight.norm and named[weight.norm].numel() == outputs  # or it is over another dimension
            values[name]["norm_scale"] = named[weight.norm].detach().abs() if follows else torch.ones(outputs)
    return {name: Stats(name, w.out_dim, seed, values[name]) for name, w in graph.weights.items()}


def _gradients(model: nn.Module, weights: Mapping[str, nn.Parameter], task: Task) -> dict[str, Tensor]:
    frozen = [p for p in weights.values() if not p.requires_grad]
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    count = 0
    with mode(model, training=False), torch.enable_grad():
        for p in frozen:
            p.requires_grad_(True)
        try:
            for inputs, targets in track(batches(task, "calibration", model), "Collecting gradients"):
                loss = task.loss(call(model, inputs), targets)
                if loss.numel() != 1 or not loss.requires_grad or not bool(loss.isfinite()):
                    raise DataError(
                        f"the loss on calibration batch {count} is {loss}; expected one finite number "
                        "that depends on the weights"
                    )
                grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, grad in zip(weights, grads, strict=True):
                    if grad is not None:
                        sums[name] += grad.abs()
                count += 1
        finally:
            for p in frozen:
                p.requires_grad_(False)
    return {name: total.div_(count) for name, total in sums.items()}
