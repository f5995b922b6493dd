"""Operators that say what others say too, in the words of those others: one rule serves both."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from secateur.graph.aliases import written
from secateur.graph.rules.base import operator_name, sizes_of


def rephrase_(graph: fx.Graph) -> None:
    """``tensordot`` as ``einsum``, and ``view`` as ``reshape``.

    Whether a view is possible depends on strides, and strides on the kernel that a size chooses; views of tensors
    that are written into stay views.
    """
    shared = written(graph)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.view.default and node not in shared:
            node.target = torch.ops.aten.reshape.default
        elif node.op == "call_function" and operator_name(node.target) == "tensordot":
            a, b, over_a, over_b = node.args
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.aten.einsum.default, (_equation(a, b, over_a, over_b), [a, b]))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _equation(a: Any, b: Any, over_a: Any, over_b: Any) -> str:
    """Dimensions that are summed over share a letter."""
    letters = string.ascii_letters
    left = list(letters[: len(sizes_of(a))])
    right = list(letters[len(left) : len(left) + len(sizes_of(b))])
    for i, j in zip(over_a, over_b, strict=True):
        right[j] = left[i]
    out = [t for t in left + right if not (t in left and t in right)]
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}"
