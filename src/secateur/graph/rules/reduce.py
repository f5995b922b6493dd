"""Reductions: what is averaged over channels no longer equals zeroing when channels go."""

from __future__ import annotations

from secateur.graph.rules.base import Op, Rewrite, Rule, Value

_NAMES = """
mean sum amax amin std var logsumexp norm linalg_vector_norm any all nansum count_nonzero prod nanmean var_mean std_mean
"""


def reduction(op: Op) -> Value:
    """Reduced dimensions vanish or become 1; over a labelled one the result depends on what stays."""
    source = op.tensors[0]
    x = op.of(source)
    which = op.args.get("dim", op.args.get("dims"))
    if which is None or which == []:
        which = list(range(len(x)))
    reduced = {d % max(len(x), 1) for d in ([which] if isinstance(which, int) else which)}
    for d in sorted(reduced):
        if x:
            op.labels.mark_inexact(x[d])
    kept = [None if d in reduced else dim for d, dim in enumerate(x) if op.args.get("keepdim") or d not in reduced]
    return (kept, list(kept)) if isinstance(op.node.meta["val"], tuple) else kept


def similarity(op: Op) -> Value:
    """``cosine_similarity``: one number of two vectors along a dimension."""
    x = op.broadcast((op.dims("x1"), op.sizes("x1")), (op.dims("x2"), op.sizes("x2")))
    op.labels.mark_inexact(x.pop(op.dim(of="x1")))
    return x


RULES: dict[str, Rule] = {**dict.fromkeys(_NAMES.split(), reduction), "cosine_similarity": similarity}
REWRITES: dict[str, Rewrite] = {}
