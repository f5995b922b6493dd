"""Normalization: scales, shifts and running statistics belong to the channels they act on."""

from __future__ import annotations

from typing import Any

from secateur.graph.rules.base import Cut, Op, Rewrite, Rule, Value, operator_name


def _first(op: Op) -> Any:
    return op.args["input"] if "input" in op.args else op.args["self"]


def batch_norm(op: Op) -> Value:
    """``batch_norm``, ``instance_norm``: statistics per channel (dimension 1), so zeroing stays exact."""
    x = op.of(_first(op))
    if op.args.get("running_mean") is None or op.args.get("training") or op.args.get("use_input_stats"):
        for dim in (x[0], *x[2:]):  # statistics of the batch, or of weights that are standardized
            op.labels.mark_inexact(dim)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if op.args.get(name) is not None:
            op.labels.unite(x[1], op.dims(name)[0], op.where)
    return x


def layer_norm(op: Op) -> Value:
    """``layer_norm``, ``rms_norm``: statistics over the last dimensions; removing changes them."""
    x, k = op.of(_first(op)), len(op.args["normalized_shape"])
    for dim in x[-k:]:
        op.labels.mark_inexact(dim)
    for name in ("weight", "bias"):
        if op.args.get(name) is not None:
            for mine, other in zip(x[-k:], op.dims(name), strict=True):
                op.labels.unite(mine, other, op.where)
    return x


def rewrite_layer_norm(op: Op, cut: Cut) -> dict[str, Any]:
    return {"normalized_shape": cut.shape(op)[-len(op.args["normalized_shape"]) :]}


def group_norm(op: Op) -> Value:
    """``group_norm``: channels are groups x members; every group keeps equally many members."""
    x, groups = op.dims("input"), int(op.args["num_groups"])
    members = op.sizes("input")[1] // groups
    by_group, within = op.labels.split(x[1], [groups, members], op.where)
    op.labels.mark_inexact(within)
    op.labels.call(by_group if members > 1 else None, "groups")
    for name in ("weight", "bias"):
        if op.args[name] is not None:
            op.labels.unite(x[1], op.dims(name)[0], op.where)
    return x


def rewrite_group_norm(op: Op, cut: Cut) -> dict[str, Any]:
    groups, n = int(op.args["num_groups"]), op.sizes("input")[1]
    kept = cut.kept(op.dims("input")[1], n) // (n // groups)
    return {"num_groups": len(set(kept.tolist()))}


def softmax(op: Op) -> Value:
    """``softmax``, ``log_softmax``, ``cumprod``, …: every index of the dimension depends on the others."""
    x, d = op.of(op.tensors[0]), op.dim(of="self" if "self" in op.args else "input")
    if x:
        op.labels.mark_inexact(x[d])
    if len(x) == 4 and d == 3:  # attention written out: (batch, heads, queries, keys)
        op.labels.call(x[1], "heads")
    return x


def weight_norm(op: Op) -> Value:
    """``_weight_norm``: v / |v| * g, a norm per index of one dimension (Salimans and Kingma 2016)."""
    v, g, d = op.dims("v"), op.dims("g"), op.dim(of="v")
    op.labels.unite(v[d], g[d] if len(g) > 1 else g[0], op.where)
    for dim in v:
        op.labels.mark_inexact(dim)
    return v if operator_name(op.node.target) == "_weight_norm" else (v, g)


RULES: dict[str, Rule] = {
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), weight_norm),
    **dict.fromkeys(("softmax", "log_softmax", "cumprod", "_softmax", "_log_softmax"), softmax),
}
REWRITES: dict[str, Rewrite] = {
    "layer_norm": rewrite_layer_norm,
    "rms_norm": rewrite_layer_norm,
    "group_norm": rewrite_group_norm,
}
