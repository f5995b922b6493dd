"""Operators that select and join parts of dimensions: cat, split, slice, select, pad."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from secateur.graph.labels import concatenate
from secateur.graph.rules.base import TARGET, Cut, Dims, Op, Rewrite, Rule, Value, operator_name, size, sizes_of


def cat(op: Op) -> Value:
    parts = [n for n in op.args["tensors"] if sizes_of(n) != (0,)]  # legacy: empty tensors are skipped
    dims = [op.of(n) for n in parts]
    d = int(op.args["dim"]) % len(dims[0])
    joined = concatenate([x[d] for x in dims], [sizes_of(n)[d] for n in parts])
    return [joined if k == d else _common(op, [x[k] for x in dims]) for k in range(len(dims[0]))]


def stack(op: Op) -> Value:
    parts = op.args["tensors"]
    dims = [op.of(n) for n in parts]
    out: Dims = [_common(op, [x[k] for x in dims]) for k in range(len(dims[0]))]
    out.insert(int(op.args["dim"]) % (len(out) + 1), None)
    return out


def _common(op: Op, dims: Dims) -> Any:
    for dim in dims[1:]:
        op.labels.unite(dims[0], dim, op.where)
    return dims[0]


def split(op: Op) -> Value:
    """``split``, ``chunk``, ``split_with_sizes``, ``tensor_split``: consecutive parts, each of which must keep some."""
    x, d = op.dims("self"), op.dim()
    dim, start = x[d], 0
    out: list[Dims] = []
    for n in _part_sizes(op):
        part = None if dim is None else dim[:, start : start + n]
        op.labels.mark_part(part)
        out.append([*x[:d], part, *x[d + 1 :]])
        start += n
    return tuple(out)


def _part_sizes(op: Op) -> list[int]:
    d = op.dim()
    return [size(v.shape[d]) for v in op.node.meta["val"]]


def rewrite_split(op: Op, cut: Cut) -> dict[str, Any]:
    d = op.dim()
    dim = op.dims("self")[d]
    if dim is None:
        return {}
    edges = np.cumsum([0, *_part_sizes(op)])
    kept = cut.kept(dim, int(edges[-1]))
    if len(kept) == edges[-1]:
        return {}
    counts = [int(((kept >= start) & (kept < end)).sum()) for start, end in pairwise(edges)]
    return {
        TARGET: torch.ops.aten.split_with_sizes.default,
        "split_sizes": counts,
        "dim": d,
    }


def unbind(op: Op) -> Value:
    x, d = op.dims("self"), op.dim()
    op.labels.freeze(x[d], f"taken apart one by one in {op.where}")
    return tuple([*x[:d], *x[d + 1 :]] for _ in range(op.sizes("self")[d]))


def select(op: Op) -> Value:
    """One index is picked out: that one must stay, the others may go."""
    x, d = op.dims("self"), op.dim()
    dim = x.pop(d)
    if dim is not None:
        i = int(op.args["index"]) % dim.shape[1]
        op.labels.freeze(dim[:, i : i + 1], f"picked out by a fixed index in {op.where}")
    return x


def rewrite_select(op: Op, cut: Cut) -> dict[str, Any]:
    d = op.dim()
    n = op.sizes("self")[d]
    kept = cut.kept(op.dims("self")[d], n)
    return {"index": int(np.searchsorted(kept, int(op.args["index"]) % n))}


def slice_(op: Op) -> Value:
    """``slice``, ``narrow``: a range of indices; each selection must keep something of its own."""
    x, d = op.dims("self"), op.dim()
    dim = x[d]
    if dim is not None:
        taken = dim[:, _range(op)]
        if op.node in op.written and _range(op).step not in (None, 1):
            op.labels.freeze(dim, f"written in steps in {op.where}")
        if taken.shape[1] < dim.shape[1]:
            op.labels.mark_part(taken)
        x[d] = taken if taken.shape[1] > 1 else None
        if taken.shape[1] == 1:
            op.labels.freeze(taken, f"picked out by a fixed index in {op.where}")
    return x


def _range(op: Op) -> slice:
    if operator_name(op.node.target) == "narrow":
        start = _number(op.args["start"])
        return slice(start, start + _number(op.args["length"]))
    return slice(*(None if op.args[n] is None else _number(op.args[n]) for n in ("start", "end", "step")))


def _number(value: Any) -> int:
    """A size argument: a number, or a node that holds one."""
    return size(value.meta["val"] if isinstance(value, fx.Node) else value)


def rewrite_slice(op: Op, cut: Cut) -> dict[str, Any]:
    """New bounds where what stays is a range again; otherwise the positions themselves."""
    d = op.dim()
    dim, n = op.dims("self")[d], op.sizes("self")[d]
    if dim is None:
        return {}
    kept = cut.kept(dim, n)
    if len(kept) == n:
        return {}
    wanted = np.arange(n)[_range(op)]
    at = np.flatnonzero(np.isin(kept, wanted))
    step = int(at[1] - at[0]) if len(at) > 1 else 1
    if len(at) and (np.diff(at) == step).all():
        bounds = {"start": int(at[0]), "end": int(at[-1]) + 1, "step": step}
        return {TARGET: torch.ops.aten.slice.Tensor, "dim": d, **bounds}
    return {
        TARGET: torch.ops.aten.index_select.default,
        "dim": d,
        "index": cut.constant(torch.from_numpy(at)),
    }


def pad(op: Op) -> Value:
    """Padding of channels makes virtual units with nothing behind them; those may go like others."""
    x, pads = op.dims("self"), op.args["pad"]
    constant = op.args.get("mode", "constant") == "constant"
    sizes = op.sizes("self")
    for k in range(len(pads) // 2):
        before, after = pads[2 * k : 2 * k + 2]
        d = len(x) - 1 - k
        if x[d] is None or (before, after) == (0, 0):
            continue
        if not constant or before < 0 or after < 0:
            op.labels.freeze(x[d], f"padded by its own values, or cropped, in {op.where}")
            x[d] = None
            continue
        new = [op.labels.virtual(n) for n in (before, after)]
        x[d] = concatenate([new[0], x[d], new[1]], [before, sizes[d], after])
    return x


def rewrite_pad(op: Op, cut: Cut) -> dict[str, Any]:
    pads, out = list(op.args["pad"]), op.of(op.node)
    for k in range(len(pads) // 2):
        dim, before, after = out[len(out) - 1 - k], *pads[2 * k : 2 * k + 2]
        if dim is not None and before >= 0 and after >= 0 and before + after > 0:
            n = dim.shape[1]
            kept = cut.kept(dim, n)
            pads[2 * k] = int((kept < before).sum())
            pads[2 * k + 1] = int((kept >= n - after).sum())
    return {"pad": pads}


_SPLITS = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(_SPLITS, split),
    "unbind": unbind,
    "select": select,
    **dict.fromkeys(("slice", "narrow"), slice_),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
}
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(_SPLITS, rewrite_split),
    "select": rewrite_select,
    **dict.fromkeys(("slice", "narrow"), rewrite_slice),
    **dict.fromkeys(("pad", "constant_pad_nd"), rewrite_pad),
}
