"""Rows 4-12, 46, 49: what is put together and taken apart along channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import nets
from nets import Net, conv, tail
from structures import case, tokens, vectors

case(4, free=[6, 4, 8])(nets.dense_cat)
case(4, free=[8, 8])(nets.unet)


@case(4, free=[6, 4, 8])
def nested_cat():
    def body(s, x):
        a, b = s.a(x), s.b(x)
        inner = torch.cat([a, b], 1)
        outer = torch.cat([F.relu(inner), s.c(inner), a], 1)
        return s.d(outer)

    return Net(body, a=conv(3, 6), b=conv(3, 4), c=conv(10, 8), d=conv(24, 5))


@case(4, free=[6])
def cat_of_the_same_twice():
    def body(s, x):
        x = s.a(x)
        return s.b(torch.cat([x, x], 1))

    return Net(body, a=conv(3, 6), b=conv(12, 4))


@case(4, free=[3, 5, 4, 6, 7])
def inception():
    def body(s, x):
        return s.tail(torch.cat([s.a(x), s.b(F.relu(s.b0(x))), s.c(x), s.d(F.max_pool2d(x, 3, 1, 1))], 1))

    parts = {"a": conv(3, 3, 1), "b0": conv(3, 5), "b": conv(5, 4), "c": conv(3, 6, 5), "d": conv(3, 7, 1)}
    return Net(body, tail=tail(20), **parts)


@case(4, free=[6, 4, 5])
def densenet_block():
    def body(s, x):
        x = F.relu(s.stem(x))
        for layer in (s.a, s.b):
            x = torch.cat([x, layer(F.relu(x))], 1)
        return s.tail(s.norm(x))

    return Net(body, stem=conv(3, 6), a=conv(6, 4), b=conv(10, 5), norm=nn.BatchNorm2d(15), tail=tail(15))


case(5, free=[6])(nets.cat_with_the_input)


@case(5, free=[6, 8])
def cat_with_the_input_last():
    def body(s, x):
        return s.c(F.relu(s.b(torch.cat([F.relu(s.a(x)), x], 1))))

    return Net(body, a=conv(3, 6), b=conv(9, 8), c=conv(8, 4))


@case(5, "first", free=[6])
@case(5, "last", free=[6])
def cat_with_coordinates(where):
    def body(s, x):
        y = F.relu(s.a(x))
        ramp = torch.linspace(-1, 1, 8)
        grid = torch.stack([ramp[:, None].expand(8, 8), ramp[None].expand(8, 8)])[None].expand(x.shape[0], 2, 8, 8)
        return s.b(torch.cat([grid, y] if where == "first" else [y, grid], 1))

    return Net(body, a=conv(3, 6), b=conv(8, 4))


@case(5, free=[6, 2])
def cat_with_a_buffer():
    def body(s, x):
        return s.b(torch.cat([F.relu(s.a(x)), s.grid.expand(x.shape[0], -1, -1, -1)], 1))

    return Net(body, a=conv(3, 6), b=conv(8, 4), grid=torch.randn(1, 2, 8, 8))


case(6, free=[8, 10], inputs=tokens(6))(nets.cat_channels_last)


@case(6, -1, free=[8, 10])
@case(6, 3, free=[8, 10])
def cat_of_maps_channels_last(dim):
    def body(s, x):
        x = x.permute(0, 2, 3, 1)
        return s.c(torch.relu(torch.cat([s.a(x), s.b(x)], dim)))

    return Net(body, a=nn.Linear(3, 8), b=nn.Linear(3, 10), c=nn.Linear(18, 3))


@case(7, free=[12], inputs=tokens(6))
def cat_of_tokens():
    return Net(
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1).mean(1)),
        a=nn.Linear(6, 12), b=nn.Linear(6, 12), c=nn.Linear(12, 3),
    )  # fmt: skip


@case(7, free=[1, 12, 10], frozen="picked out by a fixed index", inputs=tokens(6))
def cat_with_learned_tokens():
    def body(s, x):
        x = torch.cat([s.extra.expand(x.shape[0], -1, -1), s.a(x)], 1)
        return s.c(F.gelu(s.b(x)))[:, 0]

    parts = {"a": nn.Linear(6, 12), "b": nn.Linear(12, 10), "c": nn.Linear(10, 3)}
    return Net(body, extra=nn.Parameter(torch.randn(1, 2, 12)), **parts)


case(8, free=[8])(nets.chunk_gate)


@case(8, free=[12], inputs=tokens(6))
def fused_swiglu():
    def body(s, x):
        gate, up = s.both(x).chunk(2, -1)
        return s.down(F.silu(gate) * up)

    return Net(body, both=nn.Linear(6, 24), down=nn.Linear(12, 6))


@case(8, free=[8, 12], inputs=lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 6)))
def film():
    def body(s, x, condition):
        scale, shift = s.c(F.silu(s.b(condition)))[:, :, None, None].chunk(2, 1)
        return s.tail(F.relu(s.a(x) * (1 + scale) + shift))

    return Net(body, a=conv(3, 8), b=nn.Linear(6, 12), c=nn.Linear(12, 16), tail=tail(8))


@case(8, free=[8, 10])
def simple_gate_with_depthwise():
    """As in NAFNet: a depthwise convolution before the halves meet."""

    def body(s, x):
        x = s.stem(x)
        a, b = s.depth(s.up(x)).chunk(2, 1)
        return s.tail(x + s.down(a * b))

    parts = {"up": conv(8, 20, 1), "depth": conv(20, 20, groups=20), "down": conv(10, 8, 1)}
    return Net(body, stem=conv(3, 8), tail=tail(8), **parts)


@case(8, free=[8], inputs=lambda n: (torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))))
def batch_norm_scaled_by_a_class():
    def body(s, x, label):
        scale, shift = s.styles(label)[..., None, None].chunk(2, 1)
        return s.tail(F.relu(s.norm(s.a(x)) * scale + shift))

    norm = nn.BatchNorm2d(8, affine=False)
    return Net(body, a=conv(3, 8), norm=norm, styles=nn.Embedding(5, 16), tail=tail(8))


case(9, free=[4, 6, 6, 6, 6])(nets.split_to_branches)


@case(9, "shortcut", free=[8, 8, 6, 10])
@case(9, "plain", free=[8, 8, 6, 8, 10])
def c2f(kind):
    """As in YOLOv8."""

    def body(s, x):
        y = list(s.cv1(x).chunk(2, 1))
        z = s.m1(F.silu(s.m0(y[-1])))
        y.append(y[-1] + z if kind == "shortcut" else z)
        return s.tail(F.silu(s.cv2(torch.cat(y, 1))))

    return Net(body, cv1=conv(3, 16, 1), m0=conv(8, 6), m1=conv(6, 8), cv2=conv(24, 10, 1), tail=tail(10))


@case(9, free=[8, 5, 7, 4, 10, 5])
def cross_stage_partial():
    def body(s, x):
        x = F.relu(s.stem(x))
        y = F.relu(s.b(F.relu(s.a(x))))
        return s.tail(s.out(torch.cat([s.last(y), s.side(x)], 1)))

    parts = {"a": conv(8, 5), "b": conv(5, 7), "last": conv(7, 4, 1), "side": conv(8, 10, 1), "out": conv(14, 5)}
    return Net(body, stem=conv(3, 8), tail=tail(5), **parts)


@case(9, free=[4, 4, 4, 4, 8])
def res2net_block():
    def body(s, x):
        x = F.relu(s.stem(x))
        parts = torch.split(F.relu(s.a(x)), 4, 1)
        y, out = None, []
        for part, layer in zip(parts[:2], (s.b0, s.b1), strict=True):
            y = F.relu(layer(part if y is None else y + part))
            out.append(y)
        return s.tail(F.relu(s.c(torch.cat([*out, parts[2]], 1)) + x))

    return Net(body, stem=conv(3, 8), a=conv(8, 12, 1), b0=conv(4, 4), b1=conv(4, 4), c=conv(12, 8, 1), tail=tail(8))


@case(9, free=[2, 6, 3, 5])
def split_with_sizes_of_its_own():
    def body(s, x):
        a, b = s.a(x).split((2, 6), dim=1)
        return s.d(torch.cat([s.b(F.relu(a)), s.c(b)], 1))

    return Net(body, a=conv(3, 8), b=conv(2, 3), c=conv(6, 5), d=conv(8, 4))


@case(10, free=[8])
def glu_module():
    return nn.Sequential(conv(3, 16), nn.GLU(dim=1), conv(8, 4))


@case(10, free=[12], inputs=tokens(6))
def glu_of_the_last_dimension():
    return Net(lambda s, x: s.b(F.glu(s.a(x))), a=nn.Linear(6, 24), b=nn.Linear(12, 3))


@case(10, free=[8, 8], inputs=lambda n: torch.randn(n, 6, 9))
def conformer_convolution():
    def body(s, x):
        return s.out(F.silu(s.norm(s.depth(F.glu(s.up(F.relu(s.stem(x))), 1)))))

    parts = {"up": nn.Conv1d(8, 16, 1), "depth": nn.Conv1d(8, 8, 3, padding=1, groups=8), "out": nn.Conv1d(8, 4, 1)}
    return Net(body, stem=nn.Conv1d(6, 8, 1), norm=nn.BatchNorm1d(8), **parts)


case(11, free=[2, 4, 2, 2])(nets.narrowed)


@case(11, free=[5, 7])
def two_slices():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.b(x[:, :5]) + s.c(x[:, 5:])

    return Net(body, a=conv(3, 12), b=conv(5, 4), c=conv(7, 4))


@case(11, free=[3, 3, 9])
def partial_convolution():
    """As in FasterNet: a convolution over the first channels only."""

    def body(s, x):
        x = s.a(x)
        return s.tail(F.relu(torch.cat([s.b(x[:, :3]), x[:, 3:]], 1)))

    return Net(body, a=conv(3, 12), b=conv(3, 3), tail=tail(12))


@case(11, free=[4, 8], inputs=vectors(6))
def slices_of_the_last_dimension():
    def body(s, x):
        x = torch.relu(s.a(x))
        return s.b(x[..., -8:]) + s.c(x[..., :-8])

    return Net(body, a=nn.Linear(6, 12), b=nn.Linear(8, 3), c=nn.Linear(4, 3))


case(12, free=[3, 3, 3, 3])(nets.slices)


@case(12, free=[6, 6])
def odd_and_even():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.b(x[:, ::2]) - s.c(x[:, 1::2])

    return Net(body, a=conv(3, 12), b=conv(6, 4), c=conv(6, 4))


@case(12, free=[6])
def odd_times_even():
    def body(s, x):
        x = s.a(x)
        return s.b(x[:, ::2] * torch.tanh(x[:, 1::2]))

    return Net(body, a=conv(3, 12), b=conv(6, 4))


case(46, free=[8, 8])(nets.slice_assignment)


@case(46, free=[3, 5])
def addition_to_a_slice():
    def body(s, x):
        x = s.a(x).clone()
        x[:, :3] += s.b(F.relu(x[:, :3]))
        return s.c(torch.tanh(x))

    return Net(body, a=conv(3, 8), b=conv(3, 3), c=conv(8, 4))


@case(46, frozen="written in steps", inputs=vectors(6))
def odd_and_even_written_in_turn():
    def body(s, x):
        out = x.new_empty(x.shape[0], 12)
        out[:, 0::2] = torch.sin(s.a(x))
        out[:, 1::2] = torch.cos(s.b(x))
        return s.c(out)

    return Net(body, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(12, 3))


@case(46, free=[3, 5])
def channels_overwritten_by_index():
    def body(s, x):
        x = s.a(x).clone()
        x[:, [1, 4, 6]] = s.b(F.relu(x))
        return s.c(torch.tanh(x))

    return Net(body, a=conv(3, 8), b=conv(8, 3), c=conv(8, 4))


@case(46, free=[2, 4], frozen="picked out by a fixed index")
def single_channels_overwritten():
    def body(s, x):
        x = s.a(x).clone()
        x[:, 0].zero_()
        x[:, 3] = 1.0
        x[:, 4:].tanh_()
        return s.b(x)

    return Net(body, a=conv(3, 8), b=conv(8, 4))


@case(46, free=[8], inputs=tokens(6))
def tokens_overwritten():
    """A row of the batch's tokens, not channels."""

    def body(s, x):
        x = s.a(x).clone()
        x[:, 0] = s.start
        return s.b(torch.relu(x))

    return Net(body, a=nn.Linear(6, 8), b=nn.Linear(8, 3), start=nn.Parameter(torch.randn(8)))


case(49, free=[8, 8, 16], budget="params=70%")(nets.option_a_shortcut)


@case(49, free=[8, 4, 16])
def shortcut_padded_behind():
    def body(s, x):
        x = s.stem(x)
        return s.tail(F.relu(s.b(F.relu(s.a(x))) + F.pad(x, (0, 0, 0, 0, 0, 4))))

    return Net(body, stem=conv(3, 8), a=conv(8, 16), b=conv(16, 12), tail=tail(12))


@case(49, free=[8, 4, 16])
def shortcut_with_zeros():
    def body(s, x):
        x = s.stem(x)
        zeros = torch.zeros(x.shape[0], 4, *x.shape[2:], dtype=x.dtype)
        return s.tail(F.relu(s.b(F.relu(s.a(x))) + torch.cat([x, zeros], 1)))

    return Net(body, stem=conv(3, 8), a=conv(8, 16), b=conv(16, 12), tail=tail(12))
