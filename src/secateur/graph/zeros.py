"""Where zeros arrive: which tensors are zero wherever the weights of a unit are."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import fx

from secateur.graph.rules.base import Op, operator_name, sizes_of
from secateur.graph.rules.contraction import terms

_KEEPS = """
abs alias asin asinh atan cat celu chunk clone col2im constant_pad_nd contiguous copy detach dropout elu erf expand
expand_as expm1 feature_dropout flatten flip gelu getitem glu group_norm hardshrink hardswish im2col index
index_select leaky_relu lift_fresh_copy log1p masked_fill mish movedim narrow neg negative pad permute pixel_shuffle
pixel_unshuffle prelu real relu relu6 repeat repeat_interleave reshape roll round rrelu select selu sgn sign silu sin
sinh slice softshrink split split_with_sizes sqrt square squeeze stack sum t tan tanh tanhshrink to transpose type_as
unbind unflatten unfold unsqueeze view _to_copy _unsafe_view adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d upsample_nearest2d
upsample_bilinear2d channel_shuffle add sub rsub
"""
_KEEPING = frozenset(_KEEPS.split())
_WEIGHED = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}
_WEIGHED |= {"addmm", "baddbmm", "embedding", "scaled_dot_product_attention", "bilinear"}
_PRODUCTS = {"mul", "multiply", "matmul", "mm", "bmm", "einsum"}
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}


def vanishes(op: Op, vanishing: Set[Any]) -> bool:
    """Whether the operator's output is zero wherever what its units consist of is zero. No, where that is not known."""
    name = operator_name(op.node.target)
    if name in _PRODUCTS:
        return _follows(op, name, vanishing)
    if name in ("div", "true_divide", "divide"):
        return op.args["self"] in vanishing
    if name in _NORMS:
        return op.args.get("weight") is not None or name == "rms_norm"
    if name in ("add", "sub", "rsub") and not all(isinstance(op.args[n], fx.Node) for n in ("self", "other")):
        return False
    if name in _WEIGHED:
        return True
    return name in _KEEPING and bool(op.tensors) and all(n in vanishing for n in op.tensors)


def _follows(op: Op, name: str, vanishing: Set[Any]) -> bool:
    """Whether a product is zero along each of its dimensions, because a factor that has this dimension is."""
    rank = len(op.out)
    if name == "einsum":
        operands, out = terms(op)
        places = [[out.index(t) if t in out else None for t in letters] for letters in operands]
        factors = list(zip(op.args["tensors"], places, strict=True))
    else:
        ranks = [len(sizes_of(n)) for n in op.tensors]
        if name not in ("mul", "multiply") and min(ranks) < 2:
            return all(n in vanishing for n in op.tensors)
        aligned = [list[int | None](range(rank - r, rank)) for r in ranks]
        if name not in ("mul", "multiply"):  # what is summed over is no dimension of the product
            aligned[0][-1] = aligned[-1][-2] = None
        factors = list(zip(op.tensors, aligned, strict=True))
    zero = {
        place
        for node, places in factors
        for place, size in zip(places, sizes_of(node), strict=True)
        if node in vanishing and size > 1
    }
    return all(dim is None or place in zero for place, dim in enumerate(op.of(op.node)))
