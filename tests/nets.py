"""Small networks, each with one structure that a pruner can get wrong."""

from __future__ import annotations

import torch
from parts import Net, conv, image, tail
from token_nets import attention, fused_attention, grouped_queries, heads_merged_into_the_batch, tied_linear
from torch import nn
from torch.nn import functional as F


def plain():
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 12), nn.PReLU(12), tail(12))


def plain_1d():
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 6, 3, bias=False), nn.Flatten())


def plain_3d():
    return nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8, affine=False), nn.SiLU(), nn.Conv3d(8, 4, 2))


def residual():
    def body(s, x):
        x = s.stem(x)
        x = x + s.b(F.relu(s.a(x)))
        y = s.d(F.relu(s.c(x)))
        y += x
        return s.tail(y)

    return Net(body, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), c=conv(8, 10), d=conv(10, 8), tail=tail(8))


def residual_with_the_input():
    return Net(lambda s, x: x + s.b(F.relu(s.a(x))), a=conv(3, 8), b=conv(8, 3))


def option_a_shortcut():
    def body(s, x):
        x = s.stem(x)
        return s.tail(F.relu(s.b(F.relu(s.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))

    return Net(body, stem=conv(3, 8), a=conv(8, 16, stride=2), b=conv(16, 16), tail=tail(16))


def dense_cat():
    def body(s, x):
        a = F.relu(s.a(x))
        b = F.relu(s.b(a))
        return s.tail(s.c(torch.cat([a, b, a], 1)))

    return Net(body, a=conv(3, 6), b=conv(6, 4), c=conv(16, 8), tail=tail(8))


def cat_with_the_input():
    return Net(lambda s, x: s.b(torch.cat([x, F.relu(s.a(x))], 1)), a=conv(3, 6), b=conv(9, 4))


def cat_channels_last():
    def body(s, x):
        x = torch.cat([s.a(x), s.b(x)], 2)
        return s.c(torch.relu(x))

    return Net(body, a=nn.Linear(6, 8), b=nn.Linear(6, 10), c=nn.Linear(18, 3))


def chunk_gate():
    def body(s, x):
        a, b = s.a(x).chunk(2, 1)
        return s.b(a * torch.sigmoid(b))

    return Net(body, a=conv(3, 16), b=conv(8, 4))


def split_to_branches():
    def body(s, x):
        x = s.a(x)
        a, b, c = torch.split(x, [4, 6, 6], 1)
        return s.d(torch.cat([a, s.b(b), s.c(c)], 1))

    return Net(body, a=conv(3, 16), b=conv(6, 6), c=conv(6, 6), d=conv(16, 4))


def slices():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.b(x[:, :6]) + s.c(x[:, 6:]) + s.d(x[:, ::2]) + s.e(x[:, 1::2])

    return Net(body, a=conv(3, 12), b=conv(6, 4), c=conv(6, 4), d=conv(6, 4), e=conv(6, 4))


def flipped():
    return Net(lambda s, x: s.c(s.a(x).flip(1) + s.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4))


def shuffled():
    def body(s, x):
        x = s.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = x.chunk(2, 1)
        return s.c(torch.cat([a, F.relu(s.b(b))], 1))

    return Net(body, a=conv(3, 12), b=conv(6, 6), c=conv(12, 4))


def depthwise():
    return nn.Sequential(conv(3, 12), nn.ReLU6(), conv(12, 12, groups=12), nn.BatchNorm2d(12), conv(12, 4, 1))


def depth_multiplier():
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(), conv(16, 4, 1))


def grouped():
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), conv(12, 16, groups=4), nn.BatchNorm2d(16), conv(16, 8, groups=2), tail(8)
    )


def transposed():
    return nn.Sequential(
        conv(3, 8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 12, 3, groups=3),
        conv(12, 4),
    )


def flatten_to_linear():
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def channels_last_flatten():
    def body(s, x):
        return s.b(F.relu(s.a(x)).permute(0, 2, 3, 1).flatten(1))

    return Net(body, a=conv(3, 6), b=nn.Linear(384, 4))


def linear_to_map():
    def body(s, x):
        return s.b(F.relu(s.a(x.mean((2, 3)))).view(-1, 6, 4, 4))

    return Net(body, a=nn.Linear(3, 96), b=conv(6, 4))


def squeeze_excite():
    def body(s, x):
        x = s.a(x)
        gate = torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3), keepdim=True)))))
        return s.b(x * gate)

    return Net(body, a=conv(3, 12), down=conv(12, 4, 1), up=conv(4, 12, 1), b=conv(12, 4))


def layer_scale():
    def body(s, x):
        x = s.a(x)
        return s.c(x + s.gamma * F.gelu(s.b(x)) * s.mask.view(1, -1, 1, 1))

    return Net(
        body,
        a=conv(3, 8),
        b=conv(8, 8),
        c=conv(8, 4),
        gamma=nn.Parameter(torch.rand(8, 1, 1)),
        mask=torch.rand(8),
    )


def plain_attribute():
    def body(s, x):
        return s.b(s.a(x) * s.scale[0])

    net = Net(body, a=conv(3, 8), b=conv(8, 4))
    net.scale = [torch.rand(8, 1, 1)]
    return net


def group_norm():
    return nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 6), nn.GroupNorm(6, 6), tail(6))


def instance_norm():
    return nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU(), conv(8, 4))


def layer_norms():
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 12), nn.RMSNorm(12), nn.Linear(12, 3)
    )


def shared_module():
    def body(s, x):
        x = s.a(x)
        return s.c(s.norm(s.b(s.norm(s.b(x)))))

    return Net(body, a=conv(3, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8), c=conv(8, 4))


def parameter_matmul():
    return Net(
        lambda s, x: F.gelu(x @ s.w + s.b) @ s.v,
        w=nn.Parameter(torch.randn(6, 16)),
        b=nn.Parameter(torch.randn(16)),
        v=nn.Parameter(torch.randn(16, 3)),
    )


def slice_assignment():
    def body(s, x):
        x = s.a(x)
        out = torch.zeros(x.shape[0], 16, *x.shape[2:])
        out[:, :8] = x
        out[:, 8:] = s.b(x)
        return s.c(F.relu(out))

    return Net(body, a=conv(3, 8), b=conv(8, 8), c=conv(16, 4))


def fixed_index_gate():
    def body(s, x):
        x = s.a(x)
        return s.b(x * torch.sigmoid(x[:, 3:4]) + x[:, 5].unsqueeze(1))

    return Net(body, a=conv(3, 10), b=conv(10, 4))


def outer_product():
    def body(s, x):
        a, b = s.a(x).mean((2, 3)), s.b(x).mean((2, 3))
        return s.c((a[:, :, None] * b[:, None, :]).flatten(1))

    return Net(body, a=conv(3, 6), b=conv(3, 5), c=nn.Linear(30, 3))


def bilinear_pooling():
    def body(s, x):
        a = s.a(x).flatten(2)
        return s.c((a @ a.transpose(1, 2)).flatten(1))

    return Net(body, a=conv(3, 6), c=nn.Linear(36, 3))


def dropout_and_norm():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5, inplace=True), nn.ReLU(), nn.Linear(16, 3)
    )


def pixel_shuffle():
    return nn.Sequential(conv(3, 16), nn.ReLU(), nn.PixelShuffle(2), conv(4, 3))


def unet():
    def body(s, x):
        a = F.relu(s.a(x))
        b = F.interpolate(F.relu(s.b(F.max_pool2d(a, 2))), scale_factor=2)
        return s.c(torch.cat([a, b], 1))

    return Net(body, a=conv(3, 8), b=conv(8, 8), c=conv(16, 3))


def channel_mean_attention():
    def body(s, x):
        x = s.a(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return s.b(x * torch.sigmoid(s.gate(pooled)))

    return Net(body, a=conv(3, 8), gate=conv(2, 1), b=conv(8, 4))


def stacked():
    def body(s, x):
        return s.c(torch.stack([s.a(x), s.b(x)], 2).flatten(1, 2))

    return Net(body, a=conv(3, 6), b=conv(3, 6), c=conv(12, 4))


def repeated():
    return Net(lambda s, x: s.b(s.a(x).repeat(1, 3, 1, 1)), a=conv(3, 6), b=conv(18, 4))


def narrowed():
    def body(s, x):
        x = F.relu(s.a(x))
        return s.b(x.narrow(1, 2, 6)) + s.c(x[:, -4:])

    return Net(body, a=conv(3, 10), b=conv(6, 4), c=conv(4, 4))


def softmax_over_channels():
    return Net(lambda s, x: s.c(s.b(F.relu(s.a(x))).softmax(1)), a=conv(3, 8), b=conv(8, 6), c=conv(6, 4))


def transposed_1d_and_3d():
    def body(s, x):
        x = s.b(F.relu(s.a(x.flatten(2))))
        return s.d(F.relu(s.c(x[:, :, None, None])))

    return Net(
        body,
        a=nn.ConvTranspose1d(3, 8, 3),
        b=nn.ConvTranspose1d(8, 4, 1, groups=2),
        c=nn.ConvTranspose3d(4, 6, 1),
        d=nn.Conv3d(6, 2, 1),
    )


def two_outputs():
    return Net(lambda s, x: {"y": s.b(F.relu(s.a(x))), "none": None, "sum": x.sum()}, a=conv(3, 8), b=conv(8, 4))


TOKENS = torch.randn(2, 5, 8)
FLAT = torch.randn(3, 6)
MAPS = {f.__name__: (f, image) for f in (
    plain, residual, residual_with_the_input, option_a_shortcut, dense_cat, cat_with_the_input, chunk_gate,
    split_to_branches, slices, flipped, shuffled, depthwise, depth_multiplier, grouped, transposed, flatten_to_linear,
    channels_last_flatten, linear_to_map, squeeze_excite, layer_scale, plain_attribute, group_norm, instance_norm,
    shared_module, slice_assignment, fixed_index_gate, outer_product, bilinear_pooling, pixel_shuffle, unet,
    channel_mean_attention, stacked, repeated, narrowed, softmax_over_channels, transposed_1d_and_3d, two_outputs,
)}  # fmt: skip
OTHERS = {
    "plain_1d": (plain_1d, lambda: torch.randn(2, 3, 12)),
    "plain_3d": (plain_3d, lambda: torch.randn(2, 2, 5, 5, 5)),
    "cat_channels_last": (cat_channels_last, lambda: torch.randn(2, 5, 6)),
    "layer_norms": (layer_norms, lambda: FLAT),
    "dropout_and_norm": (dropout_and_norm, lambda: FLAT),
    "parameter_matmul": (parameter_matmul, lambda: FLAT),
    "tied_linear": (tied_linear, lambda: torch.randint(0, 20, (2, 7))),
    "attention": (attention, lambda: TOKENS),
    "heads_merged_into_the_batch": (heads_merged_into_the_batch, lambda: TOKENS),
    "fused_attention": (fused_attention, lambda: TOKENS),
    "grouped_queries": (grouped_queries, lambda: TOKENS),
}
NETS = {**MAPS, **OTHERS}


def enliven_(net):
    """Batch norms that do something."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
            m.running_mean.uniform_(-0.3, 0.3)
            m.running_var.uniform_(0.7, 1.3)
            if m.affine:
                nn.init.uniform_(m.weight, 0.6, 1.4)
                nn.init.uniform_(m.bias, -0.3, 0.3)
    return net


def build(name, seed=0):
    """The network and its inputs, in evaluation mode."""
    torch.manual_seed(seed)
    factory, inputs = NETS[name]
    return enliven_(factory()).eval(), inputs()
