"""The captured program together with the labels of every tensor in it: what things cost, and what stays."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from secateur.graph.constants import Constants
from secateur.graph.labels import Atoms, Dim, Labels
from secateur.graph.macs import Multiply
from secateur.graph.rules import Op
from secateur.graph.rules.base import Value, each
from secateur.graph.types import Cost, Flags


@dataclass(frozen=True, eq=False)
class Tensors:
    """One parameter, buffer or constant: its labels per dimension, and what kind it is."""

    name: str
    dims: list[Dim]
    shape: tuple[int, ...]
    kind: str  # "parameter", "buffer" or "constant" (held by the program, not by the model)
    itemsize: int


@dataclass(frozen=True, eq=False)
class Program:
    """A captured program and everything analysis attached to it."""

    module: fx.GraphModule
    engine: Labels
    values: Mapping[fx.Node, Value]
    tensors: Mapping[str, Tensors]
    aliases: Mapping[str, str]  # other names of tied tensors -> the name used here
    multiplies: tuple[Multiply, ...]
    pointers: MutableMapping[Any, Dim]  # node, or (node, output) -> the dimension that its values are positions in
    inexact: frozenset[fx.Node]  # operators that average over a dimension, so that removing is not zeroing
    constants: Constants
    _resolved: dict[int, tuple[Dim, Atoms]] = field(default_factory=dict, repr=False)

    def op(self, node: fx.Node) -> Op:
        """An operator as its rewrite sees it."""
        return Op(node, self.engine, self.values, "", self.pointers, self.constants.value)

    @property
    def labels(self) -> int:
        return self.engine.count

    def atoms(self, dim: Dim) -> Atoms | None:
        """Resolved atoms of a dimension; remembered, because analysis is over."""
        if dim is None:
            return None
        if id(dim) not in self._resolved:
            self._resolved[id(dim)] = (dim, self.engine.resolve(dim))  # holding dim keeps its id taken
        return self._resolved[id(dim)][1]

    def count(self, dim: Dim, size: int, alive: Flags) -> int:
        """How many indices of a dimension stay."""
        atoms = self.atoms(dim)
        return size if atoms is None else int(alive[atoms].all(0).sum())

    def kept_outputs(self, alive: Flags) -> list[dict[int, Flags]]:
        """Per output tensor, which indices stay; only dimensions that lose some are listed."""
        found = []
        for node in outputs(next(iter(reversed(self.module.graph.nodes)))):
            value = self.values.get(node)
            dims = [] if value is None else [(d, self.atoms(dim)) for d, dim in enumerate(each(value)[0])]
            flags = {d: np.atleast_1d(alive[atoms].all(0)) for d, atoms in dims if atoms is not None}
            found.append({d: here for d, here in flags.items() if not here.all()})
        return found

    def cost(self, alive: Flags) -> Cost:
        """Parameters, weights, MACs and bytes with these labels alive."""
        counts: dict[int, int] = {}

        def kept(dim: Dim, size: int) -> int:
            if dim is None:
                return size
            if id(dim) not in counts:
                counts[id(dim)] = self.count(dim, size, alive)
            return counts[id(dim)]

        params = weights = size = 0
        weighted = {m.weight for m in self.multiplies}
        for t in self.tensors.values():
            if t.kind == "constant":
                continue
            n = int(np.prod([kept(d, s) for d, s in zip(t.dims, t.shape, strict=True)], dtype=np.int64))
            params += n if t.kind == "parameter" else 0
            weights += n if t.name in weighted else 0
            size += n * t.itemsize
        macs = sum(int(np.prod([kept(d, s) for d, s in m.factors], dtype=np.int64)) for m in self.multiplies)
        return Cost(params, weights, macs, size)


def outputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that the program returns, in order; one that is returned twice is there twice."""
    return [n for n in tree_leaves(node.args) if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
