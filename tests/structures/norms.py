"""Rows 30-34, 47, 48: normalization, tied weights, parameters and buffers used directly."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import nets
from nets import Net, conv, tail
from structures import case, ids, maps, tokens, vectors

case(30, free=[4, 3, 6], inexact=True)(nets.group_norm)
case(30, free=[16, 12], inputs=vectors(6), inexact=True)(nets.layer_norms)


@case(30, free=[4, 4, 6], inexact=True)
def group_norm_in_a_residual():
    def body(s, x):
        x = s.stem(x)
        y = s.a(F.silu(s.norm(x)))
        return s.tail(x + s.b(F.silu(y)))

    return Net(body, stem=conv(3, 16), norm=nn.GroupNorm(4, 16), a=conv(16, 6), b=conv(6, 16), tail=tail(16))


@case(30, free=[8], inexact=True)
def layer_norm_over_maps():
    return nn.Sequential(conv(3, 8), nn.LayerNorm([8, 8, 8]), nn.ReLU(), conv(8, 4))


@case(30, "dynamic", free=[16], inputs=tokens(6), inexact=True)
@case(30, "static", free=[16], inputs=tokens(6), inexact=True)
@case(30, "with parameters", free=[16], inputs=tokens(6), inexact=True)
def functional_layer_norm(how):
    def body(s, x):
        x = s.a(x)
        if how == "with parameters":
            return s.b(F.layer_norm(x, x.shape[-1:], s.w, s.shift))
        return s.b(F.gelu(F.layer_norm(x, x.shape[-1:] if how == "dynamic" else (16,))))

    parts = {"w": nn.Parameter(torch.rand(16)), "shift": nn.Parameter(torch.rand(16))}
    return Net(body, a=nn.Linear(6, 16), b=nn.Linear(16, 3), **(parts if how == "with parameters" else {}))


@case(30, free=[8, 32], inexact=True)
def convnext_block():
    def body(s, x):
        x = s.stem(x)
        y = s.norm(s.depth(x).permute(0, 2, 3, 1))
        y = s.down(F.gelu(s.up(y))) * s.gamma
        return s.tail(x + y.permute(0, 3, 1, 2))

    parts = {"depth": conv(8, 8, 7, groups=8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}
    return Net(body, stem=conv(3, 8), norm=nn.LayerNorm(8), gamma=nn.Parameter(torch.rand(8)), tail=tail(8), **parts)


@case(31, "module", free=[16], inputs=tokens(6), inexact=True)
@case(31, "functional", free=[16], inputs=tokens(6), inexact=True)
@case(31, "by hand", free=[16], inputs=tokens(6), inexact=True)
@case(31, "in float32", free=[16], inputs=tokens(6), inexact=True)
def rms_norm(how):
    def body(s, x):
        x = s.a(x)
        if how == "module":
            x = s.norm(x)
        elif how == "functional":
            x = F.rms_norm(x, (x.shape[-1],), s.w, 1e-6)
        elif how == "by hand":
            x = s.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        else:
            y = x.float()
            x = s.w * (y / y.square().mean(-1, keepdim=True).add(1e-6).sqrt()).to(x.dtype)
        return s.b(F.silu(x))

    part = {"norm": nn.RMSNorm(16)} if how == "module" else {"w": nn.Parameter(torch.rand(16) + 0.5)}
    return Net(body, a=nn.Linear(6, 16), b=nn.Linear(16, 3), **part)


case(32, free=[8])(nets.instance_norm)


@case(32, "affine", free=[8])
@case(32, "bare", free=[8])
@case(32, "functional", free=[8])
def instance_norms(how):
    def body(s, x):
        x = s.a(x)
        return s.b(F.relu(F.instance_norm(x) if how == "functional" else s.norm(x)))

    part = {} if how == "functional" else {"norm": nn.InstanceNorm2d(8, affine=how == "affine")}
    return Net(body, a=conv(3, 8), b=conv(8, 4), **part)


@case(32, free=[8, 16], inputs=lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 6)))
def adaptive_instance_norm():
    def body(s, x, style):
        scale, shift = s.style(F.relu(s.map(style))).chunk(2, 1)
        x = F.instance_norm(s.a(x))
        return s.b(F.relu(x * scale[..., None, None] + shift[..., None, None]))

    return Net(body, a=conv(3, 8), b=conv(8, 4), map=nn.Linear(6, 16), style=nn.Linear(16, 16))


case(33, free=[8, 24], inputs=ids())(nets.tied_linear)


@case(33, free=[8, 24], inputs=ids())
def embedding_as_the_head():
    def body(s, words):
        x = s.emb(words)
        return F.linear(x + s.down(F.relu(s.up(x))), s.emb.weight)

    return Net(body, emb=nn.Embedding(20, 8), up=nn.Linear(8, 24), down=nn.Linear(24, 8))


@case(33, free=[10], inputs=tokens(6))
def two_linears_of_one_weight():
    net = Net(
        lambda s, x: s.c(F.relu(s.a(x)) * torch.tanh(s.b(x))),
        a=nn.Linear(6, 10), b=nn.Linear(6, 10), c=nn.Linear(10, 3),
    )  # fmt: skip
    net.b.weight = net.a.weight
    return net


@case(33, free=[10], inputs=vectors(6))
def autoencoder_of_one_weight():
    return Net(
        lambda s, x: F.linear(torch.relu(F.linear(x, s.w, s.b)), s.w.t()),
        w=nn.Parameter(torch.randn(10, 6)), b=nn.Parameter(torch.randn(10)),
    )  # fmt: skip


@case(33, free=[10], inputs=tokens(6))
def two_linears_in_a_row_of_one_weight():
    """Outputs of the first are inputs of the second, so rows and columns of the weight go together."""
    net = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(F.relu(s.up(x))))))),
        up=nn.Linear(6, 10), a=nn.Linear(10, 10), b=nn.Linear(10, 10), c=nn.Linear(10, 3),
    )  # fmt: skip
    net.b.weight = net.a.weight
    return net


case(34, free=[8])(nets.layer_scale)
case(34, free=[8])(nets.plain_attribute)


@case(34, "(C, 1, 1)", free=[8])
@case(34, "(C).view(1, -1, 1, 1)", free=[8])
@case(34, "(C).view(1, 8, 1, 1)", free=[8])
@case(34, "(1, C, H, W)", free=[8])
@case(34, "(C, N)", free=[8])
@case(34, "(C)[None, :, None, None]", free=[8])
@case(34, "(1, 1, 1, 1)", free=[8])
def parameter_of_shape(how):
    shapes = {"(C, 1, 1)": (8, 1, 1), "(1, C, H, W)": (1, 8, 8, 8), "(C, N)": (8, 64), "(1, 1, 1, 1)": (1, 1, 1, 1)}

    def body(s, x):
        x = F.relu(s.a(x))
        if how == "(C).view(1, -1, 1, 1)":
            x = x * s.p.view(1, -1, 1, 1)
        elif how == "(C).view(1, 8, 1, 1)":
            x = x * s.p.view(1, 8, 1, 1)
        elif how == "(C)[None, :, None, None]":
            x = x + s.p[None, :, None, None]
        elif how == "(C, N)":
            x = (x.flatten(2) + s.p).view_as(x)
        else:
            x = x * s.p
        return s.b(x)

    return Net(body, a=conv(3, 8), b=conv(8, 4), p=nn.Parameter(torch.rand(shapes.get(how, (8,)))))


def normed(how):
    """The function that normalizes a layer's weight: by a parametrization, or by hooks as before torch 2."""
    name, _, hooks = how.partition(" ")
    place = nn.utils if hooks else parametrizations

    def norm(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(place, name)(layer)

    return norm


@case(47, "weight_norm", free=[8, 12], inexact=True)
@case(47, "spectral_norm", free=[8, 12], inexact=True)
@case(47, "weight_norm hooks", free=[8, 12], inexact=True)
@case(47, "spectral_norm hooks", free=[8, 12], inexact=True)
def parametrized_convolutions(how):
    norm = normed(how)
    return nn.Sequential(norm(conv(3, 8)), nn.ReLU(), norm(conv(8, 12)), nn.ReLU(), tail(12))


@case(47, "weight_norm", free=[16], inputs=vectors(6), inexact=True)
@case(47, "spectral_norm hooks", free=[16], inputs=vectors(6), inexact=True)
def parametrized_linears(how):
    norm = normed(how)
    return nn.Sequential(norm(nn.Linear(6, 16)), nn.ReLU(), norm(nn.Linear(16, 3)))


@case(47, free=[8, 6])
def weights_masked_by_torchs_own_pruning():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), tail(6))
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.ln_structured(net[2], "weight", 0.3, 2, 0)
    return net


class Positive(nn.Module):
    def forward(self, weight):
        return F.softplus(weight)


@case(47, free=[16], inputs=vectors(6))
def parametrization_of_ones_own():
    layer = nn.Linear(6, 16)
    parametrize.register_parametrization(layer, "weight", Positive())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 3))


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, self.stride, self.padding)


@case(47, free=[8, 12], inexact=True)
def standardized_weights():
    parts = [StandardizedConv(3, 8, 3, padding=1), nn.ReLU(), StandardizedConv(8, 12, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, tail(12))


@case(47, free=[8, 12], inexact=True)
def weights_standardized_by_batch_norm():
    """As ``ScaledStdConv2d`` of timm does it: batch norm over the rows of the weight."""

    def body(s, x):
        w = F.batch_norm(s.w.reshape(1, 12, -1), None, None, s.gain.view(-1), training=True).reshape_as(s.w)
        return s.tail(F.relu(F.conv2d(F.relu(s.a(x)), w, s.b, padding=1)))

    parts = {"w": nn.Parameter(torch.randn(12, 8, 3, 3)), "gain": nn.Parameter(torch.rand(12, 1, 1, 1) + 0.5)}
    return Net(body, a=conv(3, 8), b=nn.Parameter(torch.rand(12)), tail=tail(12), **parts)


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and scales are buffers, as detectors have it."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


@case(48, free=[8, 12])
def frozen_batch_norms():
    return nn.Sequential(conv(3, 8), FrozenBatchNorm(8), nn.ReLU(), conv(8, 12), FrozenBatchNorm(12), tail(12))


@case(48, free=[8])
def scales_in_buffers():
    def body(s, x):
        return s.b(torch.where(s.on[:, None, None], s.a(x) * s.scale.view(-1, 1, 1), s.level[None]))

    on = torch.tensor([True, False] * 4)
    return Net(body, a=conv(3, 8), b=conv(8, 4), scale=torch.rand(8), on=on, level=torch.rand(8, 8, 8))


@case(48, free=[6], inputs=tokens(6))
def table_looked_up_by_an_index():
    """A table of biases, one column per channel, read through a constant index over positions."""

    def body(s, x):
        return s.b(F.relu(s.a(x) + s.table[s.index.view(-1)].view(5, 6)))

    table = nn.Parameter(torch.randn(9, 6))
    return Net(body, a=nn.Linear(6, 6), b=nn.Linear(6, 3), table=table, index=torch.tensor([8, 3, 3, 0, 5]))


@case(48, free=[8], inputs=maps(3))
def normalized_input_and_channel_mask():
    def body(s, x):
        x = (x - s.mean) / s.std
        return s.tail(F.relu(s.a(x)).masked_fill(s.off, 0.0))

    off = torch.tensor([False, True, False, False] * 2).view(1, 8, 1, 1)
    mean, std = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1) + 0.5
    return Net(body, a=conv(3, 8), tail=tail(8), off=off, mean=mean, std=std)


@case(30, free=[6], frozen="spatial dimension of aten.avg_pool3d")
def local_response_norm():
    """As in AlexNet: channels are averaged with their neighbours, so that distances matter."""
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.LocalResponseNorm(3), conv(8, 6), nn.ReLU(), tail(6))


@case(30, free=[6, 10], inexact=True)
def layer_norm_of_a_flattened_map():
    parts = [conv(3, 6, stride=2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 10), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(10, 3))


@case(33, free=[8])
def convolution_and_its_transpose_of_one_weight():
    return Net(
        lambda s, x: F.conv_transpose2d(F.relu(s.b(F.relu(s.a(x)))), s.a.weight, padding=1), a=conv(3, 8), b=conv(8, 8)
    )
