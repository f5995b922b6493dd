"""How much each block matters: scores of whole blocks, larger stays.

influence        1 - mean cosine between the block's input and output (Men et al. 2024, ShortGPT)
reconstruction   what the model's output loses without the block: squared error relative to the output's own square,
                 taken anew after each block that went (Song et al. 2024, SLEB)
taylor           |dL/dg| at g = 0 where the block gives out y + g (y - x): to first order, what the loss changes by when
                 its input x takes the place of its output y; per batch, averaged
magnitude        the mean |w| of its weights
random           noise from the seed and the block's name: the baseline

They are taken on the task's calibration data; without a task on the example inputs, which taylor refuses.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from secateur import criteria
from secateur.errors import DataError, SpecError
from secateur.graph import Graph
from secateur.graph.blocks import Block
from secateur.graph.rules.base import each
from secateur.graph.shapes import Elsewhere
from secateur.graph.trace import run
from secateur.progress import track
from secateur.stats import Stats
from secateur.tasks import Task, batches, call, mode

CRITERIA = ("influence", "reconstruction", "taylor", "magnitude", "random")

Rank = Callable[[Collection[str]], Mapping[str, float]]
"""The scores of all blocks, where the blocks named are gone already."""

Act = Callable[[str, Tensor, Tensor], Tensor]
"""(name, input, output) of a block -> what is handed on."""


def ranking(
    criterion: str | criteria.Criterion,
    model: nn.Module,
    graph: Graph,
    names: Collection[str],
    task: Task | None,
    seed: int,
) -> Rank:
    """The criterion as a function of what is gone. Raises SpecError for one that does not score blocks."""
    if criterion not in CRITERIA:
        raise SpecError(f"criterion {criterion!r} does not score blocks; expected one of {', '.join(CRITERIA)}")
    if criterion == "taylor" and task is None:
        raise DataError("criterion 'taylor' needs gradients, so give task= with calibration data and a loss")
    if any(p.is_meta for p in model.parameters()):  # without values all blocks are alike
        return lambda gone: dict.fromkeys(names, 1.0)
    data = Calibration(model, graph, task)
    if criterion == "reconstruction":
        return lambda gone: reconstruction(data, names, gone)
    if criterion == "influence":
        fixed = influence(data, names)
    elif criterion == "taylor":
        fixed = taylor(data, names)
    elif criterion == "magnitude":
        fixed = magnitude(model, graph, names)
    else:
        fixed = {n: float(criteria.random(torch.zeros(()), Stats(n, 0, seed))) for n in names}
    return lambda gone: fixed


# --- data ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Calibration:
    """The batches to score on, and the model as it runs where something acts on what its blocks hand on.

    Blocks that are modules are watched by hooks. Where one is not, or is not given its input first, the program of each
    batch's shape runs instead, which takes an export for every new shape.
    """

    model: nn.Module
    graph: Graph
    task: Task | None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of each batch."""
        if self.task is None:
            yield self.graph.inputs, None
        else:
            yield from track(batches(self.task, "calibration", self.model), "Scoring blocks")

    def run(self, inputs: Any, act: Act, *, grad: bool = False) -> Any:
        """The model's output in evaluation mode, where ``act`` decides what each block hands on."""
        module = self.model if self._by_hooks else probed(self.graph_of(inputs), act)
        with mode(module, training=False), torch.set_grad_enabled(grad):
            if not self._by_hooks:
                return call(module, inputs)
            with _hooks(self.model, [b.path for b in self._free], act):
                return call(module, inputs)

    @functools.cached_property
    def _free(self) -> list[Block]:
        return [block for block in self.graph.blocks if not block.frozen]

    @functools.cached_property
    def _by_hooks(self) -> bool:
        if not all(block.path for block in self._free):
            return False
        alike: list[bool] = []

        def note(name: str, x: Tensor, y: Tensor) -> Tensor:
            alike.append(x.shape == y.shape)
            return y

        with _hooks(self.model, [b.path for b in self._free], note):
            run(self.model, self.graph.inputs)
        return all(alike)

    def graph_of(self, inputs: Any) -> Graph:
        """The model's graph at the shape of these inputs."""
        graph = self._elsewhere.graph_of(inputs)
        if missing := {b.name for b in self.graph.blocks} - {b.name for b in graph.blocks}:
            raise DataError(
                f"on the calibration data the model has no block {min(missing)!r}, which it has on the example inputs; "
                "give example inputs of the same form as the data"
            )
        return graph

    @functools.cached_property
    def _elsewhere(self) -> Elsewhere:
        return Elsewhere(self.model, self.graph)


@contextlib.contextmanager
def _hooks(model: nn.Module, paths: Collection[str], act: Act) -> Iterator[None]:
    """While inside, ``act`` decides what these modules hand on; their first floating-point tensor counts as input."""
    given: dict[str, list[Tensor]] = {path: [] for path in paths}
    with contextlib.ExitStack() as stack:
        for path in paths:

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
                given[path].append(next(tensors, torch.zeros(())).clone())  # the block may write into what it got

            def after(module: nn.Module, args: Any, output: Any, path: str = path) -> Any:
                first = output if isinstance(output, Tensor) else output[0]
                made = act(path, given[path].pop(), first)
                return made if isinstance(output, Tensor) else (made, *output[1:])

            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


class _Probe(nn.Module):
    def __init__(self, name: str, act: Act) -> None:
        super().__init__()
        self.name, self.act = name, act

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.name, x, y)


def probed(graph: Graph, act: Act) -> fx.GraphModule:
    """The program, with what ``act`` makes of it in the place of each block's output."""
    copied = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.program.module.graph, new))
    copied._codegen = graph.program.module.graph._codegen
    module = fx.GraphModule(graph.program.module, copied)
    order = {node: i for i, node in enumerate(graph.program.module.graph.nodes)}
    spans = [(span, b.name) for b in graph.blocks if not b.frozen for span in b.spans]
    for i, (span, name) in enumerate(sorted(spans, key=lambda pair: order[pair[0].exit])):
        entry, out = new[span.entry], new[span.exit]
        with module.graph.inserting_after(entry):  # operators of the block may write into what it got
            entry = module.graph.call_function(torch.ops.aten.clone.default, (entry,))
        module.add_submodule(f"probe_{i}", _Probe(name, act))
        with module.graph.inserting_after(out):
            probe = module.graph.call_module(f"probe_{i}", (entry, out))
        out.replace_all_uses_with(probe)
        probe.args = (entry, out)
        new[span.exit] = probe
    module.recompile()
    return module


# --- scores ----------------------------------------------------------------------------------------


def influence(data: Calibration, names: Collection[str]) -> dict[str, float]:
    """1 - the mean cosine, over all positions, of the features that go in and those that come out."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    features = {b.name: _feature_dim(data.graph, b) for b in data.graph.blocks if b.name in names}

    def note(name: str, x: Tensor, y: Tensor) -> Tensor:
        if name in sums:
            a, b, dim = x.double(), y.double(), features[name]
            dot, norms = (a * b).sum(dim), a.norm(dim=dim) * b.norm(dim=dim)
            cosines = torch.where((a == b).all(dim), 1.0, dot / norms.clamp_min(1e-30))
            sums[name] += float(cosines.sum())
            counts[name] += cosines.numel()
        return y

    for inputs, _ in data:
        data.run(inputs, note)
    return {name: 1 - sums[name] / counts[name] for name in names}


def _feature_dim(graph: Graph, block: Block) -> int:
    """The dimension of the block's output that holds channels: the last one that analysis follows."""
    dims = each(graph.program.values.get(block.spans[0].exit))[0]
    return max((d for d, dim in enumerate(dims) if dim is not None), default=-1)


def taylor(data: Calibration, names: Collection[str]) -> dict[str, float]:
    """|dL/dg| of each block's gate, averaged over batches."""
    assert data.task is not None
    sums, count = dict.fromkeys(names, 0.0), 0
    for inputs, targets in data:
        gates = {name: torch.zeros((), requires_grad=True) for name in names}

        def gate(name: str, x: Tensor, y: Tensor, gates: Mapping[str, Tensor] = gates) -> Tensor:
            return y + gates[name].to(y) * (y - x).detach() if name in gates else y

        with torch.enable_grad():
            loss = data.task.loss(data.run(inputs, gate, grad=True), targets)
        if loss.numel() != 1 or not loss.requires_grad or not bool(loss.isfinite()):
            raise DataError(
                f"the loss on calibration batch {count} is {loss}; expected one finite number that depends on the model"
            )
        grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for name, grad in zip(gates, grads, strict=True):
            sums[name] += abs(float(grad)) if grad is not None else 0.0
        count += 1
    return {name: total / count for name, total in sums.items()}


def reconstruction(data: Calibration, names: Collection[str], gone: Collection[str]) -> dict[str, float]:
    """Per block that is left, the squared error of the model's output without it and without what is gone."""
    left = [name for name in names if name not in gone]
    errors, squares, off = dict.fromkeys(left, 0.0), 0.0, set[str]()

    def skip(name: str, x: Tensor, y: Tensor) -> Tensor:
        return x if name in off else y

    for inputs, _ in data:
        off.clear()
        dense = data.run(inputs, skip)
        squares += squared(dense)
        for name in left:
            off.clear()
            off.update(gone, (name,))
            errors[name] += squared(data.run(inputs, skip), dense)
    return {name: error / max(squares, 1e-30) for name, error in errors.items()}


def magnitude(model: nn.Module, graph: Graph, names: Collection[str]) -> dict[str, float]:
    """The mean |w| of the weights that go with each block."""
    scores, found = criteria.score(model, graph, "magnitude"), {}
    for name in names:
        left = graph.without([name]).weights
        own = [score for weight, score in scores.items() if weight not in left]
        found[name] = float(sum(s.sum(dtype=torch.float64) for s in own)) / max(sum(s.numel() for s in own), 1)
    return found


def squared(found: Any, expected: Any = None) -> float:
    """The sum of squares of all floating-point outputs, or of what they differ by."""
    values, others = (
        [v for v in tree_leaves(o) if isinstance(v, Tensor) and v.is_floating_point()] for o in (found, expected)
    )
    gaps = [a.double() - b.double() for a, b in zip(values, others, strict=True)] if others else values
    return float(sum(gap.double().square().sum() for gap in gaps))
