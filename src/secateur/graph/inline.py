"""Subgraphs that only say how to run their body (without gradients, checkpointed) become part of the program."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_BODIES = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
}
"""Position of the body among the arguments of each; what follows it are the body's inputs."""


def inline_(module: fx.GraphModule) -> None:
    """Replace calls of such subgraphs by the operators within, innermost ones too.

    A body without gradients ends in ``detach``. Autocast that is switched on stays a subgraph: its body computes in
    other dtypes than it shows.
    """
    while calls := [n for n in module.graph.nodes if _body_at(n) is not None]:
        for node in calls:
            _inline_one_(module, node)
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()


def _body_at(node: fx.Node) -> int | None:
    name = _name(node)
    return None if name == "wrap_with_autocast" and node.args[2] else _BODIES.get(name)


def _name(node: fx.Node) -> str:
    higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    return str(getattr(node.target, "__name__", "")) if higher else ""


def _inline_one_(module: fx.GraphModule, node: fx.Node) -> None:
    at = _body_at(node)
    assert at is not None
    source = node.args[at]
    assert isinstance(source, fx.Node)
    body = module.get_submodule(str(source.target))
    assert isinstance(body, fx.GraphModule)
    graph = module.graph
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    new: dict[fx.Node, Any] = dict(zip(inputs, node.args[at + 1 :], strict=False))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                new[inner] = graph.get_attr(f"{source.target}.{inner.target}")
                new[inner].meta = dict(inner.meta)
            elif inner.op == "call_function":
                new[inner] = graph.node_copy(inner, lambda n: new[n])
        returned = next(n for n in body.graph.nodes if n.op == "output").args[0]
        outputs = [new[n] if isinstance(n, fx.Node) else n for n in returned]
        if _name(node) == "wrap_with_set_grad_enabled" and not node.args[0]:
            outputs = [_detached(graph, out) for out in outputs]
    for user in list(node.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(outputs[index])
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(graph: fx.Graph, out: Any) -> Any:
    if not (isinstance(out, fx.Node) and isinstance(out.meta.get("val"), torch.Tensor)):
        return out
    node = graph.call_function(torch.ops.aten.detach.default, (out,))
    node.meta = dict(out.meta)
    return node
