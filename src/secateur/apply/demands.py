"""What a class demands of a plan: axes of which it knows one size between them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import nn

from secateur.apply.blame import modules_of
from secateur.graph.graph import Graph
from secateur.graph.rules.base import each


def demands(graph: Graph, model: nn.Module, kinds: Collection[type[nn.Module]]) -> tuple[tuple[str, ...], ...]:
    """Groups of free axes that show up in equal sizes within a module which remembers that size in one attribute.

    ``head_dim`` is such an attribute: it is the width of queries, keys and values alike. Where every axis of a group
    keeps the same part of its units, one number can say so.

    kinds: the classes to look at.
    """
    axis_of = np.full(graph.program.labels, -1)
    for i, axis in enumerate(graph.axes):
        axis_of[axis.atoms] = -1 if axis.frozen else i
    owners = {path: module for path, module in model.named_modules() if type(module) in kinds}
    groups: dict[tuple[str, int], set[int]] = {}
    for node in graph.program.module.graph.nodes:
        paths = [path for path in modules_of(node) if path in owners]
        for dim in (dim for dims in each(graph.program.values.get(node)) for dim in dims) if paths else ():
            atoms = graph.program.atoms(dim)
            if atoms is None or len(atoms) > 1 or (axis_of[atoms] < 0).any():
                continue  # a product of axes, or a part of it stays anyway
            for path in paths:
                if _remembers(owners[path], atoms.shape[1]):
                    groups.setdefault((path, atoms.shape[1]), set()).update(np.unique(axis_of[atoms]).tolist())
    merged = _merge([g for g in groups.values() if len(g) > 1])
    return tuple(tuple(graph.axes[i].name for i in sorted(group)) for group in merged)


def _remembers(module: nn.Module, size: int) -> bool:
    return any(type(v) is int and v == size for v in vars(module).values())


def _merge(groups: list[set[int]]) -> list[set[int]]:
    """Groups that share a member become one."""
    merged: list[set[int]] = []
    for group in groups:
        touching = [m for m in merged if m & group]
        merged = [m for m in merged if not m & group] + [group.union(*touching)]
    return merged
