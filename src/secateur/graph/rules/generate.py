"""Tensors made inside the program. A uniform one can have any size; a counted one cannot."""

from __future__ import annotations

from typing import Any

from secateur.graph.rules.base import Cut, Op, Rewrite, Rule, Value

_UNIFORM = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor"
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like"


def uniform(op: Op) -> Value:
    """All entries are equal, so every index may go: each dimension gets atoms of its own."""
    return [op.labels.fresh(n) for n in op.out]


def like(op: Op) -> Value:
    return op.of(op.tensors[0])


def rewrite_uniform(op: Op, cut: Cut) -> dict[str, Any]:
    return {"size": cut.resized(op, op.args["size"])} if "size" in op.args else {}


RULES: dict[str, Rule] = {**dict.fromkeys(_UNIFORM.split(), uniform), **dict.fromkeys(_LIKE.split(), like)}
REWRITES: dict[str, Rewrite] = dict.fromkeys(_UNIFORM.split(), rewrite_uniform)
