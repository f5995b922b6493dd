"""The program without some of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from secateur.graph import aliases
from secateur.graph.blocks import Span, is_alias, operands
from secateur.graph.constants import Constants
from secateur.graph.program import Program


def without(program: Program, spans: Iterable[Span]) -> Program:
    """The program in which the entry of every span stands in for its exit, and what only they needed is gone.

    Tensors, products and labels are those of the program that are left; the names of nodes stay.
    """
    spans = tuple(spans)
    stand_in, needed = _instead(spans), _needed(program.module.graph, spans)
    copied = {span.exit for span in spans if _written_later(span.exit)}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def place(node: fx.Node) -> fx.Node:
        return new[node] if node in new else new[stand_in[node]]

    for node in program.module.graph.nodes:
        if node in copied:  # what is written into later must not be what others still read
            new[node] = graph.create_node(
                "call_function", torch.ops.aten.clone.default, (place(node),), name=f"skip_{node.name}"
            )
            new[node].meta = dict(stand_in[node].meta)
        elif node in needed:
            new[node] = graph.node_copy(node, place)
    graph._codegen = program.module.graph._codegen
    module = fx.GraphModule(program.module, graph)
    return replace(
        left(program, spans),
        module=module,
        values={new[node]: value for node, value in program.values.items() if node in new},
        pointers={_moved(key, new): dim for key, dim in program.pointers.items() if _moved(key, new)},
        inexact=frozenset(new[node] for node in program.inexact if node in new),
        constants=Constants(module, aliases.written(module.graph)),
    )


def _moved(key: Any, new: Mapping[fx.Node, fx.Node]) -> Any:
    """A node, or a pair of a node and a number, with the new node; None where it is gone."""
    if isinstance(key, tuple):
        return (new[key[0]], key[1]) if key[0] in new else None
    return new.get(key)


def left(program: Program, spans: Iterable[Span]) -> Program:
    """The program without the tensors and products that only these spans needed: enough to know its cost."""
    needed = _needed(program.module.graph, tuple(spans))
    paths = {str(node.target) for node in needed if node.op == "get_attr"}
    read, run = {program.aliases.get(path, path) for path in paths}, {node.name for node in needed}
    return replace(
        program,
        tensors={name: tensor for name, tensor in program.tensors.items() if name in read or not tensor.read},
        multiplies=tuple(m for m in program.multiplies if m.node in run),
    )


def _instead(spans: Iterable[Span]) -> dict[fx.Node, fx.Node]:
    """What stands in for what when these spans go: for their exits, and for aliases of what they got from outside."""
    found: dict[fx.Node, fx.Node] = {}
    for span in spans:
        found.update({node: operands(node)[0] for node in span.nodes if is_alias(node)})
        found[span.exit] = span.entry
    return {node: _follow(node, found) for node in found}


def _follow(node: fx.Node, found: Mapping[fx.Node, fx.Node]) -> fx.Node:
    while node in found:
        node = found[node]
    return node


def _needed(graph: fx.Graph, spans: tuple[Span, ...]) -> set[fx.Node]:
    """The nodes that still run when these spans go."""
    stand_in, gone = _instead(spans), frozenset[fx.Node]().union(*(span.nodes for span in spans))
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in needed or node.op in ("output", "placeholder") or (node not in gone and _is_mutable(node)):
            needed.add(node)
            needed.update(stand_in.get(source, source) for source in node.all_input_nodes)
    return needed


def _is_mutable(node: fx.Node) -> bool:
    """Whether the operator writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _written_later(node: fx.Node) -> bool:
    """Whether an operator writes into this node's value, or into a view of it."""
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if isinstance(user.target, torch._ops.OpOverload):
            schema = user.target._schema
            if schema.is_mutable and node in user.args[:1]:
                return True
            if not schema.is_mutable and any(r.alias_info is not None for r in schema.returns) and _written_later(user):
                return True
    return False
