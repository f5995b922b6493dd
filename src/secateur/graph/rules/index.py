"""Operators that look values up by position, and those that produce positions: index, gather, scatter, topk.

Three kinds of positions are told apart. Fixed ones (a buffer, a constant) are index maps, and exact. *Pointers*, such
as the expert numbers that ``topk`` gives, are positions in a dimension whose labels are known: what they look up is
united with that dimension, and numbers stay right because they are computed anew over what is left. Any other
positions freeze the dimension that they look into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from secateur.graph.labels import Dim
from secateur.graph.rules.base import TARGET, Cut, Dims, Op, Rewrite, Rule, Value, operator_name, sizes_of

_CARRIED = 1 << 22  # fixed positions at most, that are followed one by one


def _fixed(op: Op, node: Any, dim: Dim) -> torch.Tensor | None:
    """Fixed positions into a labelled dimension, counted from the front; for writing, only those in a row."""
    sizes = sizes_of(node)
    if dim is None or not sizes or math.prod(sizes) > _CARRIED or node in op.pointers:
        return None
    if len(sizes) > 1 and operator_name(op.node.target) == "index_put":
        return None
    value = op.constant(node)
    return None if value is None or value.dtype == torch.bool else value.long() % dim.shape[1]


def _whole(op: Op, positions: fx.Node) -> None:
    """Fixed positions are renumbered, not sliced."""
    for dim in op.of(positions):
        op.labels.freeze(dim, f"holds positions for {op.where}")


def _look_up(op: Op, dim: Dim, positions: fx.Node) -> None:
    """``dim`` is looked into at ``positions``: united with what they point into, or frozen."""
    if positions in op.pointers:
        op.labels.unite(dim, op.pointers[positions], op.where)
    else:
        op.labels.freeze(dim, f"looked up by position in {op.where}")


def index(op: Op) -> Value:
    """``index`` (``x[:, i]``), and ``index_put``, which writes where ``index`` reads."""
    x, sizes = op.dims("self"), op.sizes("self")
    at, result = _selected(op, x, sizes)
    name = operator_name(op.node.target)
    if name == "index":
        return result
    values = op.args["values"]
    shape = _result_shape(op, sizes)
    if len(sizes_of(values)):
        op.broadcast((result, shape), (op.of(values), sizes_of(values)))
    else:
        for d in at:
            op.labels.freeze(x[d], f"written by position in {op.where}")
    return op.dims("self")


def _selected(op: Op, x: Dims, sizes: Sequence[int]) -> tuple[list[int], Dims]:
    """The dimensions that are looked into, and the labels of ``x[indices]``."""
    taken: list[int] = []
    positions: list[tuple[int, fx.Node]] = []
    d = 0
    for node in op.args["indices"]:
        if node is None:
            d += 1
            continue
        mask = node.meta["val"].dtype in (torch.bool, torch.uint8)
        span = len(sizes_of(node)) if mask else 1
        for k in range(d, d + span):
            if mask:
                op.labels.freeze(x[k], f"selected by a mask in {op.where}")
        taken += range(d, d + span)
        positions += [] if mask else [(d, node)]
        d += span
    if len(positions) == 1 and len(taken) == 1 and (fixed := _fixed(op, positions[0][1], x[taken[0]])) is not None:
        dim = x[taken[0]]
        assert dim is not None
        _whole(op, positions[0][1])
        op.labels.mark_part(dim[:, fixed.flatten().numpy()])
        new = op.labels.split(dim[:, fixed.flatten().numpy()], tuple(fixed.shape), op.where)
    else:
        for k, node in positions:
            _look_up(op, x[k], node)
        tensors = [node for _, node in positions]
        new = op.broadcast(*[(op.of(n), sizes_of(n)) for n in tensors]) if tensors else [None]
        if tensors and len(taken) > len(tensors) and not new:
            new = [None]
    start = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    rest: Dims = [dim for k, dim in enumerate(x) if k not in taken]
    return taken, [*rest[:start], *new, *rest[start:]]


def _result_shape(op: Op, sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of ``x[indices]``, read off the values written there where data decides."""
    nodes = [n for n in op.args["indices"] if n is not None]
    masks = [n for n in nodes if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    if masks:
        spans = sum(len(sizes_of(n)) for n in masks)
        values = sizes_of(op.args["values"])
        start = next(k for k, n in enumerate(op.args["indices"]) if n is not None)
        count = values[start] if len(values) > start else 1
        return (*sizes[:start], count, *sizes[start + spans :])
    looked = [k for k, n in enumerate(op.args["indices"]) if n is not None]
    shape = np.broadcast_shapes(*[sizes_of(n) for n in nodes])
    start = looked[0] if looked == list(range(looked[0], looked[-1] + 1)) else 0
    rest = [n for k, n in enumerate(sizes) if k not in looked]
    return (*rest[:start], *shape, *rest[start:])


def rewrite_index(op: Op, cut: Cut) -> dict[str, Any]:
    """Fixed positions are renumbered over what is left."""
    nodes = [(k, n) for k, n in enumerate(op.args["indices"]) if n is not None]
    if len(nodes) != 1:
        return {}
    d, node = nodes[0]
    x = op.dims("self")
    fixed = _fixed(op, node, x[d])
    if fixed is None:
        return {}
    dim = x[d]
    assert dim is not None
    written = operator_name(op.node.target) == "index_put"
    out = [dim[:, fixed.numpy()]] if written else op.of(op.node)[d : d + fixed.ndim]
    new = _renumbered(cut, dim, out, fixed)
    return {"indices": [*op.args["indices"][:d], cut.constant(new), *op.args["indices"][d + 1 :]]}


def _renumbered(cut: Cut, source: Dim, out: Sequence[Dim], fixed: torch.Tensor) -> torch.Tensor:
    assert source is not None
    kept = cut.kept(source, source.shape[1])
    grid = np.ix_(*[cut.kept(dim, n) for dim, n in zip(out, fixed.shape, strict=True)])
    return torch.from_numpy(np.searchsorted(kept, fixed.numpy()[grid] if fixed.ndim else fixed.numpy()))


def index_select(op: Op) -> Value:
    x, d = op.dims("self"), op.dim()
    node = op.args["index"]
    fixed = _fixed(op, node, x[d])
    if fixed is not None:
        dim = x[d]
        assert dim is not None
        _whole(op, node)
        x[d] = dim[:, fixed.numpy()]
        op.labels.mark_part(x[d])
    else:
        _look_up(op, x[d], node)
        x[d] = op.of(node)[0]
    return x


def rewrite_index_select(op: Op, cut: Cut) -> dict[str, Any]:
    x, d = op.dims("self"), op.dim()
    fixed = _fixed(op, op.args["index"], x[d])
    if fixed is None:
        return {}
    return {"index": cut.constant(_renumbered(cut, x[d], op.of(op.node)[d : d + 1], fixed))}


def gather(op: Op) -> Value:
    """``gather``, ``take_along_dim``: index has the output's shape; other dimensions are walked side by side."""
    x, d, node = op.dims("self"), op.dim(), op.args["index" if "index" in op.args else "indices"]
    _look_up(op, x[d], node)
    return _side_by_side(op, x, op.sizes("self"), op.of(node), sizes_of(node), d)


def _side_by_side(op: Op, x: Dims, nx: Sequence[int], y: Dims, ny: Sequence[int], d: int) -> Dims:
    """Unite the dimensions of two tensors except ``d``; where one is cut off, both stay whole. Labels of ``y``."""
    out: Dims = []
    for k, (a, b) in enumerate(zip(x, y, strict=True)):
        if k == d:
            out.append(b)
        elif nx[k] == ny[k]:
            op.labels.unite(a, b, op.where)
            out.append(b)
        else:
            op.labels.freeze(a, f"only a part is looked up in {op.where}")
            op.labels.freeze(b, f"only a part is looked up in {op.where}")
            out.append(None)
    return out


def scatter(op: Op) -> Value:
    """``scatter``, ``scatter_add``, ``scatter_reduce``: index and source lie side by side with the target."""
    x, d, node = op.dims("self"), op.dim(), op.args["index"]
    _look_up(op, x[d], node)
    _side_by_side(op, x, op.sizes("self"), op.of(node), sizes_of(node), d)
    source = op.args.get("src")
    if isinstance(source, fx.Node) and len(sizes_of(source)):
        _side_by_side(op, op.of(node), sizes_of(node), op.of(source), sizes_of(source), -1)
    return op.dims("self")


def index_add(op: Op) -> Value:
    """``index_add``, ``index_copy``, ``index_fill``: slices of one dimension are written by position."""
    x, d, node = op.dims("self"), op.dim(), op.args["index"]
    _look_up(op, x[d], node)
    source = op.args.get("source")
    if isinstance(source, fx.Node) and len(sizes_of(source)) == len(x):
        y = op.of(source)
        op.labels.freeze(y[d], f"written by position in {op.where}")
        for k, (a, b) in enumerate(zip(x, y, strict=True)):
            if k != d:
                op.labels.unite(a, b, op.where)
    return op.dims("self")


def topk(op: Op) -> Value:
    """The k best of a dimension: the choice depends on what is left, which must be at least k."""
    x, d = op.dims("self"), op.dim()
    op.labels.mark_inexact(x[d])
    op.labels.keep_at_least(x[d], int(op.args["k"]))
    op.pointers[op.node, 1] = x[d]
    out: Dims = [*x[:d], None, *x[d + 1 :]]
    return out, out


def sort(op: Op) -> Value:
    """``sort``, ``argsort``: after it, positions of the dimension mean nothing, so it must stay whole."""
    x, d = op.dims("self"), op.dim()
    op.labels.freeze(x[d], f"sorted in {op.where}")
    x[d] = None
    return x if operator_name(op.node.target) == "argsort" else (x, list(x))


def best(op: Op) -> Value:
    """``argmax``, ``argmin`` and ``max``, ``min``, ``median`` over a dimension give positions in it."""
    if "other" in op.args:
        inputs = [op.args["self"], op.args["other"]]
        return op.broadcast(*[(op.of(n), sizes_of(n)) for n in inputs])
    x = op.dims("self")
    if op.args.get("dim") is None:
        for dim in x:
            op.labels.mark_inexact(dim)
            if operator_name(op.node.target).startswith("arg"):
                op.labels.freeze(dim, f"counted through in {op.where}")
        return [] if not op.args.get("keepdim") else [None] * len(x)
    d = op.dim()
    op.labels.mark_inexact(x[d])
    out = [*x[:d], *([None] if op.args.get("keepdim") else []), *x[d + 1 :]]
    if operator_name(op.node.target).startswith("arg"):
        op.pointers[op.node] = x[d]
        return out
    op.pointers[op.node, 1] = x[d]
    return out, list(out)


def counted(op: Op) -> Value:
    """``one_hot``, ``histc``, ``bincount``: an entry per number; of pointers, one per index of what they point into."""
    source = op.tensors[0]
    target, n = op.pointers.get(source), op.out[-1]
    fits = target is not None and target.shape[1] == n
    if target is not None and not fits:
        op.labels.freeze(target, f"counted into {n} numbers in {op.where}")
    here = op.of(source) if operator_name(op.node.target) == "one_hot" else []
    return [*here, target if fits else None]


def rewrite_counted(op: Op, cut: Cut) -> dict[str, Any]:
    dim, n = op.of(op.node)[-1], op.out[-1]
    kept = len(cut.kept(dim, n))
    return {
        "one_hot": {"num_classes": kept},
        "histc": {"bins": kept, "max": kept - 1},
        "bincount": {"minlength": kept},
    }[operator_name(op.node.target)]


def roll(op: Op) -> Value:
    """Rolled by a fixed distance: an index map."""
    x, sizes = op.dims("self"), op.sizes("self")
    if not op.args["dims"]:
        for dim in x:
            op.labels.freeze(dim, f"flattened and rolled in {op.where}")
        return [None] * len(x)
    for shift, d in zip(op.args["shifts"], op.args["dims"], strict=True):
        dim = x[d]
        if isinstance(shift, int):
            x[d] = None if dim is None else np.roll(dim, shift % sizes[d], axis=1)
        else:
            op.labels.freeze(dim, f"rolled by a distance that depends on sizes in {op.where}")
            x[d] = None
    return x


def channel_shuffle(op: Op) -> Value:
    """(groups, members) become (members, groups): an index map."""
    x, n, groups = op.dims("self"), op.sizes("self")[1], int(op.args["groups"])
    dim = x[1]
    if dim is not None:
        x[1] = dim[:, np.arange(n).reshape(groups, -1).T.reshape(-1)]
    return x


def rewrite_map(op: Op, cut: Cut) -> dict[str, Any]:
    """``roll`` and ``channel_shuffle`` as what they are over the indices that are left."""
    x, sizes, name = op.dims("self"), op.sizes("self"), operator_name(op.node.target)
    if name == "roll":
        changed = [(int(s), d % len(x)) for s, d in zip(op.args["shifts"], op.args["dims"], strict=True)]
        changed = [(s, d) for s, d in changed if len(cut.kept(x[d], sizes[d])) < sizes[d]]
        if len(changed) != 1 or len(op.args["dims"]) != 1:
            return {}
        ((shift, d),) = changed
        order = np.roll(np.arange(sizes[d]), shift % sizes[d])
    else:
        d = 1
        order = np.arange(sizes[d]).reshape(int(op.args["groups"]), -1).T.reshape(-1)
    kept = cut.kept(x[d], sizes[d])
    positions = np.searchsorted(kept, order[np.isin(order, kept)])
    return {TARGET: torch.ops.aten.index_select.default, "dim": d, "index": cut.constant(torch.from_numpy(positions))}


RULES: dict[str, Rule] = {
    **dict.fromkeys(("index", "index_put"), index),
    "index_select": index_select,
    **dict.fromkeys(("gather", "take_along_dim"), gather),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_add", "index_copy", "index_fill"), index_add),
    "topk": topk,
    **dict.fromkeys(("sort", "argsort"), sort),
    **dict.fromkeys(("argmax", "argmin", "max", "min", "median"), best),
    **dict.fromkeys(("one_hot", "histc", "bincount"), counted),
    "roll": roll,
    "channel_shuffle": channel_shuffle,
}
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(("index", "index_put"), rewrite_index),
    "index_select": rewrite_index_select,
    **dict.fromkeys(("one_hot", "histc", "bincount"), rewrite_counted),
    **dict.fromkeys(("roll", "channel_shuffle"), rewrite_map),
}

_LAID_OUT = (
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand slice select permute transpose index sort"
)
CARRIES = {*_LAID_OUT.split(), "to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "clamp"}
"""Operators whose output holds the same positions as their first input."""

_READS = {
    "index_put",
    "index_select",
    "gather",
    "take_along_dim",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
}
_READS |= {"index_copy", "index_fill", "one_hot", "histc", "bincount", "embedding", "_assert_tensor_metadata"}


def reads_positions(op: Op, size: int) -> bool:
    """Whether the operator knows what to do with positions in a dimension of ``size``.

    Besides what looks up by them, that is a comparison that they always pass: whether they are within the dimension.
    """
    name, other = operator_name(op.node.target), op.args.get("other")
    if name == "index":
        return op.node.args[0] not in op.pointers
    return name in _READS or (name in ("ge", "lt") and isinstance(other, (int, float)) and other >= size)
