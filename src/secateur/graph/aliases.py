"""Which nodes of a program share memory with something that an operator writes into."""

from __future__ import annotations

import operator

import torch
from torch import fx


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose memory is written into after they are made: a copy of one would lose the write."""
    base: dict[fx.Node, fx.Node] = {}
    roots: set[fx.Node] = set()
    for node in graph.nodes:
        base[node] = node
        if node.target is operator.getitem:
            base[node] = base[node.all_input_nodes[0]]
        elif isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and isinstance(value, fx.Node):
                    base[node] = base[value]
                    if argument.alias_info.is_write:
                        roots.add(base[value])
    return frozenset(node for node, root in base.items() if root in roots)
