"""Which operators multiply, how much, and with which parameters: MACs, and what counts as a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from secateur.graph.labels import Dim
from secateur.graph.rules.base import Op, operator_name, sizes_of
from secateur.graph.rules.contraction import terms
from secateur.graph.rules.recurrent import GATES, per_layer

Factors = list[tuple[Dim, int]]


@dataclass(frozen=True, eq=False)
class Multiply:
    """One product of an operator: its MACs are the product of the sizes of these dimensions."""

    node: str
    weight: str  # the parameter it multiplies with, "" where both factors are activations
    factors: tuple[tuple[Dim, int], ...]
    out_dim: int = 0  # of the weight: its dimension of outputs, and of inputs
    in_dim: int = 1
    along: int = -1  # of the operator's output: the dimension that the weight's outputs are on

    @property
    def macs(self) -> int:
        """On the example inputs."""
        macs = 1
        for _, size in self.factors:
            macs *= size
        return macs


@dataclass(frozen=True)
class Read:
    """A node that is a parameter, or a part of it laid out differently: which dimension each of its dimensions is.

    No ``dims`` where a view has merged them; a later view to the parameter's own ``shape`` brings them back.
    """

    name: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]


_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as"}
_SAME = {"to", "_to_copy", "detach", "contiguous", "clone", "alias", "lift_fresh_copy", "slice", "narrow"}

_COMPUTED = {"mul", "div", "add", "sub", "where", "masked_fill", "batch_norm", "_weight_norm", "tanh", "sigmoid", "abs"}
_COMPUTED |= {"fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"}
"""Operators that make a weight out of a parameter element by element: a mask, a norm, a grid."""


def carried(op: Op, reads: Mapping[fx.Node, Read]) -> Read | None:
    """What the operator's output still is of a parameter."""
    name = operator_name(op.node.target)
    if name in _COMPUTED:
        whole = [n for n in op.tensors if n in reads and sizes_of(n) == op.out]
        return reads[whole[0]] if whole else None
    source = reads.get(op.tensors[0]) if op.tensors else None
    if source is None:
        return None
    if name in _VIEWS:
        return replace(source, dims=tuple(range(len(op.out))) if op.out == source.shape else ())
    if name in _SAME:
        return source
    if not (dims := list(source.dims)):
        return None
    if name in ("t", "numpy_T", "mT"):
        return replace(source, dims=tuple(dims[:-2] + dims[-2:][::-1]))
    if name == "transpose":
        i, j = op.args["dim0"], op.args["dim1"]
        dims[i], dims[j] = dims[j], dims[i]
    elif name == "permute":
        dims = [dims[d] for d in op.args["dims"]]
    elif name == "select":
        dims.pop(op.dim())
    elif name == "unsqueeze":
        dims.insert(op.args["dim"] % (len(dims) + 1), -1)
    else:
        return None
    return replace(source, dims=tuple(dims))


def multiply(op: Op, reads: Mapping[fx.Node, Read]) -> list[Multiply]:
    """The products of one operator: output size x length of the sum. Operators without products give none."""
    name = operator_name(op.node.target)
    if op.values.get(op.node) is None:
        return []
    if name in GATES and "batch_first" in op.args:
        return _recurrent(op, reads)
    if not isinstance(op.node.meta.get("val"), Tensor):
        return []
    if name == "scaled_dot_product_attention":
        q, out = _pairs(op, op.args["query"]), _pairs(op, op.node)
        tokens = (op.dims("key")[-2], op.sizes("key")[-2])
        return [Multiply(op.node.name, "", (*q, tokens)), Multiply(op.node.name, "", (*out, tokens))]
    if name == "einsum":
        return [_einsum(op, reads)]
    found = _roles(op, name, reads)
    return [found] if found is not None else []


def _pairs(op: Op, node: fx.Node) -> Factors:
    return list(zip(op.of(node), sizes_of(node), strict=True))


def _roles(op: Op, name: str, reads: Mapping[fx.Node, Read]) -> Multiply | None:
    """The operator's weight (or second factor), its dimensions of outputs and inputs, and what is summed over."""
    out = _pairs(op, op.node)
    if (name.startswith("conv") or name == "torchvision::deform_conv2d") and "weight" in op.args:
        weight = op.args["weight"]
        w = list(zip(op.dims("weight"), op.sizes("weight"), strict=True))
        channel = 1 - len(w)
        if "transpose" in name:  # every input value meets out/groups x kernel weights
            x = list(zip(op.dims("input"), op.sizes("input"), strict=True))
            return _product(op, weight, 1, 0, [*x, *w[1:]], reads, channel)
        return _product(op, weight, 0, 1, [*out, *w[1:]], reads, channel)
    if name == "linear":
        return _product(op, op.args["weight"], 0, 1, [*out, (op.dims("weight")[1], op.sizes("weight")[1])], reads)
    if name == "bilinear":
        sides = [(op.dims("weight")[d], op.sizes("weight")[d]) for d in (1, 2)]
        return _product(op, op.args["weight"], 0, 1, [*out, *sides], reads)
    if name in ("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback"):
        left, right = op.tensors[:2]
    elif name in ("matmul", "bmm", "mm", "mv", "addmm", "baddbmm"):
        left = op.args[next(n for n in ("mat1", "batch1", "self") if n in op.args)]
        right = op.args[next(n for n in ("other", "mat2", "vec", "batch2") if n in op.args)]
    else:
        return None
    summed = _pairs(op, left)[-1]
    if left in reads and right not in reads:
        return _product(op, left, -2, -1, [*out, summed], reads, -2 if len(op.of(right)) > 1 else -1)
    return _product(op, right, -1, -2, [*out, summed], reads)


def _product(
    op: Op,
    weight: fx.Node,
    out_dim: int,
    in_dim: int,
    factors: Factors,
    reads: Mapping[fx.Node, Read],
    along: int = -1,
) -> Multiply:
    read = reads.get(weight)
    if read is None or len(read.dims) < 2:
        return Multiply(op.node.name, "", tuple(factors))
    return Multiply(op.node.name, read.name, tuple(factors), read.dims[out_dim], read.dims[in_dim], along)


def _einsum(op: Op, reads: Mapping[fx.Node, Read]) -> Multiply:
    """Every combination of all letters is one product."""
    operands, out = terms(op)
    factors: dict[str, tuple[Dim, int]] = {}
    weight, sides = "", (0, 1, -1)
    for letters, node in zip(operands, op.args["tensors"], strict=True):
        for letter, pair in zip(letters, _pairs(op, node), strict=True):
            if letter not in factors or pair[1] > 1:
                factors[letter] = pair
        read = reads.get(node)
        read = read if read and read.dims else None
        kept = [(d, out.index(t)) for t, d in zip(letters, read.dims, strict=True) if t in out] if read else []
        summed = [d for letter, d in zip(letters, read.dims, strict=True) if letter not in out] if read else []
        if read and kept and summed:
            weight, sides = read.name, (kept[-1][0], summed[0], kept[-1][1])
    return Multiply(op.node.name, weight, tuple(factors.values()), *sides)


def _recurrent(op: Op, reads: Mapping[fx.Node, Read]) -> list[Multiply]:
    """Every step multiplies with every matrix once."""
    steps = list(zip(op.dims("input")[:-1], op.sizes("input")[:-1], strict=True))
    matrices = [p for group in per_layer(op) for p in group if len(p.meta["val"].shape) == 2]
    return [_product(op, p, 0, 1, [*steps, *_pairs(op, p)], reads) for p in matrices]
