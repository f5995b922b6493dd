"""``glu``: the first half of a dimension times the sigmoid of the second."""

from __future__ import annotations

from secateur.graph.rules.base import Op, Rewrite, Rule, Value


def glu(op: Op) -> Value:
    """Index i of one half goes together with index i of the other, so that halves stay halves."""
    x, d = op.dims("self"), op.dim()
    dim, half = x[d], op.sizes("self")[d] // 2
    if dim is not None:
        op.labels.unite(dim[:, :half], dim[:, half:], op.where)
        x[d] = dim[:, :half] if half > 1 else None
    return x


RULES: dict[str, Rule] = {"glu": glu}
REWRITES: dict[str, Rewrite] = {}
