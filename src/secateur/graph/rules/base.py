"""What a rule and a rewrite see of one operator of the exported program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from secateur.graph.labels import Dim, Labels

UNKNOWN = 10_000_019  # sizes from here on stand for sizes that depend on data; no real dimension is that large

Dims = list[Dim]
TARGET = "target"  # the key under which a rewrite names another operator to call
Value = Dims | tuple[Dims, ...] | None  # of one tensor, of several, of none


@functools.cache
def schema(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, default and whether it is keyword-only, of each argument of an operator."""
    return tuple((a.name, a.default_value, a.kwarg_only) for a in target._schema.arguments)


def operator_name(target: Any) -> str:
    """``aten.add_.Tensor`` is ``add``: overloads and in-place variants do the same to channels."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    space, name = target._schema.name.split("::")
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return name if space == "aten" else f"{space}::{name}"


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The shape on the example inputs; symbolic sizes are read without specializing them."""
    return tuple(map(size, node.meta["val"].shape))


def size(symbol: Any) -> int:
    """A size as a number. One that depends on data has none: it gets a large one of its own, the same everywhere."""
    if isinstance(symbol, int):
        return symbol
    if symbol.node.has_hint():
        return int(symbol.node.hint)
    expression = symbol.node.expr
    number = expression.subs({s: UNKNOWN + 2 * (crc32(str(s).encode()) % 4096) for s in expression.free_symbols})
    return int(number) if number.is_integer and number > 1 else UNKNOWN + crc32(str(expression).encode()) % 4096


def each(value: Value) -> tuple[Dims, ...]:
    """The labels of every tensor that a value stands for."""
    return value if isinstance(value, tuple) else (value or [],)


@dataclass(frozen=True)
class Op:
    """One operator: its arguments by name, the labels and shapes of what it reads."""

    node: fx.Node
    labels: Labels
    values: Mapping[fx.Node, Value]
    where: str
    pointers: MutableMapping[Any, Dim] = field(default_factory=dict)  # nodes whose values are positions in a dimension
    constant: Callable[[fx.Node], torch.Tensor | None] = lambda node: None  # the value of a node, where it is fixed
    vanishing: Set[fx.Node] = frozenset()  # nodes that are zero wherever the weights of a unit are
    written: Set[fx.Node] = frozenset()  # nodes whose memory is written into

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """Arguments by their names in the operator's schema, defaults filled in."""
        arguments = schema(self.node.target)
        named = {name: default for name, default, _ in arguments}
        named.update({name: value for (name, _, _), value in zip(arguments, self.node.args, strict=False)})
        return {**named, **self.node.kwargs}

    @property
    def out(self) -> tuple[int, ...]:
        return sizes_of(self.node)

    def dims(self, name: str) -> Dims:
        """Labels of the tensor argument ``name``."""
        return self.of(self.args[name])

    def of(self, node: Any) -> Dims:
        value = self.values[node]
        assert not isinstance(value, tuple)
        return [None] * len(sizes_of(node)) if value is None else list(value)

    def sizes(self, name: str) -> tuple[int, ...]:
        return sizes_of(self.args[name])

    def number(self, name: str) -> int:
        """An integer argument; a symbolic one as it is on the example inputs."""
        value = self.args[name]
        return size(value.meta["val"] if isinstance(value, fx.Node) else value)

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dimension argument, counted from the front."""
        return int(self.args[name]) % max(len(self.sizes(of)), 1)

    @property
    def tensors(self) -> list[fx.Node]:
        """All tensor inputs, those within lists included."""
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def broadcast(self, *inputs: tuple[Sequence[Dim], Sequence[int]]) -> Dims:
        """Unite dimensions aligned from the right, as elementwise operators do; size 1 stretches."""
        rank = max(len(sizes) for _, sizes in inputs)
        out: Dims = [None] * rank
        for k in range(1, rank + 1):
            here = [(dims[-k], sizes[-k]) for dims, sizes in inputs if len(sizes) >= k]
            wide = [dim for dim, size in here if size > 1]
            for dim in wide[1:]:
                self.labels.unite(wide[0], dim, self.where)
            out[-k] = next((dim for dim in wide if dim is not None), None)
        return out

    def keep_leading(self, dims: Dims, trailing: int) -> Dims:
        """Labels pass through, except the last ``trailing`` dimensions, which must stay whole."""
        cut = len(dims) - trailing
        for dim in dims[cut:]:
            self.labels.freeze(dim, f"spatial dimension of {self.where}")
        return dims[:cut] + [None] * trailing


@dataclass(frozen=True)
class Cut:
    """Which indices stay, for a rewrite: answers about labels, and a place for constants."""

    labels: Labels
    alive: NDArray[np.bool_]
    constant: Callable[[torch.Tensor], fx.Node]
    scale: Callable[[fx.Node, int, int], fx.Node]  # (size, new, old) -> size * new // old, for symbolic sizes
    contiguous: Callable[[fx.Node], fx.Node] = lambda node: node  # a copy without gaps, where strides matter

    def kept(self, dim: Dim, size: int) -> NDArray[np.int64]:
        """Indices of the dimension that stay."""
        if dim is None:
            return np.arange(size)
        return np.flatnonzero(self.alive[self.labels.resolve(dim)].all(0))

    def shape(self, op: Op) -> list[int]:
        """The new shape of the operator's output."""
        value = op.of(op.node)
        return [len(self.kept(d, n)) for d, n in zip(value, op.out, strict=True)]

    def resized(self, op: Op, asked: Sequence[Any]) -> list[Any]:
        """Sizes as an operator asks for them, changed where its output lost something; -1 stays -1."""

        def size(a: Any, new: int, old: int) -> Any:
            if new == old or (isinstance(a, int) and a == -1):
                return a
            return self.scale(a, new, old) if isinstance(a, fx.Node) else new

        return [size(a, n, o) for a, n, o in zip(asked, self.shape(op), op.out, strict=True)]


Rule = Callable[[Op], Value]
Rewrite = Callable[[Op, Cut], dict[str, Any]]
