"""The original program, at its full size, with everything that a plan removes zeroed wherever it shows up.

Norms, means, softmaxes and the like are taken over what stays: that is the one thing in which removing is more than
zeroing. Nothing else is resized, so this holds a shrunk model to account without sharing its views, splits and sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.graph.aliases import written
from secateur.graph.labels import Dim
from secateur.graph.program import Program, flat_inputs
from secateur.graph.rules import REWRITES, Cut, operator_name
from secateur.graph.rules.base import Dims, Op, each, schema, sizes_of
from secateur.graph.types import Flags


class ZeroedProgram(nn.Module):
    """Call it as the model is called. ``alive`` has one flag per label of the program."""

    def __init__(self, program: Program, model: nn.Module, alive: Flags) -> None:
        super().__init__()
        self._walker = Zeroing(program, model, alive)
        self.program = program.module  # so that its buffers, the original model's own, are this module's
        self._codegen = program.module.graph._codegen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self._codegen, fx.graph._PyTreeCodeGen)
        flat = flat_inputs(self.program.graph, args, kwargs)
        out = self._walker.run(*flat, enable_io_processing=False)
        return self._codegen.process_outputs(out)


class Zeroing(fx.Interpreter):
    """Runs a program node by node, each value zeroed where the labels that are not ``alive`` show up."""

    def __init__(self, program: Program, model: nn.Module, alive: Flags) -> None:
        super().__init__(program.module)
        self.program, self.alive = program, alive
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.cut = Cut(program.engine, alive, self._constant, lambda size, new, old: size)
        self.written = written(program.module.graph)
        self.kept: dict[int, Tensor | None] = {}

    def _constant(self, value: Tensor) -> Any:
        """A rewrite's constants are used at once here, not noted in a program."""
        return value.to(self.device)

    def run_node(self, node: fx.Node) -> Any:
        if node in self.program.inexact and self.loses(node):
            found = self._over_what_stays(self.program.op(node))
        else:
            found = super().run_node(node)
        if isinstance(found, Tensor) and node not in self.written:
            return self.zeroed(found, self.dims_of(node))
        return found

    def dims_of(self, node: fx.Node) -> Dims:
        value = self.program.values.get(node)
        return value if isinstance(value, list) else []

    def loses(self, node: fx.Node) -> bool:
        """Whether the node, or something that it reads, loses anything."""
        values = [self.program.values.get(n) for n in (node, *node.all_input_nodes)]
        return any(self._staying(dim) is not None for value in values for dims in each(value) for dim in dims)

    def _staying(self, dim: Dim) -> Tensor | None:
        """Indices of a dimension that stay; None where all do."""
        if dim is None:
            return None
        if id(dim) not in self.kept:
            atoms = self.program.atoms(dim)
            flags = np.asarray(self.alive[atoms].all(0))
            self.kept[id(dim)] = None if flags.all() else torch.from_numpy(np.flatnonzero(flags)).to(self.device)
        return self.kept[id(dim)]

    def zeroed(self, value: Tensor, dims: Dims) -> Tensor:
        """The value with zeros where its dimensions lose something."""
        if not (value.is_floating_point() or value.is_complex()):
            return value  # numbers of things, not things
        for d, dim in enumerate(dims):
            if (staying := self._staying(dim)) is not None:
                flags = torch.ones(value.shape[d], dtype=torch.bool, device=value.device).index_fill(0, staying, False)
                value = value.masked_fill(flags.view([-1 if k == d else 1 for k in range(value.dim())]), 0)
        return value

    def _over_what_stays(self, op: Op) -> Any:
        """The operator on what stays of its inputs; its outputs at their full size again, zero where nothing is."""
        name = operator_name(op.node.target)
        change = REWRITES[name](op, self.cut) if name in REWRITES else {}
        values = {**op.args, **change}

        def compressed(node: fx.Node) -> Any:
            value = self.env[node]
            if isinstance(value, Tensor) and node not in change.values():
                for d, dim in enumerate(self.dims_of(node)):
                    if (staying := self._staying(dim)) is not None:
                        value = value.index_select(d, staying)
            return value

        named = schema(op.node.target)
        args = [fx.node.map_arg(values[n], compressed) for n, _, keyword in named if not keyword]
        kwargs = {n: fx.node.map_arg(values[n], compressed) for n, default, keyword in named if keyword}
        target: Any = op.node.target
        found = target(*args, **kwargs)
        labels = self.program.values[op.node]
        if isinstance(found, Tensor):
            return self._expanded(found, self.dims_of(op.node), sizes_of(op.node), self.program.pointers.get(op.node))
        assert isinstance(labels, tuple)
        shapes = [tuple(v.shape) for v in op.node.meta["val"]]
        pointers = [self.program.pointers.get((op.node, i)) for i in range(len(found))]
        return tuple(map(self._expanded, found, labels, shapes, pointers))

    def _expanded(self, value: Tensor, dims: Dims, shape: tuple[int, ...], pointer: Dim) -> Tensor:
        if (numbers := self._staying(pointer)) is not None:
            value = numbers[value]  # positions among what stays, as positions among everything
        for d, dim in enumerate(dims):
            if (staying := self._staying(dim)) is not None:
                full = list(value.shape)
                full[d] = shape[d]
                value = value.new_zeros(full).index_copy(d, staying, value)
        return value
