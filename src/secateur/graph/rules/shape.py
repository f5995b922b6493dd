"""Operators that lay the same values out differently: view, permute, expand, flip."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.graph.rules.base import Cut, Dims, Op, Rewrite, Rule, Value


def view(op: Op) -> Value:
    """``view``, ``reshape``, ``flatten``, ``unflatten``: merges and splits of dimensions."""
    source = op.tensors[0]
    return op.labels.reshape(op.of(source), op.sizes("self"), op.out, op.where)


def rewrite_view(op: Op, cut: Cut) -> dict[str, Any]:
    """Only sizes of dimensions that lost something are rewritten."""
    if "sizes" in op.args:  # unflatten: one dimension becomes these
        dim, sizes = op.dim(), op.args["sizes"]
        return {"sizes": cut.shape(op)[dim : dim + len(sizes)]}
    name = next((n for n in ("size", "shape") if n in op.args), None)
    return {name: cut.resized(op, op.args[name])} if name else {}


def permute(op: Op) -> Value:
    x = op.dims("self")
    return [x[d] for d in op.args["dims"]]


def transpose(op: Op) -> Value:
    x = op.dims("self")
    i, j = (op.args[n] for n in (("dim0", "dim1") if "dim0" in op.args else ("axis0", "axis1")))
    if x:
        x[i], x[j] = x[j], x[i]
    return x


def matrix_transpose(op: Op) -> Value:
    x = op.dims("self")
    return [*x[:-2], *x[-2:][::-1]]


def squeeze(op: Op) -> Value:
    x, sizes = op.dims("self"), op.sizes("self")
    which = op.args.get("dim")
    chosen = range(len(x)) if which is None else [which] if isinstance(which, int) else which
    gone = {d % len(x) for d in chosen if sizes[d] == 1} if x else set()
    return [dim for d, dim in enumerate(x) if d not in gone]


def unsqueeze(op: Op) -> Value:
    x = op.dims("self")
    d = op.args["dim"]
    x.insert(d if d >= 0 else d + len(x) + 1, None)
    return x


def expand(op: Op) -> Value:
    """A stretched dimension holds equal copies, so any of them may go: it gets atoms of its own."""
    out = op.out
    x, sizes = _padded(op, len(out))
    labelled = any(dim is not None for dim in x)
    return [op.labels.fresh(n) if labelled and n != size else dim for dim, size, n in zip(x, sizes, out, strict=True)]


def _padded(op: Op, rank: int) -> tuple[Dims, tuple[int, ...]]:
    """Labels and sizes of the input with dimensions of size 1 put in front, as broadcasting does."""
    x: Dims = op.dims("self")
    missing = rank - len(x)
    empty: Dims = [None] * missing
    return empty + x, (1,) * missing + op.sizes("self")


def repeat(op: Op) -> Value:
    """Copies of a whole dimension: (copies, index), merged."""
    x, sizes = _padded(op, len(op.out))
    repeats = [n // size for n, size in zip(op.out, sizes, strict=True)]
    if all(dim is None for dim in x):
        return x if op.out == sizes else None
    return [
        dim if r == 1 else op.labels.merge([op.labels.fresh(r), dim], [r, n])
        for dim, n, r in zip(x, sizes, repeats, strict=True)
    ]


def rewrite_repeat(op: Op, cut: Cut) -> dict[str, Any]:
    x, sizes = _padded(op, len(op.out))
    kept = [len(cut.kept(d, n)) for d, n in zip(x, sizes, strict=True)]
    new = [n // k for n, k in zip(cut.shape(op), kept, strict=True)]
    return {"repeats": [n if isinstance(a, int) else a for a, n in zip(op.args["repeats"], new, strict=True)]}


def flip(op: Op) -> Value:
    x = op.dims("self")
    for d in op.args["dims"]:
        dim = x[d]
        x[d] = None if dim is None else np.ascontiguousarray(dim[:, ::-1])
    return x


def roll(op: Op) -> Value:
    """Distances matter, so a rolled dimension must stay whole."""
    x = op.dims("self")
    for d in op.args["dims"] or range(len(x)):
        op.labels.freeze(x[d], f"rolled by a fixed distance in {op.where}")
        x[d] = None
    return x


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), view),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T", "mT", "adjoint"), matrix_transpose),
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    "flip": flip,
    "roll": roll,
}
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "expand", "broadcast_to"), rewrite_view),
    "repeat": rewrite_repeat,
}
