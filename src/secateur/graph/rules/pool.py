"""Operators that work on each channel's spatial grid alone: pooling, resampling, pixel shuffle."""

from __future__ import annotations

import re

from secateur.graph.rules.base import Op, Rewrite, Rule, Value, operator_name

_POOLS = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""
_WITH_INDICES = """
max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d
"""


def _space(op: Op) -> int:
    """The number of spatial dimensions, as the operator's name says it: ``max_pool2d``."""
    found = re.search(r"(\d)d", operator_name(op.node.target))
    assert found is not None
    return int(found[1])


def grid(op: Op) -> Value:
    return op.keep_leading(op.of(op.tensors[0]), _space(op))


def grid_with_indices(op: Op) -> Value:
    out = op.keep_leading(op.of(op.tensors[0]), _space(op))
    return out, out


def pixel_shuffle(op: Op) -> Value:
    """Channels are (channel, r, r): the r x r positions become space and must stay."""
    x, r = op.dims("self"), int(op.args["upscale_factor"])
    n = op.sizes("self")[-3]
    channel, positions = op.labels.split(x[-3], [n // (r * r), r * r], op.where)
    op.labels.freeze(positions, f"becomes space in {op.where}")
    return [*op.keep_leading(x, 2)[:-3], channel, None, None]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_POOLS.split(), grid),
    **dict.fromkeys(_WITH_INDICES.split(), grid_with_indices),
    "pixel_shuffle": pixel_shuffle,
}
REWRITES: dict[str, Rewrite] = {}
