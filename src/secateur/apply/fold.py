"""Attention scales that a class computes from the width of a head: the difference goes into the query's weights.

``scaled_dot_product_attention`` divides by the root of the width that it finds. Where a plan made heads narrower,
the original network's scale is kept by multiplying whatever the query is linear in by sqrt(new / old).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.apply.blame import flat, modules_of
from secateur.graph.graph import Graph
from secateur.graph.rules import operator_name
from secateur.graph.rules.base import sizes_of
from secateur.graph.trace import untouched
from secateur.graph.types import Flags, Weight
from secateur.tasks import mode


@dataclass(frozen=True, eq=False)
class Scaled:
    """An attention operator of the rewritten program; its query times ``factor`` makes up for the scale of a class."""

    node: fx.Node
    factor: float


def scaled(
    graph: Graph, alive: Flags, written: fx.GraphModule, asks: Callable[[float | None, int], bool]
) -> list[Scaled]:
    """The attention operators whose heads became narrower and whose original (scale, width) ``asks`` for folding."""
    pairs = zip(_attentions(graph.program.module), _attentions(written), strict=True)
    found = []
    for node, new in pairs:
        query = node.args[0]
        assert isinstance(query, fx.Node)
        values, width = graph.program.values.get(query), sizes_of(query)[-1]
        left = graph.program.count(values[-1], width, alive) if isinstance(values, list) else width
        scale = node.kwargs.get("scale")
        if left != width and asks(scale if isinstance(scale, float) else None, width):
            found.append(Scaled(new, math.sqrt(left / width)))
    return found


def implicit(scale: float | None, width: int) -> bool:
    """The operator computes its scale from the width that it finds."""
    return scale is None


def usual(scale: float | None, width: int) -> bool:
    """The class passed 1/sqrt(width), so a new object of the class would pass that of the new width."""
    return scale is not None and math.isclose(scale, width**-0.5, rel_tol=1e-6)


def _attentions(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if operator_name(n.target) == "scaled_dot_product_attention"]


@dataclass(frozen=True, eq=False)
class Fold:
    """Tensors that were multiplied, by name, with the factors; and their values before."""

    factors: Mapping[str, float]
    before: Mapping[str, Tensor]

    def undo_(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, value in self.before.items():
                model.get_parameter(name).copy_(value)


def fold_(written: fx.GraphModule, found: list[Scaled], weights: Mapping[str, Weight], inputs: Any) -> Fold | None:
    """Multiply query weights in place and let the program's operators compute their scale; None where none serve.

    ``written`` shares its parameters with the model. Nothing changes where None is returned.
    """
    factors: dict[str, float] = {}
    rows: dict[str, tuple[int, Tensor]] = {}
    for attention, query in _queries(written, found, inputs):
        chosen = _linear_in(written, attention.node, query, weights)
        if not chosen or chosen.keys() & rows.keys():
            return None
        rows |= chosen
        factors |= dict.fromkeys(chosen, attention.factor)
    before = {name: written.get_parameter(name).detach().clone() for name in rows}
    with torch.no_grad():
        for name, (dim, flags) in rows.items():
            parameter = written.get_parameter(name)
            by_row = torch.where(flags, factors[name], 1.0).to(parameter.dtype)
            parameter.mul_(by_row.view([-1 if d == dim else 1 for d in range(parameter.dim())]))
    for attention in found:
        attention.node.kwargs = {k: v for k, v in attention.node.kwargs.items() if k != "scale"}
    written.recompile()
    return Fold(factors, before)


def _queries(written: fx.GraphModule, found: list[Scaled], inputs: Any) -> list[tuple[Scaled, Tensor]]:
    """Every query, with the way back to the weights that made it."""
    wanted = {a.node.args[0]: a for a in found}
    queries: list[tuple[Scaled, Tensor]] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                queries.append((wanted[n], value))
            return value

    frozen = [p for p in written.parameters() if not p.requires_grad]
    with mode(written, training=False), torch.enable_grad(), untouched(written):
        for p in frozen:
            p.requires_grad_(True)
        Recorder(written).run(*flat(inputs), enable_io_processing=False)
        for p in frozen:
            p.requires_grad_(False)
    return queries


def _linear_in(
    written: fx.GraphModule, attention: fx.Node, query: Tensor, weights: Mapping[str, Weight]
) -> dict[str, tuple[int, Tensor]]:
    """A module's parameters in which the query is linear: per name the dimension and the rows that feed it.

    By Euler's theorem: a function that is homogeneous of degree one is the sum of its derivatives times its arguments.
    """
    paths = modules_of(attention)
    own = {n: p for n, p in written.named_parameters() if n.startswith(f"{paths[-1]}." if paths and paths[-1] else "")}
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(query.shape, generator=generator).to(query)
    cotangents = [query.detach(), random]
    gradients = [
        torch.autograd.grad(query, list(own.values()), u, retain_graph=True, allow_unused=True) for u in cotangents
    ]
    groups: dict[str, list[int]] = {}
    for i, (name, g) in enumerate(zip(own, gradients[0], strict=True)):
        if g is not None and bool((g != 0).any()):
            groups.setdefault(name.rpartition(".")[0], []).append(i)
    names, values = list(own), list(own.values())
    for group in reversed(groups.values()):
        if all(
            _homogeneous(query, u, [(values[i], g[i]) for i in group])
            for u, g in zip(cotangents, gradients, strict=True)
        ):
            found = {}
            for i in group:
                gradient = gradients[0][i]
                dim = weights[names[i]].out_dim if names[i] in weights else 0
                others = [d for d in range(gradient.dim()) if d != dim]
                found[names[i]] = (dim, (gradient != 0).any(others) if others else gradient != 0)
            return found
    return {}


def _homogeneous(query: Tensor, cotangent: Tensor, parts: list[tuple[Tensor, Tensor]]) -> bool:
    whole = float((query.detach() * cotangent).double().sum())
    size = float((query.detach() * cotangent).double().abs().sum())
    return abs(sum(float((p.detach() * g).double().sum()) for p, g in parts) - whole) <= 1e-3 * size
