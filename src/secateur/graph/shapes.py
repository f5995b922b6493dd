"""The graph of a model at the shapes of other inputs than those it was analyzed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_structure, tree_unflatten

from secateur.graph.analyze import analyze
from secateur.graph.graph import Graph

Shapes = dict[str, tuple[Any, ...]]
"""By where each tensor stands among the inputs: its number, or its keyword."""


class Elsewhere:
    """``graph_of(inputs)``: the graph as given where the shapes are those, else one exported for them, remembered.

    Sizes that an export could leave open serve for every value from 2 up: a batch of another size, a longer text.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model, self._graph = model, graph
        self._known: list[tuple[Shapes, Graph]] = [(_shapes(graph.inputs), graph)]

    def graph_of(self, inputs: Any) -> Graph:
        """Raises TraceError where the model fails on these inputs."""
        shapes = _shapes(inputs)
        for known, graph in self._known:
            if _fits(known, shapes):
                return graph
        said = self._graph.declared
        graph = analyze(self._model, inputs, ties=said.ties, free_outputs=said.free_outputs, dynamic_batch=True)
        values = [n.meta.get("val") for n in graph.program.module.graph.nodes if n.op == "placeholder"]
        self._known.append((_shapes(tree_unflatten(values, tree_structure(inputs))), graph))
        return graph


def _shapes(values: Any) -> Shapes:
    leaves, _ = tree_flatten_with_path(values)
    return {keystr(path): tuple(v.shape) for path, v in leaves if isinstance(v, Tensor)}


def _fits(known: Shapes, shapes: Shapes) -> bool:
    """Whether these sizes are the known ones, or values of the known symbols, each the same wherever it stands."""
    if {at: len(shape) for at, shape in known.items()} != {at: len(shape) for at, shape in shapes.items()}:
        return False
    bound: dict[str, int] = {}
    for size, found in ((a, b) for at, shape in known.items() for a, b in zip(shape, shapes[at], strict=True)):
        if isinstance(size, int):
            if size != found:
                return False
        elif not size.node.expr.is_symbol or found < 2 or bound.setdefault(str(size.node.expr), found) != found:
            return False
    return True
