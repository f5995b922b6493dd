"""Operators that say what others say too, in the words of those others: one rule serves both."""

from __future__ import annotations

import string

import torch
from torch import fx

from secateur.graph.rules.base import operator_name, sizes_of


def rephrase_(graph: fx.Graph) -> None:
    """``tensordot`` as ``einsum``: the dimensions that are summed over share a letter."""
    for node in list(graph.nodes):
        if node.op == "call_function" and operator_name(node.target) == "tensordot":
            a, b, over_a, over_b = node.args
            left = list(string.ascii_letters[: len(sizes_of(a))])
            right = list(string.ascii_letters[len(left) : len(left) + len(sizes_of(b))])
            for i, j in zip(over_a, over_b, strict=True):
                right[j] = left[i]
            out = [t for t in left + right if not (t in left and t in right)]
            equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.aten.einsum.default, (equation, [a, b]))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
