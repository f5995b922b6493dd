"""Operators that sum over a dimension: convolutions, linear layers, matrix products, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from secateur.graph.labels import Dim
from secateur.graph.rules.base import Cut, Dims, Op, Rewrite, Rule, Value, sizes_of

KERNEL = "kernel position"  # never a channel: such axes are not worth a line in a report


def conv(op: Op) -> Value:
    """``conv{1,2,3}d``: weight (out, in/groups, *kernel), input (batch?, in, *space)."""
    return _convolve(op, out_dim=0)


def conv_transpose(op: Op) -> Value:
    """``conv_transpose{1,2,3}d``: weight (in, out/groups, *kernel)."""
    return _convolve(op, out_dim=1)


def _convolve(op: Op, out_dim: int) -> Value:
    x, w = op.dims("input"), op.dims("weight")
    space = len(w) - 2
    channel = len(x) - space - 1
    over = [d for d in range(space) if not _pointwise(op, d)]
    for d in over:
        op.labels.freeze(x[channel + 1 + d], f"spatial dimension of {op.where}")
    around: Dims = [None if d in over else x[channel + 1 + d] for d in range(space)]
    for kernel in w[2:]:
        op.labels.freeze(kernel, KERNEL)
    out = channels(op, x[channel], op.sizes("input")[channel], out_dim)
    return [*x[:channel], out, *around]


def channels(op: Op, x: Dim, n: int, out_dim: int = 0) -> Dim:
    """Tie a convolution's weight and bias to ``n`` input channels; the labels of its output channels."""
    w, groups, rows = op.dims("weight"), op.number("groups"), op.sizes("weight")[0]
    if groups == 1:
        op.labels.unite(x, w[1 - out_dim], op.where)
        out = w[out_dim]
    elif out_dim == 0:
        xs = op.labels.split(x, [groups, n // groups], op.where)
        op.labels.unite(xs[0], op.labels.split(w[0], [groups, rows // groups], op.where)[0], op.where)
        op.labels.call(xs[0] if n > groups else None, "groups")
        if n > groups:
            op.labels.unite(xs[1], w[1], op.where)
        out = w[0]
    else:
        op.labels.unite(x, w[0], op.where)
        by_group = op.labels.split(w[0], [groups, rows // groups], op.where)[0]
        out = op.labels.merge([by_group, w[1]], [groups, op.sizes("weight")[1]])
    if op.args["bias"] is not None:
        op.labels.unite(out, op.dims("bias")[0], op.where)
    return out


def _pointwise(op: Op, d: int) -> bool:
    """Whether every position of spatial dimension ``d`` is computed from itself alone."""

    def at(name: str, default: int) -> Any:
        value = op.args.get(name, default)
        return value[min(d, len(value) - 1)] if isinstance(value, (list, tuple)) and value else value

    plain = at("stride", 1) == 1 and at("padding", 0) in (0, "same", "valid") and at("output_padding", 0) == 0
    return plain and op.sizes("weight")[2 + d] == 1


def rewrite_groups(op: Op, cut: Cut) -> dict[str, Any]:
    groups, n = op.number("groups"), op.sizes("weight")[0]
    left = len(set((cut.kept(op.dims("weight")[0], n) // (n // groups)).tolist()))
    if left == groups:
        return {}
    asked = op.args["groups"]
    return {"groups": cut.scale(asked, left, groups) if isinstance(asked, fx.Node) else left}


def linear(op: Op) -> Value:
    """``linear``: weight (out, in); ``x @ weight.T + bias``."""
    x, w = op.dims("input"), op.dims("weight")
    op.labels.unite(x[-1], w[1], op.where)
    if op.args["bias"] is not None:
        op.labels.unite(w[0], op.dims("bias")[0], op.where)
    return [*x[:-1], w[0]]


def _product(op: Op, x: Dims, y: Dims, nx: tuple[int, ...], ny: tuple[int, ...]) -> Dims:
    if len(x) == 1 and len(y) == 1:
        op.labels.unite(x[0], y[0], op.where)
        return []
    if len(x) == 1:
        op.labels.unite(x[0], y[-2], op.where)
        return [*y[:-2], y[-1]]
    if len(y) == 1:
        op.labels.unite(x[-1], y[0], op.where)
        return x[:-1]
    op.labels.unite(x[-1], y[-2], op.where)
    batch = op.broadcast((x[:-2], nx[:-2]), (y[:-2], ny[:-2])) if len(x) > 2 or len(y) > 2 else []
    return [*batch, x[-2], y[-1]]


def _summed(op: Op, dim: Dim, factors: Sequence[fx.Node]) -> None:
    """A sum of products is exact where units that go are zero in either factor; otherwise removing is not zeroing."""
    if op.vanishing.isdisjoint(factors):
        op.labels.mark_inexact(dim)


def matmul(op: Op) -> Value:
    """``matmul``, ``bmm``, ``mm``, ``mv``: the last dimension of one meets the last but one of the other."""
    names = [n for n in ("self", "other", "mat2", "vec") if n in op.args]
    x, y = names
    _summed(op, op.dims(x)[-1], [op.args[x], op.args[y]])
    return _product(op, op.dims(x), op.dims(y), op.sizes(x), op.sizes(y))


def addmm(op: Op) -> Value:
    """``addmm``, ``baddbmm``: a product of two, plus a broadcast third."""
    x, y = [n for n in ("mat1", "mat2", "batch1", "batch2") if n in op.args]
    product = _product(op, op.dims(x), op.dims(y), op.sizes(x), op.sizes(y))
    return op.broadcast((product, op.out), (op.dims("self"), op.sizes("self")))


def terms(op: Op) -> tuple[list[list[str]], list[str]]:
    """An einsum's letters, per operand and of its output; dots become the numbers of the dimensions that they span."""
    equation = op.args["equation"].replace(" ", "").replace("...", ".")
    left, arrow, right = equation.partition("->")
    operands = []
    for letters, node in zip(left.split(","), op.args["tensors"], strict=True):
        span = len(sizes_of(node)) - len(letters.replace(".", ""))
        operands.append([t for c in letters for t in (map(str, range(-span, 0)) if c == "." else c)])
    if not arrow:  # letters that occur once, in alphabetical order, behind what the dots span
        every = [t for letters in operands for t in letters]
        return operands, sorted(
            {t for t in every if every.count(t) == 1 or t[0] == "-"}, key=lambda t: (t[0] != "-", t)
        )
    span = len(op.out) - len(right.replace(".", ""))
    return operands, [t for c in right for t in (map(str, range(-span, 0)) if c == "." else c)]


def einsum(op: Op) -> Value:
    """``einsum``: one letter is one dimension, wherever it stands; size 1 stretches."""
    operands, out = terms(op)
    found: dict[str, Dim] = {}
    for letters, node in zip(operands, op.args["tensors"], strict=True):
        for letter, dim, n in zip(letters, op.of(node), sizes_of(node), strict=True):
            if n > 1 and letter in found:
                op.labels.unite(found[letter], dim, op.where)
            if n > 1:
                found[letter] = dim if found.get(letter) is None else found[letter]
    for letter in found.keys() - set(out):
        with_it = [n for n, letters in zip(op.args["tensors"], operands, strict=True) if letter in letters]
        _summed(op, found[letter], with_it)
    return [found.get(letter) for letter in out]


def dot(op: Op) -> Value:
    """``dot``, ``vdot``: a sum over all of both."""
    x, y = (op.of(n) for n in op.tensors)
    op.labels.unite(x[0], y[0], op.where)
    op.labels.mark_inexact(x[0])
    return []


def outer(op: Op) -> Value:
    x, y = (op.of(n) for n in op.tensors)
    return [x[0], y[0]]


def bilinear(op: Op) -> Value:
    """``bilinear``: weight (out, in1, in2)."""
    x, y, w = op.dims("input1"), op.dims("input2"), op.dims("weight")
    op.labels.unite(x[-1], w[1], op.where)
    op.labels.unite(y[-1], w[2], op.where)
    if op.args["bias"] is not None:
        op.labels.unite(w[0], op.dims("bias")[0], op.where)
    batch = op.broadcast((x[:-1], op.sizes("input1")[:-1]), (y[:-1], op.sizes("input2")[:-1])) if len(x) > 1 else []
    return [*batch, w[0]]


def grouped_mm(op: Op) -> Value:
    """``grouped_mm``: rows of input (tokens, in), sorted by expert, meet their expert of weight (experts, in, out).

    ``offs`` (experts) says where each expert's rows end.
    """
    x, w, offsets = (op.of(n) for n in op.tensors[:3])
    op.labels.unite(x[-1], w[-2], op.where)
    op.labels.unite(w[0], offsets[0], op.where)
    op.labels.call(w[0], "experts")
    return [x[0], w[-1]]


def embedding(op: Op) -> Value:
    """``embedding``: weight (vocabulary, features), looked up by index."""
    w, indices = op.dims("weight"), op.args["indices"]
    _rows(op, w[0], indices)
    features: Dim = w[1]
    return [*op.of(indices), features]


def embedding_bag(op: Op) -> Value:
    """``embedding_bag``: bags of rows of weight (vocabulary, features), pooled; three more outputs of numbers."""
    w = op.dims("weight")
    _rows(op, w[0], op.args["indices"])
    others: list[Dims] = [[None] * v.dim() for v in op.node.meta["val"][1:]]
    return [None, w[1]], *others


def _rows(op: Op, rows: Dim, indices: Any) -> None:
    if indices in op.pointers:
        op.labels.unite(rows, op.pointers[indices], op.where)
    else:
        op.labels.call(rows, "vocabulary")
        op.labels.freeze(rows, f"vocabulary: rows are looked up by index in {op.where}")


_CONV = {f"conv{n}d": conv for n in (1, 2, 3)}
_TRANSPOSED = dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv_transpose)

RULES: dict[str, Rule] = {
    **_CONV,
    **_TRANSPOSED,
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    **dict.fromkeys(("dot", "vdot"), dot),
    **dict.fromkeys(("outer", "ger"), outer),
    "bilinear": bilinear,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback"), grouped_mm),
    "embedding": embedding,
    **dict.fromkeys(("embedding_bag", "_embedding_bag"), embedding_bag),
}
REWRITES: dict[str, Rewrite] = dict.fromkeys((*_CONV, *_TRANSPOSED), rewrite_groups)
