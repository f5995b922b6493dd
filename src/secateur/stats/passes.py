"""One pass over the calibration data, for all statistics together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, PruneError, TraceError
from secateur.graph.graph import Graph
from secateur.graph.trace import describe, first_line, untouched
from secateur.progress import track
from secateur.stats.gradients import FisherBlocks, Means, examples, first, probes
from secateur.stats.outputs import COLLECTED as OUTPUTS
from secateur.stats.outputs import Outputs
from secateur.tasks import Task, batches, call, mode


def over(
    model: nn.Module, graph: Graph, names: Collection[str], wanted: Collection[str], task: Task, seed: int
) -> dict[str, dict[str, Tensor]]:
    """The ``wanted`` statistics of each named weight. Raises DataError for data that do not fit the model."""
    weights = {name: model.get_parameter(name) for name in names}
    whole, single = _of_batches(weights, wanted), _of_examples(weights, graph, wanted)
    outputs = Outputs(model, graph, names, wanted)
    plain = functools.partial(call, model)
    seen = bool(OUTPUTS.keys() & wanted)
    with _ready(model, weights):
        for number, batch in enumerate(track(batches(task, "calibration", model), "Collecting statistics")):
            if seen or whole:
                with torch.set_grad_enabled(bool(whole)):
                    output = _output(outputs.run if seen else plain, batch[0], number)
                for what, grads in _derived(whole, task, output, batch[1], weights, number, seed):
                    whole[what].add(grads)
            for inputs, targets in examples(batch) if single else ():
                grads = first(_loss(task, _output(plain, inputs, number), targets, number), weights)
                for gathered in single.values():
                    gathered.add(grads)
    found = outputs.values()
    for what, means in (*whole.items(), *single.items()):
        for name, value in means.values().items():
            found[name][what] = value
    return found


def _of_batches(weights: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Means]:
    kinds: dict[str, Callable[[Tensor], Tensor]] = {"grad_abs": torch.abs, "curvature": torch.square}
    return {what: Means(weights, of) for what, of in kinds.items() if what in wanted}


def _of_examples(
    weights: Mapping[str, Tensor], graph: Graph, wanted: Collection[str]
) -> dict[str, Means | FisherBlocks]:
    found: dict[str, Means | FisherBlocks] = {}
    if "grad_square" in wanted:
        found["grad_square"] = Means(weights, torch.square)
    if "fisher_inverse" in wanted:
        found["fisher_inverse"] = FisherBlocks(weights, graph.weights)
    return found


def _derived(
    wanted: Collection[str],
    task: Task,
    output: Any,
    targets: Any,
    weights: Mapping[str, Tensor],
    number: int,
    seed: int,
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Gradients of one batch, for the statistics that are means of some."""
    if wanted:
        loss = _loss(task, output, targets, number)
        if "grad_abs" in wanted:
            yield "grad_abs", first(loss, weights)
        if "curvature" in wanted:
            for grads in probes(output, lambda z: task.loss(z, targets), weights, f"{seed}:{number}"):
                yield "curvature", grads


@contextmanager
def _ready(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, every weight with gradients; afterwards all as it was."""
    frozen = [p for p in weights.values() if not p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(mode(model, training=False))
        stack.enter_context(torch.enable_grad())
        try:
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


def _output(run: Callable[[Any], Any], inputs: Any, number: int) -> Any:
    try:
        return run(inputs)
    except PruneError as error:
        if isinstance(error, TraceError):
            raise DataError(f"calibration batch {number}: {error}") from error
        raise
    except Exception as error:
        raise DataError(
            f"the model fails on calibration batch {number}, {describe(inputs)}: {type(error).__name__}: "
            f"{first_line(error)}; give data of the form of the example inputs"
        ) from error


def _loss(task: Task, output: Any, targets: Any, number: int) -> Tensor:
    loss = task.loss(output, targets)
    if loss.numel() != 1 or not loss.requires_grad or not bool(loss.isfinite()):
        raise DataError(
            f"the loss on calibration batch {number} is {loss}; expected one finite number that depends on the weights"
        )
    return loss
