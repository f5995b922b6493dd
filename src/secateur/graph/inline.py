"""Subgraphs become part of the program: those that only say how to run their body, and both branches of a ``cond``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from secateur.graph.rules.base import sizes_of

_BODIES = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
}
"""Position of the body among the arguments of each; what follows it are the body's inputs."""


def inline_(module: fx.GraphModule) -> None:
    """Replace calls of subgraphs by the operators within, innermost ones too.

    A body without gradients ends in ``detach``. Of a ``cond`` both branches are computed, and one is chosen by
    ``where``. Autocast that is switched on stays a subgraph: its body computes in other dtypes than it shows.
    """
    while calls := [n for n in module.graph.nodes if _body_at(n) is not None or _is_choice(module, n)]:
        for node in calls:
            _replace_(module.graph, node, _choice(module, node) if _name(node) == "cond" else _body(module, node))
    for node in reversed(module.graph.nodes):
        if not node.users and _does_nothing(node):
            module.graph.erase_node(node)
    module.graph.lint()


def _body_at(node: fx.Node) -> int | None:
    name = _name(node)
    return None if name == "wrap_with_autocast" and node.args[2] else _BODIES.get(name)


def _name(node: fx.Node) -> str:
    higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    return str(getattr(node.target, "__name__", "")) if higher else ""


def _is_choice(module: fx.GraphModule, node: fx.Node) -> bool:
    """A ``cond`` on a tensor whose branches give tensors of the same sizes."""
    if _name(node) != "cond" or not isinstance(_value(node.args[0]), torch.Tensor):
        return False
    ends = [_returned(_subgraph(module, branch)) for branch in node.args[1:3]]
    return all(
        isinstance(_value(a), torch.Tensor) and isinstance(_value(b), torch.Tensor) and sizes_of(a) == sizes_of(b)
        for a, b in zip(*ends, strict=True)
    )


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _subgraph(module: fx.GraphModule, source: Any) -> fx.GraphModule:
    body = module.get_submodule(str(source.target))
    assert isinstance(body, fx.GraphModule)
    return body


def _returned(body: fx.GraphModule) -> Any:
    return next(n for n in body.graph.nodes if n.op == "output").args[0]


def _copied(module: fx.GraphModule, source: Any, inputs: Sequence[Any], before: fx.Node) -> list[Any]:
    """The operators of a subgraph put in front of ``before``; what it returns."""
    body, graph = _subgraph(module, source), module.graph
    new: dict[fx.Node, Any] = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], inputs, strict=False))
    with graph.inserting_before(before):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                new[inner] = graph.get_attr(f"{source.target}.{inner.target}")
                new[inner].meta = dict(inner.meta)
            elif inner.op == "call_function":
                new[inner] = graph.node_copy(inner, lambda n: new[n])
    return [new[n] if isinstance(n, fx.Node) else n for n in _returned(body)]


def _body(module: fx.GraphModule, node: fx.Node) -> list[Any]:
    at = _body_at(node)
    assert at is not None
    outputs = _copied(module, node.args[at], node.args[at + 1 :], node)
    if _name(node) == "wrap_with_set_grad_enabled" and not node.args[0]:
        return [_added(module.graph, node, torch.ops.aten.detach.default, (out,), out) for out in outputs]
    return outputs


def _choice(module: fx.GraphModule, node: fx.Node) -> list[Any]:
    condition, *branches, inputs = node.args
    ends = [_copied(module, branch, inputs, node) for branch in branches]  # type: ignore[arg-type]
    where = torch.ops.aten.where.self
    return [_added(module.graph, node, where, (condition, a, b), a) for a, b in zip(*ends, strict=True)]


def _added(graph: fx.Graph, before: fx.Node, target: Any, args: tuple[Any, ...], like: Any) -> Any:
    """One more operator, whose value is like that of another node; what is no tensor stays as it is."""
    if not isinstance(_value(like), torch.Tensor):
        return like
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def _does_nothing(node: fx.Node) -> bool:
    """Whether a node that nothing reads may go, such as a tensor whose shape alone was wanted. Assertions stay."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "get_attr"
    return isinstance(node.meta.get("val"), torch.Tensor) and not node.target._schema.is_mutable


def _replace_(graph: fx.Graph, node: fx.Node, outputs: Sequence[Any]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(outputs[index])
        graph.erase_node(user)
    graph.erase_node(node)
