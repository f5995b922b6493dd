"""Fused attention: query (…, heads, L, E), key (…, kv heads, S, E), value (…, kv heads, S, Ev)."""

from __future__ import annotations

import math
from typing import Any

from secateur.graph.rules.base import Cut, Op, Rewrite, Rule, Value, sizes_of


def attention(op: Op) -> Value:
    """Heads go together in query, key and value; the width of query and key apart from the value's."""
    q, k, v = op.dims("query"), op.dims("key"), op.dims("value")
    nq, nk = op.sizes("query"), op.sizes("key")
    unite, where = op.labels.unite, op.where
    unite(q[-1], k[-1], where)
    unite(k[-2], v[-2], where)
    if op.vanishing.isdisjoint((op.args["query"], op.args["key"])):
        op.labels.mark_inexact(q[-1])
    op.labels.freeze(q[-2], f"positions of the query in {where}")
    op.labels.freeze(k[-2], f"positions of the key: softmax runs over them in {where}")
    op.labels.call(k[-3] if len(k) > 3 else None, "heads" if nq[-3] == nk[-3] else "kv heads")
    op.labels.call(q[-1], "head width")
    op.labels.call(v[-1], "value width")
    for d in range(len(q) - 2):
        unite(k[d], v[d], where)
        if nq[d] == nk[d]:
            unite(q[d], k[d], where)
        else:  # grouped queries: (kv heads, queries per kv head)
            groups, queries = op.labels.split(q[d], [nk[d], nq[d] // nk[d]], where)
            unite(groups, k[d], where)
            op.labels.call(queries, "queries per kv head")
    mask = op.args.get("attn_mask")
    if mask is not None:
        scores = [*q[:-2], q[-2], k[-2]]
        op.broadcast((scores, (*nq[:-1], nk[-2])), (op.of(mask), sizes_of(mask)))
    return [*q[:-1], v[-1]]


def rewrite_attention(op: Op, cut: Cut) -> dict[str, Any]:
    """The implicit 1/sqrt(E) is the original network's: keep it when E shrinks."""
    if op.args.get("scale") is not None:
        return {}
    return {"scale": 1.0 / math.sqrt(op.sizes("query")[-1])}


RULES: dict[str, Rule] = {"scaled_dot_product_attention": attention}
REWRITES: dict[str, Rewrite] = {"scaled_dot_product_attention": rewrite_attention}
