"""Operators that work on each channel's spatial grid alone: pooling, resampling, pixel shuffle."""

from __future__ import annotations

import math
import re
from typing import Any

from secateur.graph.rules.base import Cut, Op, Rewrite, Rule, Value, operator_name

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


def unpool(op: Op) -> Value:
    """``max_unpool``: every value goes to where its index, in the same channel, says."""
    x, space = op.dims("self"), _space(op)
    for mine, other in zip(x, op.dims("indices"), strict=True):
        op.labels.unite(mine, other, op.where)
    return op.keep_leading(x, space)


def pixel_shuffle(op: Op) -> Value:
    """Channels are (channel, r, r): the r x r positions become space and must stay."""
    x, r = op.dims("self"), int(op.args["upscale_factor"])
    n = op.sizes("self")[-3]
    channel, positions = op.labels.split(x[-3], [n // (r * r), r * r], op.where)
    op.labels.freeze(positions, f"becomes space in {op.where}")
    return [*op.keep_leading(x, 2)[:-3], channel, None, None]


def pixel_unshuffle(op: Op) -> Value:
    """Every channel becomes (channel, r, r)."""
    x, r = op.dims("self"), int(op.args["downscale_factor"])
    n = op.sizes("self")[-3]
    return [*op.keep_leading(x, 2)[:-3], op.labels.merge([x[-3], None], [n, r * r]), None, None]


def im2col(op: Op) -> Value:
    """``im2col`` (``unfold`` of images): (…, C, H, W) becomes (…, C x kernel, positions)."""
    x, kernel = op.dims("self"), math.prod(op.args["kernel_size"])
    channel = op.labels.merge([x[-3], None], [op.sizes("self")[-3], kernel])
    return [*op.keep_leading(x, 2)[:-3], channel, None]


def col2im(op: Op) -> Value:
    """``col2im`` (``fold``): (…, C x kernel, positions) becomes (…, C, H, W)."""
    x, kernel = op.dims("self"), math.prod(op.args["kernel_size"])
    channel, positions = op.labels.split(x[-2], [op.sizes("self")[-2] // kernel, kernel], op.where)
    op.labels.freeze(positions, f"becomes space in {op.where}")
    return [*op.keep_leading(x, 1)[:-2], channel, None, None]


def unfold(op: Op) -> Value:
    """``unfold``: windows of one dimension become a dimension of their own."""
    x, d = op.dims("self"), op.dim("dimension")
    op.labels.freeze(x[d], f"cut into windows in {op.where}")
    x[d] = None
    return [*x, None]


def grid_sampler(op: Op) -> Value:
    """``grid_sampler``: input (N, C, *space) sampled at grid (N, *space, coordinates)."""
    x, grid = op.dims("input"), op.dims("grid")
    for dim in grid[1:]:
        op.labels.freeze(dim, f"coordinates of {op.where}")
    op.labels.unite(x[0], grid[0], op.where)
    return op.keep_leading(x, len(x) - 2)


def along(op: Op) -> Value:
    """Operators that mix all positions of some dimensions, such as Fourier transforms: those must stay whole."""
    x = op.of(op.tensors[0])
    which = op.args.get("dim", op.args.get("dims"))
    which = range(len(x)) if which is None else [which] if isinstance(which, int) else which
    for d in which:
        op.labels.freeze(x[d], f"mixed along this dimension in {op.where}")
        x[d] = None
    return x


def view_as_complex(op: Op) -> Value:
    """The last dimension, of size 2, becomes the two parts of a number."""
    *x, parts = op.dims("self")
    op.labels.freeze(parts, f"real and imaginary part in {op.where}")
    return x


def rewrite_view_as_complex(op: Op, cut: Cut) -> dict[str, Any]:
    """Pairs must lie next to each other, which slicing may have undone."""
    return {"self": cut.contiguous(op.args["self"])}


def view_as_real(op: Op) -> Value:
    return [*op.dims("self"), None]


_ALONG = """
fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
fft_rfftn fft_irfftn fft_fftshift fft_ifftshift diff cross linalg_cross
"""

RULES: dict[str, Rule] = {
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": im2col,
    "col2im": col2im,
    "unfold": unfold,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    **dict.fromkeys(_ALONG.split(), along),
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(_POOLS.split(), grid),
    **dict.fromkeys(_WITH_INDICES.split(), grid_with_indices),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), unpool),
    "pixel_shuffle": pixel_shuffle,
}
REWRITES: dict[str, Rewrite] = {"view_as_complex": rewrite_view_as_complex}
