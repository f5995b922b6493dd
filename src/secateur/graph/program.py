"""The captured program together with the labels of every tensor in it: what things cost, and what stays."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils._pytree import tree_leaves

from secateur.graph import opaque
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
    read: bool = True  # whether the example inputs reach it


@dataclass(frozen=True, eq=False)
class Sizes:
    """What costs are made of: every tensor and every product of an operator is a product of some of these sizes.

    The first ones are those of labelled dimensions, each set of labels once; the others do not change.
    """

    labelled: list[Atoms]
    fixed: NDArray[np.int64]
    factors: NDArray[np.int64]  # (tensors and products, most factors): places among the sizes
    parts: NDArray[np.int64]  # (4, tensors and products): how often each counts into the fields of a Cost

    def count(self, place: int, alive: Flags) -> int:
        """One labelled size with these labels alive."""
        return int(np.count_nonzero(alive[self.labelled[place]].all(0)))

    def counts(self, alive: Flags) -> NDArray[np.int64]:
        """All sizes with these labels alive."""
        return np.array([*(self.count(place, alive) for place in range(len(self.labelled))), *self.fixed], np.int64)

    def cost(self, counts: NDArray[np.int64]) -> Cost:
        return Cost(*(int(n) for n in self.parts @ counts[self.factors].prod(1)))


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
    _shared: dict[bytes, Atoms] = field(default_factory=dict, repr=False)

    @property
    def hidden(self) -> tuple[str, ...]:
        """Why each module that is one operator here could not be followed. Its MACs are not counted."""
        return tuple(why for node in self.module.graph.nodes if (why := opaque.reason(node)))

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that the example inputs do not reach, so that nothing is known of how they belong together."""
        return tuple(t.name for t in self.tensors.values() if t.kind == "parameter" and not t.read)

    def slices(self, alive: Flags) -> dict[tuple[str, int], tuple[bool, ...]]:
        """Per tensor of the model and dimension that loses some, which indices stay."""
        found = {}
        for t in self.tensors.values():
            for d, dim in enumerate(t.dims if t.kind != "constant" else ()):
                if (atoms := self.atoms(dim)) is not None and not alive[atoms].all():
                    found[t.name, d] = tuple(np.asarray(alive[atoms].all(0)).tolist())
        return found

    def op(self, node: fx.Node) -> Op:
        """An operator as its rewrite sees it."""
        return Op(node, self.engine, self.values, "", self.pointers, self.constants.value)

    @property
    def labels(self) -> int:
        return self.engine.count

    def atoms(self, dim: Dim) -> Atoms | None:
        """Resolved atoms of a dimension, one array for all that have the same; remembered, because analysis is over."""
        if dim is None:
            return None
        if id(dim) not in self._resolved:
            atoms = np.ascontiguousarray(self.engine.resolve(dim))
            digest = hashlib.blake2b(atoms.data, digest_size=16, key=str(atoms.shape).encode()).digest()
            self._resolved[id(dim)] = (dim, self._shared.setdefault(digest, atoms))  # holding dim keeps its id taken
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
        return self.sizes.cost(self.sizes.counts(alive))

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What costs are made of."""
        labelled: dict[int, tuple[int, Atoms]] = {}
        fixed: dict[int, int] = {1: 0}
        products: list[list[tuple[bool, int]]] = []

        def add(factors: Iterable[tuple[Dim, int]]) -> None:
            product = []
            for dim, size in factors:
                if (atoms := self.atoms(dim)) is not None:
                    product.append((True, labelled.setdefault(id(atoms), (len(labelled), atoms))[0]))
                else:
                    product.append((False, fixed.setdefault(size, len(fixed))))
            products.append(product)

        weighted = {m.weight for m in self.multiplies}
        parts: list[tuple[int, int, int, int]] = []
        for t in self.tensors.values():
            if t.kind != "constant":
                add(zip(t.dims, t.shape, strict=True))
                parts.append((t.kind == "parameter", t.name in weighted, 0, t.itemsize))
        for m in self.multiplies:
            add(m.factors)
            parts.append((0, 0, 1, 0))
        most = max(map(len, products), default=0)
        factors = [[at if of_labels else len(labelled) + at for of_labels, at in p] for p in products]
        padded = [p + [len(labelled)] * (most - len(p)) for p in factors]
        return Sizes(
            [atoms for _, atoms in labelled.values()],
            np.array(list(fixed), np.int64),
            np.array(padded, np.int64).reshape(len(products), most),
            np.array(parts, np.int64).reshape(-1, 4).T,
        )


def flat_inputs(graph: fx.Graph, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs of a call in the order of the program's placeholders, in whatever order the keywords are given."""
    codegen = graph._codegen
    assert isinstance(codegen, fx.graph._PyTreeCodeGen)
    names = codegen.pytree_info.in_spec.child(1).context
    return tree_leaves((tuple(args), {name: kwargs[name] for name in names}))


def outputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that the program returns, in order; one that is returned twice is there twice."""
    return [n for n in tree_leaves(node.args) if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
