"""Operators of torchvision: deformable convolutions, features cut out of maps."""

from __future__ import annotations

from secateur.graph.rules.base import Dims, Op, Rewrite, Rule, Value
from secateur.graph.rules.contraction import KERNEL, channels, rewrite_groups


def deform_conv2d(op: Op) -> Value:
    """Input (N, in, H, W), weight (out, in/groups, kh, kw); offsets and mask say where and how much to read.

    Offsets (N, 2 x offset groups x kh x kw, H', W') hold places, not channels. With several offset groups the input's
    channels are (offset groups, members), and every group stays.
    """
    x, w, groups = op.dims("input"), op.dims("weight"), int(op.args["offset_groups"])
    for name in ("offset", "mask"):
        for dim in op.dims(name)[1:]:
            op.labels.freeze(dim, f"places to read from in {op.where}")
    for dim in x[2:]:
        op.labels.freeze(dim, f"spatial dimension of {op.where}")
    for dim in w[2:]:
        op.labels.freeze(dim, KERNEL)
    if groups > 1:
        members = op.sizes("input")[1] // groups
        op.labels.freeze(op.labels.split(x[1], [groups, members], op.where)[0], f"offset groups of {op.where}")
    return [x[0], channels(op, x[1], op.sizes("input")[1]), None, None]


def roi_align(op: Op) -> Value:
    """``roi_align``, ``roi_pool``: regions (K, 5) of features (N, C, H, W) become (K, C, *size)."""
    x = op.dims("input")
    for dim in (x[0], *x[2:], *op.dims("rois")):
        op.labels.freeze(dim, f"regions of {op.where}")
    out: Dims = [None, x[1], None, None]
    return (out, list(out)) if isinstance(op.node.meta["val"], tuple) else out


RULES: dict[str, Rule] = {
    "torchvision::deform_conv2d": deform_conv2d,
    "torchvision::roi_align": roi_align,
    "torchvision::roi_pool": roi_align,
}
REWRITES: dict[str, Rewrite] = {"torchvision::deform_conv2d": rewrite_groups}
