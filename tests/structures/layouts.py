"""Rows 14, 15, 19-23, 50, 51: channels shuffled, moved into space, flattened, picked and repeated."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import nets
from nets import Net, conv, tail
from structures import case, maps, tokens, vectors

case(14, free=[6, 6, 6])(nets.shuffled)


@case(14, free=[2, 2, 2, 3, 8])
def shuffle_between_groups():
    """As in ShuffleNet: grouped, shuffled, depthwise, grouped."""

    def body(s, x):
        x = s.shuffle(F.relu(s.a(F.relu(s.stem(x)))))
        return s.tail(s.c(s.b(x)))

    parts = {"a": conv(6, 8, 1, groups=2), "b": conv(8, 8, groups=8), "c": conv(8, 16, 1, groups=2)}
    return Net(body, stem=conv(3, 6), shuffle=nn.ChannelShuffle(2), tail=tail(16), **parts)


@case(14, free=[12])
def channel_shuffle_module():
    return nn.Sequential(conv(3, 12), nn.ReLU(), nn.ChannelShuffle(2), conv(12, 4))


def shuffle(x, groups=2):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@case(14, free=[3, 3, 3, 3, 6, 6, 6, 6])
def shufflenet_units():
    """Two units of ShuffleNet V2, the second of which splits what the first has shuffled."""

    def body(s, x):
        x = s.stem(x)
        for branch in (s.one, s.two):
            a, b = x.chunk(2, 1)
            x = shuffle(torch.cat([a, branch(b)], 1))
        return s.tail(x)

    def branch():
        return nn.Sequential(
            conv(6, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            conv(6, 6, groups=6),
            nn.BatchNorm2d(6),
            conv(6, 6, 1),
            nn.ReLU(),
        )

    return Net(body, stem=conv(3, 12), one=branch(), two=branch(), tail=tail(12))


@case(14, free=[10, 12, 12, 14])
def shufflenet_unit_with_stride():
    """The first unit of a stage of ShuffleNet V2: both branches convolve, nothing is split."""

    def body(s, x):
        x = F.relu(s.stem(x))
        return s.tail(shuffle(torch.cat([s.a1(s.a0(x)), s.b2(s.b1(F.relu(s.b0(x))))], 1)))

    parts = {"a0": conv(10, 10, stride=2, groups=10), "a1": conv(10, 12, 1)}
    parts |= {"b0": conv(10, 14, 1), "b1": conv(14, 14, stride=2, groups=14), "b2": conv(14, 12, 1)}
    return Net(body, stem=conv(3, 10), tail=tail(24), **parts)


case(15, free=[4])(nets.pixel_shuffle)


@case(15, free=[4, 8])
def pixel_unshuffle():
    return nn.Sequential(conv(3, 4), nn.ReLU(), nn.PixelUnshuffle(2), conv(16, 8), nn.ReLU(), conv(8, 3))


@case(15, free=[4, 8])
def space_to_depth_view():
    def body(s, x):
        x = F.relu(s.a(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return s.c(F.relu(s.b(x)))

    return Net(body, a=conv(3, 4), b=conv(16, 8), c=conv(8, 3))


@case(15, free=[6])
def depth_to_space_view():
    def body(s, x):
        x = s.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)
        return s.b(x)

    return Net(body, a=conv(3, 24), b=conv(6, 3))


@case(15, free=[8, 6], inputs=maps(12, 4))
def super_resolution():
    def body(s, x):
        return s.last(F.pixel_shuffle(s.up(F.relu(s.a(F.pixel_shuffle(x, 2)))), 2))

    return Net(body, a=conv(3, 8), up=conv(8, 24), last=conv(6, 3))


case(19, free=[6, 10])(nets.flatten_to_linear)


@case(19, free=[6, 10], inputs=lambda n: torch.randn(n, 3, 9))
def flatten_1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(42, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)
    )


@case(19, free=[5, 10], inputs=lambda n: torch.randn(n, 2, 4, 4, 4))
def flatten_3d():
    return nn.Sequential(nn.Conv3d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 10), nn.Tanh(), nn.Linear(10, 3))


@case(19, "view(n, -1)", free=[6])
@case(19, "view(-1, 384)", free=[6])
@case(19, "reshape", free=[6])
@case(19, "flatten(-3)", free=[6])
def flatten_written_as(how):
    def body(s, x):
        x = s.a(x)
        flat = {
            "view(n, -1)": lambda: x.view(x.size(0), -1),
            "view(-1, 384)": lambda: x.view(-1, 384),
            "reshape": lambda: x.reshape(x.shape[0], 6 * 8 * 8),
            "flatten(-3)": lambda: x.flatten(-3),
        }
        return s.b(flat[how]())

    return Net(body, a=conv(3, 6), b=nn.Linear(384, 4))


case(20, free=[6])(nets.channels_last_flatten)


@case(20, free=[6, 10])
def channels_last_with_linears():
    def body(s, x):
        x = F.gelu(s.b(s.a(x.permute(0, 2, 3, 1))))
        return s.c(x.reshape(x.shape[0], -1))

    return Net(body, a=nn.Linear(3, 6), b=nn.Linear(6, 10), c=nn.Linear(640, 4))


@case(20, free=[8], inputs=tokens(6))
def tokens_flattened():
    return Net(lambda s, x: s.b(torch.relu(s.a(x)).flatten(1)), a=nn.Linear(6, 8), b=nn.Linear(40, 3))


@case(21, "channels first", free=[6, 10])
@case(21, "rows first", free=[6, 10])
def columns_of_a_map(order):
    """As in a CRNN: (batch, channels, height, width) to a sequence over the width."""

    def body(s, x):
        x = F.relu(s.a(x))
        x = x.permute(0, 3, 1, 2) if order == "channels first" else x.permute(0, 3, 2, 1)
        return s.c(torch.tanh(s.b(x.flatten(2))))

    return Net(body, a=conv(3, 6), b=nn.Linear(48, 10), c=nn.Linear(10, 4))


@case(21, free=[6, 10])
def columns_by_transposed_reshape():
    def body(s, x):
        x = F.relu(s.a(x))
        n, c, h, w = x.shape
        return s.c(torch.relu(s.b(x.reshape(n, c * h, w).transpose(1, 2))))

    return Net(body, a=conv(3, 6), b=nn.Linear(48, 10), c=nn.Linear(10, 4))


IMAGE_AND_VECTOR = lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 7))


@case(22, "image first", free=[6, 9, 10], inputs=IMAGE_AND_VECTOR)
@case(22, "vector first", free=[6, 9, 10], inputs=IMAGE_AND_VECTOR)
@case(22, "raw vector", free=[6, 10], inputs=IMAGE_AND_VECTOR)
def flatten_beside_a_vector(how):
    def body(s, x, v):
        flat = F.max_pool2d(F.relu(s.a(x)), 2).flatten(1)
        v = v if how == "raw vector" else F.relu(s.v(v))
        parts = [v, flat] if how == "vector first" else [flat, v]
        return s.c(F.relu(s.b(torch.cat(parts, 1))))

    wide = 96 + (7 if how == "raw vector" else 9)
    parts = {} if how == "raw vector" else {"v": nn.Linear(7, 9)}
    return Net(body, a=conv(3, 6), b=nn.Linear(wide, 10), c=nn.Linear(10, 3), **parts)


case(23, free=[6])(nets.linear_to_map)


@case(23, free=[16, 6, 5], inputs=vectors(7))
def generator():
    return nn.Sequential(
        nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 96), nn.Unflatten(1, (6, 4, 4)), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 2, 2), nn.ReLU(), conv(5, 3), nn.Tanh(),
    )  # fmt: skip


@case(23, free=[6, 12], inputs=vectors(7))
def linear_to_a_channels_last_map():
    def body(s, x):
        x = F.relu(s.a(x)).view(-1, 4, 4, 6).permute(0, 3, 1, 2)
        return s.c(F.relu(s.b(x)))

    return Net(body, a=nn.Linear(7, 96), b=conv(6, 12), c=conv(12, 3))


@case(23, free=[6, 4])
def autoencoder_through_a_vector():
    def body(s, x):
        x = F.relu(s.a(x))
        z = s.into(x.flatten(1))
        return s.b(F.relu(s.back(z).view_as(x)))

    return Net(body, a=conv(3, 6, stride=2), into=nn.Linear(96, 4), back=nn.Linear(4, 96), b=conv(6, 3))


case(50, free=[8])(nets.flipped)
case(50, free=[6])(nets.stacked)
case(50, free=[8], frozen="picked out by a fixed index")(nets.fixed_index_gate)


@case(50, "list", free=[8])
@case(50, "buffer", free=[8])
@case(50, "index_select", free=[8])
@case(50, "argsort", free=[8])
def permuted_channels(how):
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])

    def body(s, x):
        x = F.relu(s.a(x))
        if how == "list":
            y = x[:, order.tolist()]
        elif how == "index_select":
            y = x.index_select(1, s.order)
        else:
            y = x[:, s.order if how == "buffer" else s.order.argsort()]
        return s.c(y + s.b(x.mean((2, 3), keepdim=True)))

    return Net(body, a=conv(3, 8), b=conv(8, 8, 1), c=conv(8, 4), order=order)


@case(50, free=[5, 3])
def some_channels_by_index():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.b(x[:, [0, 2, 3, 5, 6]]) + s.c(x)

    return Net(body, a=conv(3, 8), b=conv(5, 4), c=conv(8, 4))


@case(50, free=[3], inputs=tokens(6))
def flipped_halves():
    """Unit j meets unit 4 - j, in both halves."""

    def body(s, x):
        a, b = s.a(x).chunk(2, -1)
        return s.b(torch.cat([b.flip(-1), a], -1) * torch.cat([a, b], -1))

    return Net(body, a=nn.Linear(6, 10), b=nn.Linear(10, 3))


case(51, free=[3, 6])(nets.repeated)


@case(51, free=[3, 6])
def each_channel_repeated():
    return Net(lambda s, x: s.b(F.relu(s.a(x)).repeat_interleave(3, 1)), a=conv(3, 6), b=conv(18, 4))


@case(51, free=[2, 6, 6])
def tiled_and_added():
    def body(s, x):
        x = s.a(x)
        return s.c(s.b(x).repeat(1, 2, 1, 1) + s.wide(x))

    return Net(body, a=conv(3, 6), b=conv(6, 6), wide=conv(6, 12), c=conv(12, 4))


@case(51, "linear", free=[6, 10])
@case(51, "matmul", free=[6, 10])
def unfolded_patches(how):
    def body(s, x):
        columns = F.unfold(F.relu(s.a(x)), 3, padding=1)
        y = s.w @ columns if how == "matmul" else s.b(columns.transpose(1, 2)).transpose(1, 2)
        return s.c(F.relu(y).unflatten(-1, (8, 8)))

    part = {"w": nn.Parameter(torch.randn(10, 54) / 7)} if how == "matmul" else {"b": nn.Linear(54, 10)}
    return Net(body, a=conv(3, 6), c=conv(10, 4), **part)


@case(51, free=[6, 5], frozen="becomes space in aten.col2im")
def patches_mixed_and_folded_back():
    def body(s, x):
        patches = F.unfold(F.relu(s.a(x)), 2, stride=2)
        return s.c(F.fold(s.b(patches.mT).mT, (8, 8), 2, stride=2))

    return Net(body, a=conv(3, 6), b=nn.Linear(24, 20), c=conv(5, 4))


@case(51, free=[6])
def windows_by_tensor_unfold():
    def body(s, x):
        x = F.relu(s.a(x)).unfold(2, 2, 2).unfold(3, 2, 2)
        return s.b(x.permute(0, 2, 3, 1, 4, 5).flatten(3))

    return Net(body, a=conv(3, 6), b=nn.Linear(24, 4))


@case(51, free=[8], frozen="pool", budget="params=85%")
def pooled_over_channels():
    def body(s, x):
        x = s.b(F.relu(s.a(x)))
        return s.c(F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), 4).transpose(1, 2).unflatten(-1, (8, 8)))

    return Net(body, a=conv(3, 8), b=conv(8, 12), c=conv(4, 5))


@case(51, free=[5, 3], inexact=True)
def maxout():
    def body(s, x):
        x = s.a(x)
        n, c, h, w = x.shape
        return s.b(x.view(n, c // 3, 3, h, w).amax(2))

    return Net(body, a=conv(3, 15), b=conv(5, 4))
