"""``analyze``: run the rules over a captured program and gather what they found into axes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from secateur.errors import TraceError
from secateur.graph import opaque
from secateur.graph.aliases import written
from secateur.graph.axes import gather
from secateur.graph.constants import Constants
from secateur.graph.declared import freed, tie
from secateur.graph.graph import Graph
from secateur.graph.labels import Dim, Labels
from secateur.graph.macs import Multiply, Read, carried, multiply
from secateur.graph.program import Program, Tensors, outputs
from secateur.graph.rules import RULES, Op, operator_name
from secateur.graph.rules.base import Value, each
from secateur.graph.rules.index import CARRIES, reads_positions
from secateur.graph.trace import capture, source_line
from secateur.graph.types import Declared, Weight
from secateur.graph.zeros import vanishes
from secateur.tasks import plain


def analyze(
    model: nn.Module,
    inputs: Any,
    *,
    ties: Iterable[tuple[str, str]] = (),
    free_outputs: bool | int | Iterable[int] = False,
    dynamic_batch: bool = False,
) -> Graph:
    """Find what can be removed from a model, and what can only be removed together.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword). The model is captured with
    ``torch.export`` in evaluation mode and is not changed; one that is compiled or wrapped for several devices is
    followed inside.
    ties: pairs of places that must keep the same units: names of axes, or dimensions such as ``layer.weight:0``.
    free_outputs: True, or numbers of output tensors, that may lose channels, such as the features of a backbone
        that gets another head. The shape of every other output is promised to the caller.
    dynamic_batch: leave the captured program open to any batch size.

    Raises TraceError where the model fails on its inputs or cannot be captured, SpecError for a tie or an output that
    is not there.
    """
    model = plain(model)
    module = capture(model, inputs, dynamic_batch)
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters, so nothing can be pruned")
    declared = Declared(tuple(ties), freed(module, free_outputs))
    walk = _Walk(module, model, declared.free_outputs)
    for node in module.graph.nodes:
        walk.visit(node)
    walk.finish()
    program = walk.program()
    axes = gather(program, walk.weights)
    if declared.ties:
        tie(program, axes, declared.ties)
        program = walk.program()
        axes = gather(program, walk.weights)
    return Graph(axes, walk.weights, program, inputs, declared)


@dataclass
class _Walk:
    """The state of one pass over the program, in order."""

    module: fx.GraphModule
    model: nn.Module
    freed: tuple[int, ...]

    def __post_init__(self) -> None:
        self.labels = Labels()
        self.values: dict[fx.Node, Value] = {}
        self.tensors: dict[str, Tensors] = {}
        self.weights: dict[str, Weight] = {}
        self.multiplies: list[Multiply] = []
        self.reads: dict[fx.Node, Read] = {}  # nodes that are a parameter, or a part of one
        self.producers: dict[fx.Node, str] = {}  # node -> weight whose outputs it holds
        self.pointers: dict[Any, Dim] = {}  # node, or (node, output) -> the dimension that its values are positions in
        self.inexact: set[fx.Node] = set()
        self.vanishing: set[fx.Node] = set()
        self.written = written(self.module.graph)
        self.constants = Constants(self.module, self.written)
        self.aliases, self.kinds = _canonical_names(self.model)

    def finish(self) -> None:
        """Parameters and buffers that the example inputs do not reach are there all the same, and stay as they are."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        for name, tensor in named:
            if self.aliases[name] == name and name not in self.tensors:
                dims: list[Dim] = [None] * tensor.dim()
                kind, size = self.kinds[name], tensor.element_size()
                self.tensors[name] = Tensors(name, dims, tuple(tensor.shape), kind, size, read=False)

    def program(self) -> Program:
        return Program(
            self.module,
            self.labels,
            self.values,
            self.tensors,
            self.aliases,
            tuple(self.multiplies),
            self.pointers,
            frozenset(self.inexact),
            self.constants,
        )

    def visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._read(node)
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "output":
            for i, out in enumerate(outputs(node)):
                if i not in self.freed:
                    self._freeze(out, f"model output {i}: its shape is promised to the caller")
                self.labels.freeze(self.pointers.get(out), f"model output {i} holds positions in it")
        else:
            self.values[node] = None

    def _read(self, node: fx.Node) -> None:
        """A parameter, buffer or constant: every dimension gets atoms the first time it is read."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            self.values[node] = None
            return
        path = str(node.target)
        name = self.aliases.get(path, path)
        if name not in self.tensors:
            dims = [self.labels.fresh(int(n)) for n in value.shape]
            kind = self.kinds.get(name, "constant")
            self.tensors[name] = Tensors(name, dims, tuple(value.shape), kind, value.element_size())
        self.values[node] = list(self.tensors[name].dims)
        if self.tensors[name].kind == "parameter":
            self.vanishing.add(node)
            self.reads[node] = Read(name, tuple(range(value.dim())), tuple(value.shape))

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            several = self.values[source]  # type: ignore[index]
            self.values[node] = several[index] if isinstance(several, tuple) else None  # type: ignore[index]
            if source in self.reads and operator_name(source.target) not in ("unbind", "max", "min"):  # type: ignore[union-attr]
                self.reads[node] = self.reads[source]  # type: ignore[index]
            if source in self.vanishing:
                self.vanishing.add(node)
            if (source, index) in self.pointers:
                self.pointers[node] = self.pointers[source, index]
            return
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            self.values[node] = None  # sizes and assertions
            return
        op = Op(
            node,
            self.labels,
            self.values,
            source_line(node),
            self.pointers,
            self.constants.value,
            self.vanishing,
            self.written,
        )
        rule = RULES.get(operator_name(node.target))
        if rule is not None and all(n.meta.get("val") is not None for n in op.tensors):
            self._follow(op)
            known = len(self.labels.inexact)
            self.values[node] = rule(op)
            if len(self.labels.inexact) > known:
                self.inexact.add(node)
            if vanishes(op, self.vanishing):
                self.vanishing.add(node)
            self._count(op)
            return
        self.values[node] = None
        why = opaque.reason(node) or f"no rule for {op.where}"
        for read in node.all_input_nodes:
            self._freeze(read, why)
            self.labels.freeze(self.pointers.get(read), why)

    def _follow(self, op: Op) -> None:
        """Where positions go on as positions; whatever else computes with their numbers keeps them as they are."""
        name = operator_name(op.node.target)
        for node in op.tensors:
            target = self.pointers.get(node)
            if target is None or reads_positions(op, target.shape[1]):
                continue
            if name not in CARRIES or node is not op.tensors[0]:
                self.labels.freeze(target, f"positions in it are computed with in {op.where}")
            elif name == "sort":
                self.pointers[op.node, 0] = target
            else:
                self.pointers[op.node] = target

    def _freeze(self, node: fx.Node, why: str) -> None:
        for dims in each(self.values.get(node)):
            for dim in dims:
                self.labels.freeze(dim, why)

    def _count(self, op: Op) -> None:
        """Note MACs, which parameters are weights, and which batch norm follows them."""
        found = multiply(op, self.reads)
        if (read := carried(op, self.reads)) is not None:
            self.reads[op.node] = read
        self.multiplies += found
        for m in found:
            if m.weight:
                self._weigh(op, m)
                self.producers[op.node] = m.weight
        if operator_name(op.node.target) == "batch_norm":
            weight = self.producers.get(op.args["input"])
            scale = self.reads.get(op.args["weight"])
            if weight and scale and not self.weights[weight].norm:
                self.weights[weight] = replace(self.weights[weight], norm=scale.name)

    def _weigh(self, op: Op, m: Multiply) -> None:
        known = self.weights.get(m.weight)
        if known is not None:
            self.weights[m.weight] = replace(known, macs=known.macs + m.macs)
            return
        shape, name = self.tensors[m.weight].shape, operator_name(op.node.target)
        self.weights[m.weight] = Weight(m.weight, shape, name, m.out_dim, m.in_dim, m.macs)


def _canonical_names(model: nn.Module) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Every path of a tied tensor -> its first path; and the kind of each first path."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for path, tensor in named:
            aliases[path] = first.setdefault(id(tensor), path)
            kinds.setdefault(aliases[path], kind)
    return aliases, kinds
