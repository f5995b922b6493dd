"""Where a weight stands in the program: what it multiplies, where its outputs go, and which bias can be moved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from secateur.graph.graph import Graph
from secateur.graph.program import Program
from secateur.graph.rules import operator_name

Read = Callable[[fx.Node], Tensor]
"""The value of a node."""

_OPERANDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), ("input", "weight", "bias")),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
}
"""The names of input, weight and bias of the operators whose weights can be refitted."""

_SAME = frozenset(["alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "alpha_dropout"])
"""Operators that hand on what they get, in evaluation mode."""


@dataclass(frozen=True, eq=False)
class Place:
    """A weight that is used once. ``bias`` is the tensor that a constant added to the outputs can go into: a bias, or
    the running mean of the batch norm that follows ("" where there is neither, and then outputs get no constant).

    ``added`` is what the operator adds where that is not ``bias``: a bias that others use too, or no bias. ``norm`` is
    that batch norm. ``other`` is what the outputs are added to, as in a residual block, where they are.
    """

    node: fx.Node
    weight: str
    input: fx.Node
    bias: str
    added: fx.Node | None
    norm: fx.Node | None
    other: fx.Node | None

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, outputs of a group, inputs): for convolutions inputs are channels x kernel."""
        if operator_name(self.node.target) in ("addmm", "mm", "matmul"):
            weight = weight.T
        return weight.flatten(1).view(self.groups, weight.shape[0] // self.groups, -1)

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``matrix``, in the shape and dtype of ``like``."""
        flat = matrix.flatten(0, 1).to(like.dtype)
        if operator_name(self.node.target) in ("addmm", "mm", "matmul"):
            flat = flat.T
        return flat.reshape(like.shape)

    @property
    def own_bias(self) -> bool:
        """Whether ``bias`` is the operator's own, not a running mean."""
        name = _OPERANDS[operator_name(self.node.target)][2]
        return self.added is None and bool(name) and _argument(self.node, name, None) is not None

    def along_outputs(self, values: Tensor) -> Tensor:
        """Values whose last dimension is the outputs, in a shape that broadcasts over the operator's output."""
        return values.view(*values.shape, *[1] * len(self._kernel))

    @property
    def _kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; none elsewhere."""
        return _kernel(self.node)

    @property
    def groups(self) -> int:
        return int(_argument(self.node, "groups", 1))

    def rows(self, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (groups, rows, inputs) and outputs (groups, rows, outputs), of about ``most`` rows at random."""
        if not operator_name(self.node.target).startswith("conv"):
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            chosen = _some(len(x), most / max(len(x), 1), generator).to(x.device)
            return x[chosen][None], y[chosen][None]
        one = x.dim() == 1 + len(self._kernel)  # without a batch dimension
        return self._windows(x[None] if one else x, y[None] if one else y, most, generator)

    def _windows(self, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What each output position of a convolution sees. Whole lines of positions are chosen, not single ones."""
        spatial = y.dim() - 2
        kernel = self._kernel
        stride, dilation = (_each(_argument(self.node, name, 1), spatial) for name in ("stride", "dilation"))
        x = F.pad(x, _padding(_argument(self.node, "padding", 0), kernel, dilation))
        part = (most / (len(y) * math.prod(y.shape[2:]))) ** (1 / spatial)
        for d in range(spatial):
            lines = _some(y.shape[2 + d], part, generator).to(x.device)
            y = y.index_select(2 + d, lines)
            taps = torch.arange(kernel[d], device=x.device) * dilation[d]
            seen = (lines[:, None] * stride[d] + taps).flatten()
            x = _split(x.index_select(2 + 2 * d, seen), 2 + 2 * d, len(lines))
        places, taps_at = [2 + 2 * d for d in range(spatial)], [3 + 2 * d for d in range(spatial)]
        x = _split(x, 1, self.groups).permute(1, 0, *(p + 1 for p in places), 2, *(t + 1 for t in taps_at))
        y = _split(y, 1, self.groups).permute(1, 0, *range(3, 3 + spatial), 2)
        return x.flatten(2 + spatial).flatten(1, 1 + spatial), y.flatten(1, 1 + spatial)

    def scale(self, read: Read) -> Tensor:
        """What the norm multiplies outputs by on their way to the sum, in a shape that broadcasts over them."""
        if self.norm is None:
            return torch.ones(())
        gamma, variance = self.norm.args[1], self.norm.args[4]
        assert isinstance(variance, fx.Node)
        scale = (read(variance) + float(_argument(self.norm, "eps", 1e-5))).rsqrt()
        return self.along_outputs(read(gamma) * scale if isinstance(gamma, fx.Node) else scale)


def places(graph: Graph) -> dict[fx.Node, Place]:
    """The weights of a program that can be refitted, by the operator that uses them."""
    program, found = graph.program, {}
    held = {n: _name(program, n) for n in program.module.graph.nodes if n.op == "get_attr"}
    uses = Counter(name for node, name in held.items() for _ in node.users)
    for node in program.module.graph.nodes:
        operands = _OPERANDS.get(operator_name(node.target)) if node.op == "call_function" else None
        if operands is None:
            continue
        read, weight, bias = (_argument(node, name, None) if name else None for name in operands)
        name = held.get(weight, "")
        scaled = {"alpha", "beta"} & node.kwargs.keys()
        if name not in graph.weights or uses[name] != 1 or scaled or not isinstance(read, fx.Node):
            continue
        if operator_name(node.target) == "matmul" and len(graph.weights[name].shape) != 2:
            continue
        norm, other = _onward(node)
        mean: Any = norm.args[3] if norm is not None else None
        constant = held.get(bias if bias is not None else mean, "")
        constant = constant if uses[constant] == 1 and len(program.tensors[constant].shape) == 1 else ""
        added = bias if bias is not None and constant != held.get(bias) else None
        found[node] = Place(node, name, read, constant, added, norm, other)
    return found


def _onward(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The batch norm that alone reads the node, and what the sum that alone reads that adds to it."""
    norm, here = None, node
    while len(here.users) == 1:
        user = next(iter(here.users))
        name = operator_name(user.target) if user.op == "call_function" else ""
        if name == "batch_norm" and norm is None and user.args[0] is here and _shifts(user, node):
            norm = user
        elif name == "add":
            others = [a for a in user.args[:2] if a is not here]
            same = len(others) == 1 and isinstance(others[0], fx.Node) and not user.kwargs
            return norm, others[0] if same and _shape(others[0]) == _shape(here) else None  # type: ignore[return-value]
        elif name not in _SAME:
            break
        here = user
    return norm, None


def _shifts(norm: fx.Node, node: fx.Node) -> bool:
    """Whether a batch norm takes its running statistics, and the node's outputs for its channels."""
    value = node.meta["val"]
    channels = value.dim() - 1 - len(_kernel(node))
    return isinstance(norm.args[4], fx.Node) and not _argument(norm, "training", False) and channels == 1


def _kernel(node: fx.Node) -> tuple[int, ...]:
    convolves = operator_name(node.target).startswith("conv")
    return tuple(node.args[1].meta["val"].shape[2:]) if convolves else ()  # type: ignore[union-attr]


def _shape(node: Any) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape)) if isinstance(node.meta.get("val"), Tensor) else ()


def _name(program: Program, node: fx.Node) -> str:
    return program.aliases.get(str(node.target), str(node.target))


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    named = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**named, **node.kwargs}.get(name, default)


def _each(value: Any, number: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * number if len(sizes) == 1 else sizes


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """As ``F.pad`` takes it: both sides of every dimension, the last one first."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        both = [(t // 2, t - t // 2) for t in total]
    else:
        both = [(p, p) for p in _each(padding, len(kernel))]
    return [side for pair in reversed(both) for side in pair]


def _split(tensor: Tensor, dim: int, parts: int) -> Tensor:
    """The dimension as two, of which the first has ``parts``."""
    return tensor.reshape(*tensor.shape[:dim], parts, tensor.shape[dim] // parts, *tensor.shape[dim + 1 :])


def _some(size: int, part: float, generator: torch.Generator) -> Tensor:
    """Numbers below ``size``, in order: all of them, or that part at random, one at least."""
    if part >= 1:
        return torch.arange(size)
    return torch.randperm(size, generator=generator)[: max(1, math.ceil(size * part))].sort().values
