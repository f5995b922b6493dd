"""Rows 1-3, 13, 16-18, 38: chains and residuals of convolutions, groups, gates."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import nets
from nets import Net, conv, tail
from structures import case, maps, vectors

case(1, free=[8, 12])(nets.plain)
case(1, free=[8], inputs=lambda n: torch.randn(n, 3, 12), frozen="model output 0")(nets.plain_1d)
case(1, free=[8], inputs=lambda n: torch.randn(n, 2, 5, 5, 5), frozen="model output 0")(nets.plain_3d)
case(1, free=[16], inputs=vectors())(nets.dropout_and_norm)


@case(1, free=[8, 12])
def without_biases():
    return nn.Sequential(
        conv(3, 8, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.PReLU(),
        conv(8, 12, bias=False),
        nn.Mish(),
        tail(12),
    )


@case(1, free=[8, 12])
def strided_dilated_and_pooled():
    return nn.Sequential(
        conv(3, 8, 5, stride=2), nn.Hardswish(), conv(8, 12, dilation=2), nn.AvgPool2d(2), nn.LeakyReLU(), tail(12)
    )


case(2, free=[8, 6, 10])(nets.residual)


@case(2, free=[8, 6])
def add_in_place():
    def body(s, x):
        x = s.stem(x)
        y = s.b(F.relu_(s.a(x)))
        y.add_(x).relu_()
        return s.tail(y)

    return Net(body, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), tail=tail(8))


@case(2, free=[8])
def sums_of_many():
    def body(s, x):
        y = sum([s.a(x), s.b(x), s.c(x)])
        return s.tail(torch.lerp(y, s.d(y), 0.3))

    return Net(body, a=conv(3, 8), b=conv(3, 8, 1), c=conv(3, 8, 5), d=conv(8, 8), tail=tail(8))


@case(2, free=[8, 6], frozen="model output 0")
def stages_with_projections():
    def body(s, x):
        x = F.relu(s.stem(x))
        return F.relu(s.b(F.relu(s.a(x))) + s.project(x))

    return Net(body, stem=conv(3, 8), a=conv(8, 6, stride=2), b=conv(6, 10), project=conv(8, 10, 1, stride=2))


case(3, free=[8], frozen="meets a dimension")(nets.residual_with_the_input)


@case(3, free=[8, 10])
def restoration_with_a_global_skip():
    def body(s, x):
        y = F.relu(s.a(x))
        return torch.clamp(x - s.c(y + F.relu(s.b1(F.relu(s.b0(y))))), -3, 3)

    return Net(body, a=conv(3, 8), b0=conv(8, 10), b1=conv(10, 8), c=conv(8, 3))


@case(3, free=[8])
def input_gated_by_features():
    return Net(lambda s, x: x * torch.sigmoid(s.b(F.relu(s.a(x)))) + x, a=conv(3, 8), b=conv(8, 3))


def focus(x):
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@case(13, free=[8])
def focus_on_the_input():
    return Net(lambda s, x: s.tail(F.silu(s.a(focus(x)))), a=conv(12, 8), tail=tail(8))


@case(13, free=[6, 8])
def focus_on_features():
    return Net(lambda s, x: s.tail(s.b(focus(F.relu(s.a(x))))), a=conv(3, 6), b=conv(24, 8), tail=tail(8))


case(16, free=[12])(nets.depthwise)
case(16, free=[2, 2, 3, 4, 4])(nets.grouped)


@case(16, free=[4, 3, 6], inputs=maps(3))
def widening_groups():
    return nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 24, groups=4), nn.ReLU(), tail(24))


@case(16, free=[6, 4], frozen="would leave dimension 0 of a.weight empty")
def groups_of_two_branches():
    """Every branch is one group of the convolution that follows."""
    return Net(
        lambda s, x: s.tail(s.c(torch.cat([F.relu(s.a(x)), F.relu(s.b(x))], 1))),
        a=conv(3, 6), b=conv(3, 6), c=conv(12, 8, groups=2), tail=tail(8),
    )  # fmt: skip


@case(16, free=[8, 16])
def inverted_residual():
    def body(s, x):
        x = s.stem(x)
        y = s.norm(s.depth(F.relu6(s.up(x))))
        return s.tail(x + s.down(F.relu6(y)))

    parts = {"up": conv(8, 16, 1), "depth": conv(16, 16, groups=16), "down": conv(16, 8, 1)}
    return Net(body, stem=conv(3, 8), norm=nn.BatchNorm2d(16), tail=tail(8), **parts)


@case(16, free=[4, 3, 3, 8])
def resnext_block():
    def body(s, x):
        x = s.stem(x)
        return s.tail(F.relu(x + s.c(F.relu(s.b(F.relu(s.a(x)))))))

    parts = {"a": conv(8, 12, 1), "b": conv(12, 12, groups=4), "c": conv(12, 8, 1)}
    return Net(body, stem=conv(3, 8), tail=tail(8), **parts)


case(17, free=[8, 2])(nets.depth_multiplier)


@case(17, free=[16, 2])
def groups_as_many_as_outputs():
    return nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 16, groups=16), nn.ReLU(), conv(16, 4, 1))


@case(17, free=[6, 3], inputs=lambda n: torch.randn(n, 3, 12))
def depth_multiplier_1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 18, 3, groups=6), nn.BatchNorm1d(18), nn.Conv1d(18, 4, 1)
    )


case(18, free=[8, 3, 2, 4])(nets.transposed)
case(18, free=[2, 2, 4, 6], inputs=lambda n: torch.randn(n, 3, 2, 4))(nets.transposed_1d_and_3d)


@case(18, free=[8])
def transposed_depthwise():
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)
    )


@case(18, free=[2, 4, 3])
def transposed_groups():
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), conv(6, 4))


@case(18, free=[8, 6])
def decoder_with_output_padding():
    up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False)
    return nn.Sequential(conv(3, 8, stride=2), nn.ReLU(), up, nn.BatchNorm2d(6), nn.ELU(), conv(6, 3))


case(38, free=[12, 4])(nets.squeeze_excite)
case(38, free=[8], inexact=True)(nets.channel_mean_attention)


@case(38, free=[12, 4])
def squeeze_excite_of_linears():
    def body(s, x):
        x = s.a(x)
        gate = s.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return s.b(x * gate[:, :, None, None])

    fc = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 12), nn.Hardsigmoid())
    return Net(body, a=conv(3, 12), fc=fc, b=conv(12, 4))


@case(38, free=[8])
def spatial_attention():
    return Net(lambda s, x: s.b(s.a(x) * torch.sigmoid(s.gate(x))), a=conv(3, 8), gate=conv(3, 1), b=conv(8, 4))


@case(38, free=[8, 6])
def one_channel_added_to_all():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.c(x + s.one(F.relu(s.b(x))))

    return Net(body, a=conv(3, 8), b=conv(8, 6), one=conv(6, 1), c=conv(8, 4))


@case(38, free=[8, 4], inexact=True)
def cbam():
    def body(s, x):
        x = s.a(x)
        pooled = [x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)]
        x = x * torch.sigmoid(sum(s.up(F.relu(s.down(p))) for p in pooled))
        x = x * torch.sigmoid(s.gate(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)))
        return s.b(x)

    return Net(body, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), gate=conv(2, 1, 7), b=conv(8, 4))


@case(38, free=[8], frozen="spatial dimension of aten.conv1d")
def efficient_channel_attention():
    """A convolution along the channels, to which their distances matter."""

    def body(s, x):
        x = s.a(F.relu(s.stem(x)))
        pooled = x.mean((2, 3))[:, None]
        return s.b(x * torch.sigmoid(s.mix(pooled))[:, 0, :, None, None])

    return Net(body, stem=conv(3, 8), a=conv(8, 10), mix=nn.Conv1d(1, 1, 3, padding=1), b=conv(10, 4))
