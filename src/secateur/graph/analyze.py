"""``analyze``: run the rules over a captured program and gather what they found into axes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from secateur.errors import TraceError
from secateur.graph.axes import gather
from secateur.graph.graph import Graph
from secateur.graph.labels import Labels
from secateur.graph.program import Multiply, Program, Tensors, multiply, outputs
from secateur.graph.rules import RULES, Op, operator_name
from secateur.graph.rules.base import Value, each
from secateur.graph.trace import capture, source_line
from secateur.graph.types import Weight


def analyze(model: nn.Module, inputs: Any, *, dynamic_batch: bool = False) -> Graph:
    """Find what can be removed from a model, and what can only be removed together.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword). The model is captured with
    ``torch.export`` in evaluation mode and is not changed. With ``dynamic_batch`` the captured program is not
    tied to the example's batch size.

    Raises TraceError where the model fails on its inputs or cannot be captured.
    """
    module = capture(model, inputs, dynamic_batch)
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters, so nothing can be pruned")
    walk = _Walk(module, model)
    for node in module.graph.nodes:
        walk.visit(node)
    program = Program(module, walk.labels, walk.values, walk.tensors, walk.aliases, tuple(walk.multiplies))
    return Graph(gather(program, walk.weights), walk.weights, program, inputs)


@dataclass
class _Walk:
    """The state of one pass over the program, in order."""

    module: fx.GraphModule
    model: nn.Module

    def __post_init__(self) -> None:
        self.labels = Labels()
        self.values: dict[fx.Node, Value] = {}
        self.tensors: dict[str, Tensors] = {}
        self.weights: dict[str, Weight] = {}
        self.multiplies: list[Multiply] = []
        self.names: dict[fx.Node, str] = {}  # of nodes that read a parameter, as it is
        self.producers: dict[fx.Node, str] = {}  # node -> weight whose outputs it holds
        self.aliases, self.kinds = _canonical_names(self.model)

    def visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._read(node)
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "output":
            for i, out in enumerate(outputs(node)):
                self._freeze(out, f"model output {i}: its shape is promised to the caller")
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
            self.names[node] = name

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            several = self.values[source]  # type: ignore[index]
            self.values[node] = several[index] if isinstance(several, tuple) else None  # type: ignore[index]
            return
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            self.values[node] = None  # sizes and assertions
            return
        op = Op(node, self.labels, self.values, source_line(node))
        rule = RULES.get(operator_name(node.target))
        if rule is not None and all(n.meta.get("val") is not None for n in op.tensors):
            self.values[node] = rule(op)
            self._count(op)
            return
        self.values[node] = None
        for read in node.all_input_nodes:
            self._freeze(read, f"no rule for {op.where}")

    def _freeze(self, node: fx.Node, why: str) -> None:
        for dims in each(self.values.get(node)):
            for dim in dims:
                self.labels.freeze(dim, why)

    def _count(self, op: Op) -> None:
        """Note MACs, which parameters are weights, and which batch norm follows them."""
        found = multiply(op, self.names)
        self.multiplies += found
        for m in found:
            if m.weight:
                self._weigh(op, m)
                self.producers[op.node] = m.weight
        if operator_name(op.node.target) == "batch_norm":
            weight = self.producers.get(op.args["input"])
            scale = self.names.get(op.args["weight"])
            if weight and scale and not self.weights[weight].norm:
                self.weights[weight] = _replace_norm(self.weights[weight], scale)

    def _weigh(self, op: Op, m: Multiply) -> None:
        macs = 1
        for _, size in m.factors:
            macs *= size
        known = self.weights.get(m.weight)
        if known is not None:
            self.weights[m.weight] = Weight(
                known.name, known.shape, known.op, known.out_dim, known.in_dim, known.macs + macs, known.norm
            )
            return
        name, shape = operator_name(op.node.target), self.tensors[m.weight].shape
        first = "transpose" in name or name in ("matmul", "mm", "addmm", "bmm", "baddbmm")
        out_dim, in_dim = (len(shape) - 1, len(shape) - 2) if first and "conv" not in name else (0, 1)
        if "transpose" in name:
            out_dim, in_dim = 1, 0
        if len(shape) > 1:
            self.weights[m.weight] = Weight(m.weight, shape, name, out_dim, in_dim, macs)


def _replace_norm(weight: Weight, norm: str) -> Weight:
    return Weight(weight.name, weight.shape, weight.op, weight.out_dim, weight.in_dim, weight.macs, norm)


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
