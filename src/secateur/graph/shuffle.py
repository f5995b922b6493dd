"""Channel shuffles written as view, transpose, view become the one operator that they are.

As three operators they make groups of channels that must go together; as one, an index map, every channel goes alone.
"""

from __future__ import annotations

import torch
from torch import fx

from secateur.graph.rules.base import operator_name, sizes_of

_VIEWS = {"view", "reshape", "_unsafe_view"}


def fuse_shuffles_(graph: fx.Graph) -> None:
    """Replace (n, gc, *s) -> (n, g, c, *s) -> transpose(1, 2) -> (n, gc, *s), where nothing else reads the middle."""
    for node in list(graph.nodes):
        if (groups := _groups(node)) is None:
            continue
        first, last = node, _last(node)
        with graph.inserting_before(last):
            shuffled = graph.call_function(torch.ops.aten.channel_shuffle.default, (first.args[0], groups))
        shuffled.meta = dict(last.meta)
        last.replace_all_uses_with(shuffled)
        here: fx.Node = last
        while here is not first:
            source = here.all_input_nodes[0]
            graph.erase_node(here)
            here = source
        graph.erase_node(first)


def _groups(node: fx.Node) -> int | None:
    """The groups of a shuffle that begins with this view; None for anything else."""
    if not (_is(node, _VIEWS) and isinstance(node.args[0], fx.Node)):
        return None
    before, after = sizes_of(node.args[0]), sizes_of(node)
    if not (3 <= len(before) == len(after) - 1 and before == (after[0], after[1] * after[2], *after[3:])):
        return None
    last = _last(node)
    return after[1] if last is not node and sizes_of(last) == before else None


def _last(node: fx.Node) -> fx.Node:
    """The closing view of a shuffle; the node itself where none follows."""
    transpose = _only_user(node)
    if transpose is None or not _is(transpose, {"transpose", "permute"}):
        return node
    order = list(range(len(sizes_of(node))))
    order[1:3] = [2, 1]
    if _is(transpose, {"transpose"}):
        rank = len(order)
        if {int(a) % rank for a in transpose.args[1:3]} != {1, 2}:  # type: ignore[arg-type]
            return node
    elif list(transpose.args[1]) != order:  # type: ignore[arg-type]
        return node
    here = _only_user(transpose)
    if here is not None and _is(here, {"contiguous", "clone"}):
        here = _only_user(here)
    return here if here is not None and _is(here, _VIEWS) else node


def _is(node: fx.Node, names: set[str]) -> bool:
    return node.op == "call_function" and operator_name(node.target) in names


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
