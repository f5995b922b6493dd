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
from secateur.graph.rules import Op, operator_name
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
class Multiply:
    """One operator's MACs: the product of the sizes of these dimensions."""

    node: str
    weight: str  # the parameter it multiplies with, "" where both factors are activations
    factors: tuple[tuple[Dim, int], ...]


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


def multiply(op: Op, names: Mapping[fx.Node, str]) -> list[Multiply]:
    """The MACs of one operator: output size x length of the sum. Operators without products give none."""
    name = operator_name(op.node.target)
    value = op.values.get(op.node)
    if not isinstance(op.node.meta.get("val"), torch.Tensor) or value is None:
        return []
    out = list(zip(op.of(op.node), op.out, strict=True))

    def record(tensor: str, summed: list[tuple[Dim, int]], over: list[tuple[Dim, int]] = out) -> Multiply:
        return Multiply(op.node.name, names.get(op.args[tensor], "") if tensor else "", (*over, *summed))

    if name.startswith("conv") and "weight" in op.args:
        w = list(zip(op.dims("weight"), op.sizes("weight"), strict=True))
        if "transpose" in name:  # every input value meets out/groups x kernel weights
            x = list(zip(op.dims("input"), op.sizes("input"), strict=True))
            return [record("weight", w[1:], x)]
        return [record("weight", w[1:])]
    if name == "linear":
        return [record("weight", [(op.dims("weight")[1], op.sizes("weight")[1])])]
    if name in ("matmul", "bmm", "mm", "mv", "addmm", "baddbmm"):
        right = next(n for n in ("other", "mat2", "vec", "batch2") if n in op.args)
        left = next(n for n in ("mat1", "batch1", "self") if n in op.args)
        tensor = left if op.args[left] in names else right
        return [record(tensor, [(op.dims(left)[-1], op.sizes(left)[-1])])]
    if name == "scaled_dot_product_attention":
        q = list(zip(op.dims("query"), op.sizes("query"), strict=True))
        tokens = (op.dims("key")[-2], op.sizes("key")[-2])
        return [record("", [tokens], q), record("", [tokens])]
    return []


def outputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that the program returns, in order; one that is returned twice is there twice."""
    return [n for n in tree_leaves(node.args) if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
