"""Elementwise operators: dimensions are aligned from the right and united."""

from __future__ import annotations

from secateur.graph.rules.base import Op, Rewrite, Rule, Value, sizes_of

_UNARY = """
abs absolute acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clip
clone contiguous cos cosh deg2rad detach dropout alpha_dropout elu erf erfc erfinv exp exp2 expm1 fill floor frac gelu
hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lift_fresh_copy log log10 log1p log2
log_sigmoid logical_not logit mish nan_to_num neg negative positive rad2deg reciprocal relu relu6 round rrelu rsqrt
selu sgn sigmoid sign silu sin sinh softplus softshrink softsign special_expit cumsum sqrt square tan tanh tanhshrink
threshold to trunc type_as zero feature_dropout lift_fresh _to_copy real imag conj resolve_conj _conj conj_physical
native_dropout erfinv digamma lgamma i0 sinc
"""
_BINARY = """
__and__ __or__ __xor__ __iand__ __ior__ add addcdiv addcmul arctan2 atan2 bitwise_and bitwise_or bitwise_xor copy
copysign div divide eq float_power floor_divide fmax fmin fmod ge greater greater_equal gt hypot le lerp less less_equal
logaddexp logaddexp2 logical_and logical_or logical_xor lt masked_fill maximum minimum mul multiply ne not_equal pow
remainder rsub special_xlogy sub subtract true_divide where xlogy complex polar nextafter ldexp heaviside
bitwise_left_shift bitwise_right_shift
"""


def pointwise(op: Op) -> Value:
    inputs = [n for n in op.tensors if op.values.get(n) is not None or len(sizes_of(n))]
    return op.broadcast(*[(op.of(n), sizes_of(n)) for n in inputs]) if inputs else None


def unary(op: Op) -> Value:
    return op.of(op.tensors[0])


def prelu(op: Op) -> Value:
    """One slope per channel, or one for all."""
    dims = op.dims("self")
    if op.sizes("weight")[0] > 1:
        op.labels.unite(dims[1], op.dims("weight")[0], op.where)
    return dims


RULES: dict[str, Rule] = {
    **dict.fromkeys(_BINARY.split(), pointwise),
    **dict.fromkeys(_UNARY.split(), unary),
    "prelu": prelu,
}
REWRITES: dict[str, Rewrite] = {}
