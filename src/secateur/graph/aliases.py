"""Which nodes of a program share memory with something that an operator writes into."""

from __future__ import annotations

import operator

import torch
from torch import fx


def memory(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Per node, the one that its memory was made by: itself, unless it is a view or writes into what it is given."""
    return _followed(graph)[0]


def writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Per memory that is written into, by the node that made it, the last node that does so."""
    return _followed(graph)[1]


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose memory is written into after they are made: a copy of one would lose the write."""
    base, last = _followed(graph)
    return frozenset(node for node, root in base.items() if root in last)


def _followed(graph: fx.Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    base: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        base[node] = node
        if node.target is operator.getitem:
            base[node] = base[node.all_input_nodes[0]]
        elif isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and isinstance(value, fx.Node):
                    base[node] = base[value]
                    if argument.alias_info.is_write:
                        last[base[value]] = node
    return base, last
