"""Rounding to a grid, as quantization-aware training does it: by element, with scales per channel or for all."""

from __future__ import annotations

from secateur.graph.rules.base import Op, Rewrite, Rule, Value

_PER_TENSOR = "fake_quantize_per_tensor_affine _fake_quantize_learnable_per_tensor_affine"
_PER_CHANNEL = "fake_quantize_per_channel_affine _fake_quantize_learnable_per_channel_affine"


def per_tensor(op: Op) -> Value:
    return op.dims("self")


def per_channel(op: Op) -> Value:
    """A scale and a zero point for every index of one dimension."""
    x, d = op.dims("self"), op.dim("axis")
    for name in ("scale", "zero_point"):
        op.labels.unite(x[d], op.dims(name)[0], op.where)
    return x


def observed(op: Op) -> Value:
    """``fused_moving_avg_obs_fake_quant``: running extremes and scales, per row or for all."""
    x = op.dims("self")
    if op.args["per_row_fake_quant"]:
        for name in ("running_min", "running_max", "scale", "zero_point"):
            op.labels.unite(x[op.dim("ch_axis")], op.dims(name)[0], op.where)
    return x


RULES: dict[str, Rule] = {
    **dict.fromkeys(_PER_TENSOR.split(), per_tensor),
    **dict.fromkeys(_PER_CHANNEL.split(), per_channel),
    "fused_moving_avg_obs_fake_quant": observed,
}
REWRITES: dict[str, Rewrite] = {}
