"""How the loss rises when one place alone loses units: the curves that the allocation ``sensitivity`` goes by.

Each axis (or weight, where masks are chosen) loses 10, 25, 50, 75 and 90 % of its units, those with the lowest scores
of the criterion first, while everything else stays (Li et al. 2017; Han et al. 2015). What goes is zeroed, in the
program of a model that loses units, in a copy of one that loses weights: removing is zeroing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur import patterns
from secateur.allocate import Curve, best
from secateur.apply.oracle import ZeroedProgram
from secateur.criteria import Criterion, units_of
from secateur.errors import DataError
from secateur.files import read_json, write_atomic
from secateur.graph.graph import Graph
from secateur.graph.shapes import Elsewhere
from secateur.graph.trace import describe, first_line, untouched
from secateur.names import Choice, chosen
from secateur.progress import track
from secateur.tasks import Task, batches, call, clone, mode, plain

PARTS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Parts of its units that each place loses in turn."""

BATCHES = 8
"""Calibration batches that the loss is taken on, at most."""


def measure(
    model: nn.Module,
    graph: Graph,
    *,
    pattern: str = "channel",
    criterion: str | Criterion = "magnitude",
    task: Task | None = None,
    ignore: Choice | Sequence[Choice] = (),
    seed: int = 0,
    folder: Path | str | None = None,
) -> dict[str, Curve]:
    """A curve per place that may lose units: the mean loss over calibration batches minus that of the whole model.

    It takes ``len(PARTS)`` passes over at most ``BATCHES`` batches for each place, without gradients and without
    recalibration. folder: curves are kept there, in a file named after the weights, the scores, the data and the
    pattern, and read instead of measured where all of these are the same.

    Raises DataError without a task, and for a loss that is not one finite number on the whole model.
    """
    if task is None:
        raise DataError("sensitivity measures the loss, so give task= with a calibration split and a loss")
    model = plain(model)
    shape = patterns.parse(pattern)
    shape = shape.channel if isinstance(shape, patterns.Both) else shape
    ignored = chosen(ignore, [*graph.weights, *(a.name for a in graph.axes)], model, "ignore")
    units = units_of(model, graph, shape, criterion, task, ignored, seed)
    data = list(itertools.islice(batches(task, "calibration", model), BATCHES))
    file = Path(folder) / f"{_key(model, shape, units, task, data)}.json" if folder is not None else None
    if file is not None and file.exists():
        return _read(file, units)
    meter = _Meter(model, graph, task, data)
    probe = _channels(meter) if isinstance(shape, patterns.Channel) else _masks(meter, shape)
    rises = _finite(dict(_rises(meter, units, probe)))
    curves = {place: Curve(place, PARTS, rise) for place, rise in rises.items()}
    if file is not None:
        write_atomic(file, json.dumps([asdict(curve) for curve in curves.values()], indent=1) + "\n")
    return curves


Probe = Callable[[str, Tensor], float]
"""(place, flags of the units that stay) -> the loss."""


def _rises(meter: _Meter, units: Mapping[str, Tensor], probe: Probe) -> Iterator[tuple[str, tuple[float, ...]]]:
    with torch.no_grad(), mode(meter.model, training=False), untouched(meter.model):
        whole = meter.loss(lambda inputs: call(meter.model, inputs))
        if not math.isfinite(whole):
            raise DataError(f"the loss of the whole model on the calibration data is {whole}; expected a finite number")
        for place, scores in track(units.items(), "Measuring sensitivity", len(units)):
            kept = [scores.numel() - int(part * scores.numel()) for part in PARTS]
            yield place, tuple(probe(place, best(scores, k)) - whole for k in kept)


def _finite(rises: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Where the loss overflows or is not a number, it has risen twice as much as it has anywhere else."""
    worst = 2 * max([0.0, *(rise for found in rises.values() for rise in found if math.isfinite(rise))])
    return {place: tuple(r if math.isfinite(r) else worst for r in found) for place, found in rises.items()}


@dataclass(eq=False)
class _Meter:
    """A model and the batches that its loss is taken on."""

    model: nn.Module
    graph: Graph
    task: Task
    data: list[tuple[Any, Any]]

    def loss(self, run: Callable[[Any], Any]) -> float:
        """The mean over batches."""
        total = 0.0
        for number, (inputs, targets) in enumerate(self.data):
            try:
                output = run(inputs)
            except Exception as error:
                raise DataError(
                    f"the model fails on calibration batch {number}, {describe(inputs)}: {type(error).__name__}: "
                    f"{first_line(error)}; give data of the form of the example inputs"
                ) from error
            loss = self.task.loss(output, targets)
            if loss.numel() != 1:
                raise DataError(
                    f"the loss on calibration batch {number} is of shape {list(loss.shape)}, expected one number"
                )
            total += float(loss)
        return total / len(self.data)


def _channels(meter: _Meter) -> Probe:
    elsewhere = Elsewhere(meter.model, meter.graph)

    def probe(place: str, keep: Tensor) -> float:
        @functools.cache
        def without(graph: Graph) -> ZeroedProgram:
            return ZeroedProgram(graph.program, meter.model, graph.alive({place: keep.cpu().numpy()}))

        return meter.loss(lambda inputs: call(without(elsewhere.graph_of(inputs)), inputs))

    return probe


def _masks(meter: _Meter, pattern: patterns.Pattern) -> Probe:
    copy = clone(meter.model).eval()

    def probe(place: str, keep: Tensor) -> float:
        weight = copy.get_parameter(place)
        whole = weight.detach().clone()
        weight.mul_(patterns.spread(pattern, keep, meter.graph.weights[place]))
        found = meter.loss(lambda inputs: call(copy, inputs))
        weight.copy_(whole)
        return found

    return probe


def _key(
    model: nn.Module, pattern: patterns.Pattern, units: Mapping[str, Tensor], task: Task, data: Sequence[Any]
) -> str:
    """A name for everything that curves depend on: scores stand for criterion and seed."""
    digest = hashlib.blake2b(f"{pattern} {PARTS} {type(task).__qualname__} {list(units)}".encode(), digest_size=12)
    tensors = [v for v in tree_leaves(data) if isinstance(v, Tensor)]
    for tensor in (*model.state_dict().values(), *units.values(), *tensors):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path, units: Mapping[str, Tensor]) -> dict[str, Curve]:
    try:
        found = [
            Curve(c["place"], tuple(map(float, c["removed"])), tuple(map(float, c["rise"]))) for c in read_json(file)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} holds no sensitivity curves; remove it, and they are measured anew") from error
    curves = {curve.place: curve for curve in found}
    if curves.keys() != units.keys() or any(c.removed != PARTS or len(c.rise) != len(PARTS) for c in found):
        raise DataError(f"{file} holds other sensitivity curves; remove it, and they are measured anew")
    return curves
