"""Operators that lay the same values out differently: view, permute, expand, flip."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.graph.rules.base import Cut, Dims, Op, Rewrite, Rule, Value, operator_name


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
    return [op.labels.fresh(n) if n != size else dim for dim, size, n in zip(x, sizes, out, strict=True)]


def like_other(op: Op) -> Value:
    """``view_as``, ``reshape_as``, ``expand_as``: the sizes are those of another tensor, and stay so."""
    out = expand(op) if operator_name(op.node.target) == "expand_as" else view(op)
    assert isinstance(out, list)
    for mine, other in zip(out, op.dims("other"), strict=True):
        op.labels.unite(mine, other, op.where)
    return out


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
    return [
        dim if r == 1 else op.labels.merge([op.labels.fresh(r), dim], [r, n])
        for dim, n, r in zip(x, sizes, repeats, strict=True)
    ]


def rewrite_repeat(op: Op, cut: Cut) -> dict[str, Any]:
    x, sizes = _padded(op, len(op.out))
    kept = [len(cut.kept(d, n)) for d, n in zip(x, sizes, strict=True)]
    new = [n // k for n, k in zip(cut.shape(op), kept, strict=True)]
    name = "repeats" if "repeats" in op.args else "dims"
    asked = op.args[name]
    new = new[len(new) - len(asked) :]  # tile may name fewer dimensions than there are
    return {name: [n if isinstance(a, int) else a for a, n in zip(asked, new, strict=True)]}


def flip(op: Op) -> Value:
    x = op.dims("self")
    for d in op.args["dims"]:
        dim = x[d]
        x[d] = None if dim is None else np.ascontiguousarray(dim[:, ::-1])
    return x


def repeat_interleave(op: Op) -> Value:
    """``repeat_interleave`` by a number: (index, copies), merged."""
    if not isinstance(op.args["repeats"], int) or op.args.get("dim") is None:
        for node in op.tensors:
            for dim in op.of(node):
                op.labels.freeze(dim, f"repeated by numbers, or flattened, in {op.where}")
        return None
    x, d, r = op.dims("self"), op.dim(), int(op.args["repeats"])
    x[d] = x[d] if r == 1 else op.labels.merge([x[d], op.labels.fresh(r)], [op.sizes("self")[d], r])
    return x


def rewrite_repeat_interleave(op: Op, cut: Cut) -> dict[str, Any]:
    d = op.dim()
    kept = len(cut.kept(op.dims("self")[d], op.sizes("self")[d]))
    return {"repeats": cut.shape(op)[d] // kept, "output_size": None}


def move(op: Op) -> Value:
    """``movedim``"""
    x = op.dims("self")
    source, destination = op.args["source"], op.args["destination"]
    source, destination = ([a] if isinstance(a, int) else list(a) for a in (source, destination))
    rest = [k for k in range(len(x)) if k not in {s % len(x) for s in source}]
    for s, t in sorted(zip(source, destination, strict=True), key=lambda pair: pair[1] % len(x)):
        rest.insert(t % len(x), s % len(x))
    return [x[k] for k in rest]


def meshgrid(op: Op) -> Value:
    """``meshgrid``: every input is stretched along all others."""
    dims = [op.of(n)[0] if op.of(n) else None for n in op.args["tensors"]]
    if op.args.get("indexing") == "xy" and len(dims) > 1:
        dims[:2] = dims[1::-1]
    return tuple(list(dims) for _ in dims)


def whole(op: Op) -> Value:
    """``tril``, ``triu``, ``diagonal``, …: the last two dimensions are a matrix whose positions mean something."""
    x = op.of(op.tensors[0])
    for dim in x[-2:]:
        op.labels.freeze(dim, f"a matrix of positions in {op.where}")
    return [*x[:-2], *[None] * (len(op.out) - len(x[:-2]))]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), view),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T", "mT", "adjoint"), matrix_transpose),
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), like_other),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "flip": flip,
    "repeat_interleave": repeat_interleave,
    "movedim": move,
    "meshgrid": meshgrid,
    **dict.fromkeys(("tril", "triu", "diagonal", "diag_embed", "rot90"), whole),
}
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "expand", "broadcast_to"), rewrite_view),
    **dict.fromkeys(("repeat", "tile"), rewrite_repeat),
    "repeat_interleave": rewrite_repeat_interleave,
}
