"""Compensation before any training: what is kept is refitted so that the network's inside stays what it was.

The dense program and the pruned one, at the full size with what goes zeroed, run side by side over the calibration
data, node by node. Wherever a weight has lost something, or reads something that has changed, its kept part is
refitted to the dense network's values; what comes after reads the refitted values, so that errors do not add up.

bias            only constants: the means of the outputs stay what they were (a batch norm's running mean serves as one)
least_squares   the kept weights and the constant, in closed form: the smallest squared error of the outputs. Before a
                sum, as in a residual block, the outputs also make up for what the other summand lost
blockwise       least_squares, then gradient steps on each stretch of the network from one place that all data pass to
                the next, towards the dense network's values there (Li et al. 2021, BRECQ). No labels are used
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.errors import DataError, PlanError, SpecError, TraceError
from secateur.graph import Graph
from secateur.graph.program import flat_inputs
from secateur.graph.shapes import Elsewhere
from secateur.graph.trace import at_least_two, describe, first_line, untouched
from secateur.graph.types import Flags, example_args
from secateur.plan import Plan
from secateur.progress import track
from secateur.recover.blockwise import Small, Stretch, Values, differing, stretches, tune
from secateur.recover.places import Place, places
from secateur.solvers import Moments, solve
from secateur.tasks import Task, batches, clone, mode, plain

METHODS = ("bias", "least_squares", "blockwise")

DAMP = 1e-3
"""How much the old weights count, relative to the mean square of an input; more where rows are few, see ``_damp``."""

TINY = 1e-3
"""A batch norm's scale below which an output cannot make up for anything."""

ROWS, PER_INPUT = 20_000, 16
"""Positions that a layer is fitted on: so many, or that many for each input where that is more."""


def reconstruct(
    model: nn.Module, graph: Graph, plan: Plan, task: Task, method: str = "least_squares", seed: int = 0
) -> nn.Module:
    """A copy of the dense ``model`` in which what the plan keeps makes up for what it removes; then mask or shrink it.

    Its shapes are those of the dense model. The task's calibration split is read once, inputs only.

    Raises SpecError for an unknown method, PlanError for a plan that drops whole blocks, DataError for calibration
    data that are empty, or on which values become NaN or infinite.
    """
    require_known(method)
    if plan.dropped:
        raise PlanError(
            f"reconstruct={method!r} refits the layers after removed channels or weights, and the plan drops whole "
            f"blocks ({plan.dropped[0]}, …); leave reconstruct out"
        )
    model = plain(model)
    plan.check_fits(model)
    at, data = _one_program(model, graph, task)
    alive = at.alive({name: flags.numpy() for name, flags in plan.units.items()})
    with mode(model, training=False), torch.no_grad(), untouched(model):
        changed = _Twins(model, at, plan, alive, data, method, seed).walk()
        result = clone(model)
        tensors: dict[str, Tensor] = {**dict(result.named_parameters()), **dict(result.named_buffers())}
        for name, value in changed.items():
            tensors[name].copy_(value)
    return result


def require_known(method: str) -> None:
    """Raise SpecError for what is no method."""
    if method not in METHODS:
        raise SpecError(f"reconstruct={method!r} is unknown; expected one of {', '.join(METHODS)}")


def _one_program(model: nn.Module, graph: Graph, task: Task) -> tuple[Graph, list[list[Any]]]:
    """The calibration inputs, flat, that one program serves, and its graph: of those of other shapes, the most."""
    elsewhere = Elsewhere(model, graph)
    found: dict[int, tuple[Graph, list[list[Any]]]] = {}
    for number, (inputs, _) in enumerate(batches(task, "calibration", model)):
        pair = at_least_two(inputs)  # a batch of one would need a program of its own
        try:
            here = elsewhere.graph_of(pair)
        except TraceError as error:
            raise DataError(
                f"the model fails on calibration batch {number}, {describe(inputs)}: "
                f"{first_line(error.__cause__ or error)}; give data of the form of the example inputs"
            ) from error
        args, kwargs = example_args(pair)
        found.setdefault(id(here), (here, []))[1].append(flat_inputs(here.program.module.graph, args, kwargs))
    return max(found.values(), key=lambda group: len(group[1]))


class _Twins:
    """Both programs on their way through the calibration batches; ``tensors`` are those of the small one."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: Plan,
        alive: Flags,
        data: Sequence[Sequence[Any]],
        method: str,
        seed: int,
    ) -> None:
        self.graph, self.plan, self.method, self.data = graph, plan, method, data
        self.named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        masked = {n: torch.where(plan.masks[n].to(t.device), t, 0) for n, t in self.named.items() if n in plan.masks}
        self.tensors = ChainMap(masked, self.named)
        self.dense = Small(graph.program, model, np.ones_like(alive), self.named)
        self.small = Small(graph.program, model, alive, self.tensors)
        self.before: list[Values] = [{} for _ in data]
        self.after: list[Values] = [{} for _ in data]
        self.differs = differing(graph.program, self.small, plan.tensors)
        self.changed: set[str] = set()
        self.readers: dict[str, list[fx.Node]] = {}
        for node in graph.program.module.graph.nodes:
            if node.op == "get_attr":
                name = graph.program.aliases.get(str(node.target), str(node.target))
                self.readers.setdefault(name, []).append(node)
        self.generator = torch.Generator().manual_seed(seed)

    def walk(self) -> dict[str, Tensor]:
        """Refit in the program's order; returns the tensors that changed, by name."""
        nodes = list(self.graph.program.module.graph.nodes)
        found = places(self.graph)
        ends = {s.exit: s for s in stretches(nodes, self.differs)} if self.method == "blockwise" else {}
        last = _last_uses(nodes, list(ends.values()))
        given = 0
        for node in track(nodes[:-1], "Compensating", len(nodes) - 1):
            if node.op == "placeholder":
                for before, after, inputs in zip(self.before, self.after, self.data, strict=True):
                    before[node], after[node] = (self._unshared(node, inputs[given]) for _ in range(2))
                given += 1
            else:
                self._run(node, found.get(node))
            if node in ends:
                self._tune(ends[node])
            for gone in last.get(node, ()):
                for env in (*self.before, *self.after):
                    env.pop(gone, None)
        return {name: self.tensors[name] for name in self.changed}

    def _run(self, node: fx.Node, place: Place | None) -> None:
        """One operator on all batches, first of the dense network, then, where it differs, of the small one."""
        for env in self.before:
            self.dense.env = env
            env[node] = self._unshared(node, self.dense.run_node(node))
        if place is not None and node in self.differs:
            self._fit(place)
        for env, before in zip(self.after, self.before, strict=True):
            self.small.env = env
            own = node in self.differs or node in self.small.written
            env[node] = self._unshared(node, self.small.run_node(node)) if own else before[node]

    def _unshared(self, node: fx.Node, value: Any) -> Any:
        """A copy of inputs, parameters and buffers that the program writes into."""
        given = node.op in ("placeholder", "get_attr") and isinstance(value, Tensor)
        return value.clone() if given and node in self.small.written else value

    def _fit(self, place: Place) -> None:
        """Refit one weight and the constant beside it, where it has reason to."""
        weight = self.tensors[place.weight]
        keep = self.plan.keep(place.weight) if place.weight in self.plan.tensors else torch.ones_like(weight).bool()
        keep = place.matrix(keep.to(weight.device))
        lives = keep.any(-1)
        if not (place.input in self.differs or self._other_differs(place) or bool((keep != lives[..., None]).any())):
            return
        moments = [Moments() for _ in range(place.groups)]
        width = keep.shape[-1]
        most = max(ROWS, PER_INPUT * width) / len(self.data)
        for before, after in zip(self.before, self.after, strict=True):
            wanted = before[place.node] + self._missing(place, before, after)
            x, y = place.rows(after[place.input], wanted, int(most) + 1, self.generator)
            for group, sums in enumerate(moments):
                sums.add_(x[group], y[group])
        old = place.matrix(weight).double()
        solved = [self._solved(place, sums, old[g], keep[g]) for g, sums in enumerate(moments)]
        new, constant = (torch.stack(parts) for parts in zip(*solved, strict=True))
        if self.method != "bias":
            self._write(place.weight, place.tensor(torch.where(lives[..., None], new, old), weight))
        if place.bias:
            self._move_constant(place, constant.flatten(), lives.flatten())

    def _other_differs(self, place: Place) -> bool:
        return place.other is not None and place.other in self.before[0] and place.other in self.differs

    def _missing(self, place: Place, before: Values, after: Values) -> Tensor | float:
        """What the outputs have to give beyond the dense network's: what the other summand lacks, minus a bias that
        stays."""
        missing: Tensor | float = 0.0
        if self._other_differs(place):
            assert place.other is not None
            scale = place.scale(before.__getitem__)
            lacks = before[place.other] - after[place.other]
            missing = torch.where(scale.abs() > TINY, lacks / scale, 0.0)
        return missing if place.added is None else missing - place.along_outputs(after[place.added])

    def _solved(self, place: Place, sums: Moments, old: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """New weights of one group, and the constant that goes with them."""
        gram, cross, x, y = sums.centred()
        if not bool(gram.isfinite().all() & cross.isfinite().all()):
            raise DataError(
                f"what goes into {place.weight} or comes out of it is NaN or infinite on the calibration data; "
                "check the data and the weights before it"
            )
        if not place.bias:
            return solve(*sums.raw(), old, keep, _damp(sums)), cross.new_zeros(len(old))
        new = torch.where(keep, old, 0.0) if self.method == "bias" else solve(gram, cross, old, keep, _damp(sums))
        return new, y - new @ x

    def _move_constant(self, place: Place, constant: Tensor, lives: Tensor) -> None:
        """Make the constant the bias; or the running mean, which is subtracted."""
        old = self.tensors[place.bias]
        new = constant.to(old) if place.own_bias else old - constant.to(old)
        self._write(place.bias, torch.where(lives, new, old))

    def _write(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value
        self.changed.add(name)
        for env in self.after:  # constants of the program were read when they were met
            env.update({n: self.small.zeroed(value, self.small.dims_of(n)) for n in self.readers[name] if n in env})

    def _tune(self, stretch: Stretch) -> None:
        found = tune(stretch, self.small, self.named, self.before, self.after, self.plan.masks)
        for name, value in found.items():
            self._write(name, value)


def _damp(sums: Moments) -> float:
    """Beyond 16 rows for each input it is DAMP; of fewer, noise would be fitted."""
    return max(DAMP, (sums.inputs / sums.count / 2) ** 2)


def _last_uses(nodes: Sequence[fx.Node], stretches: Sequence[Stretch]) -> dict[fx.Node, list[fx.Node]]:
    """Per node, the values that nothing needs once it has run."""
    order = {node: i for i, node in enumerate(nodes)}
    last = {node: max((order[user] for user in node.users), default=order[node]) for node in nodes}
    for stretch in stretches:
        for node in stretch.outside:
            last[node] = max(last[node], order[stretch.exit])
    gone: dict[fx.Node, list[fx.Node]] = {}
    for node, at in last.items():
        gone.setdefault(nodes[at], []).append(node)
    return gone
