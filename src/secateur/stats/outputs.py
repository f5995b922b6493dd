"""What comes out where a weight multiplies, wherever the code does it: in a module, functionally, or several times.

The exported program says which operators multiply with a weight, and which dimension of their output its outputs are
on. It runs in the place of the model, so that one pass gives outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import DataError
from secateur.graph.graph import Graph
from secateur.graph.program import flat_inputs
from secateur.graph.rules import operator_name, pointwise
from secateur.graph.shapes import Elsewhere
from secateur.graph.types import example_args

COLLECTED = {
    "activation": "the mean of |output| over calibration examples and positions, one value per output of the weight",
    "active": "the share of outputs that are on behind the nonlinearity (see follow), one value per output",
}

_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_RECTIFIERS = {"relu", "relu6", "threshold", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu"}
_RECTIFIERS |= {"gelu", "silu", "mish", "hardswish"}
_OTHERS = {"clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "sigmoid", "hardsigmoid", "tanh", "softplus"}
_OTHERS |= {"softsign", "log_sigmoid", "hardshrink", "softshrink", "tanhshrink"}


def follow(node: fx.Node) -> tuple[fx.Node, bool]:
    """Behind which operator an output counts as on or off, and whether it is on above zero instead of off at zero.

    The outputs are followed through norms and pointwise operators of the same shape (a bias, a residual sum) as long
    as nothing else reads them, up to the first nonlinearity. Where there is none, they are taken as they come.
    GELU, SiLU and other smooth relatives of ReLU are hardly ever zero; behind all of these "on" is above zero.
    """
    here = node
    while len(here.users) == 1:
        (user,) = here.users
        name, value = operator_name(user.target), user.meta.get("val")
        if name not in _NORMS | pointwise.RULES.keys() or not isinstance(value, Tensor):
            break
        if value.shape != node.meta["val"].shape:
            break
        here = user
        if name in _RECTIFIERS | _OTHERS:
            return here, name in _RECTIFIERS
    return node, False


class Outputs:
    """Runs a model's program on batch after batch, and keeps the means of what comes out where weights multiply."""

    def __init__(self, model: nn.Module, graph: Graph, places: Collection[str], wanted: Collection[str]) -> None:
        self._graph, self._places = graph, places
        self._wanted = [what for what in COLLECTED if what in wanted]
        self._elsewhere = Elsewhere(model, graph)
        self._watches: dict[int, _Watch] = {}
        self._sums: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self._batch = -1

    def run(self, inputs: Any) -> Any:
        """The model's output on a batch of any shape."""
        self._batch += 1
        graph = self._elsewhere.graph_of(inputs)
        if id(graph) not in self._watches:
            self._watches[id(graph)] = _Watch(graph, self._places, self._wanted, self._add)
        return self._watches[id(graph)](inputs)

    def _add(self, name: str, what: str, out: Tensor, along: int, above: bool) -> None:
        """out: what a weight gives, its outputs on dimension ``along``; on above zero, or where they are not zero."""
        if not bool(out.isfinite().all()):
            raise DataError(
                f"the outputs of weight {name!r} on calibration batch {self._batch} are NaN or infinite; check the "
                "data and the model"
            )
        values = out.abs() if what == "activation" else (out > 0 if above else out != 0)
        rows = values.movedim(along, 0).reshape(values.shape[along], -1)
        weight = self._graph.weights[name]
        n = weight.shape[weight.out_dim]
        if len(rows) % n:
            raise DataError(
                f"weight {name!r} has {n} outputs and is used in parts, {len(rows)} at once, so that they cannot be "
                "told apart; ignore= it, or use a criterion of weights or gradients"
            )
        sums = rows.sum(1, dtype=torch.float64).view(-1, n).sum(0)  # groups of a convolution share a weight's outputs
        total, count = self._sums.get((name, what), (0, 0))
        self._sums[name, what] = total + sums, count + values.numel() // n

    def values(self) -> dict[str, dict[str, Tensor]]:
        """Per weight and statistic one value per output, float32."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self._places}
        for (name, what), (total, count) in self._sums.items():
            if not count:
                raise DataError("the calibration split has batches without examples; give it at least one example")
            found[name][what] = (total / count).float()
        return found


class _Watch(fx.Interpreter):
    """Runs a program, and hands on what comes out where these weights multiply."""

    def __init__(
        self,
        graph: Graph,
        places: Iterable[str],
        wanted: Iterable[str],
        add: Callable[[str, str, Tensor, int, bool], None],
    ) -> None:
        super().__init__(graph.program.module)
        nodes = {node.name: node for node in graph.program.module.graph.nodes}
        self._add = add
        self._spots: dict[fx.Node, list[tuple[str, str, int, bool]]] = {}
        seen = set()
        for m in (m for m in graph.program.multiplies if m.weight in places):
            node = nodes[m.node]
            if not isinstance(node.meta.get("val"), Tensor):
                raise DataError(
                    f"the outputs of weight {m.weight!r} stay inside {operator_name(node.target)}, where they cannot "
                    "be seen; ignore= it, or use a criterion of weights or gradients"
                )
            for what in wanted:
                spot, above = follow(node) if what == "active" else (node, False)
                self._spots.setdefault(spot, []).append((m.weight, what, m.along, above))
            seen.add(m.weight)
        if missing := set(places) - seen:
            raise DataError(
                f"weight {min(missing)!r} is not used on the calibration data as it is on the example inputs; give "
                "example inputs of the same form as the data"
            )

    def __call__(self, inputs: Any) -> Any:
        args, kwargs = example_args(inputs)
        codegen = self.graph._codegen
        assert isinstance(codegen, fx.graph._PyTreeCodeGen)
        flat = flat_inputs(self.graph, args, kwargs)
        return codegen.process_outputs(self.run(*flat, enable_io_processing=False))

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        for name, what, along, above in self._spots.get(node, ()):
            self._add(name, what, value.detach(), along, above)
        return value
