"""Rows 13, 15, 55, 56: images taken apart, styled, warped. (torchvision's operators have tests of their own.)"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv, tail
from structures import case


def deformed(x, weight, offsets, mask=None):
    """A deformable convolution of 3 x 3 taps, each of which samples where its offset points; the mask weighs it."""
    h, w = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    y = 0.0
    for k in range(9):
        grid = torch.stack([xs, ys], -1) + offsets[:, 2 * k : 2 * k + 2].permute(0, 2, 3, 1)
        taken = F.grid_sample(x, grid, align_corners=True)
        taken = taken if mask is None else taken * mask[:, k : k + 1]
        y = y + torch.einsum("bchw,oc->bohw", taken, weight[:, :, k // 3, k % 3])
    return y


@case(56, "plain", free=[6, 8])
@case(56, "modulated", free=[6, 8])
def deformable_convolution(kind):
    def body(s, x):
        x = F.relu(s.a(x))
        mask = torch.sigmoid(s.mask(x)) if kind == "modulated" else None
        return s.b(F.relu(deformed(x, s.w, torch.tanh(s.offsets(x)), mask)))

    parts = {"w": nn.Parameter(torch.randn(8, 6, 3, 3) / 5), "offsets": conv(6, 18), "b": conv(8, 4)}
    return Net(body, a=conv(3, 6), **parts, **({"mask": conv(6, 9)} if kind == "modulated" else {}))


@case(56, free=[6])
def features_warped_by_a_flow():
    def body(s, x):
        y = F.relu(s.a(x))
        grid = torch.tanh(s.flow(y)).permute(0, 2, 3, 1)
        return s.b(F.grid_sample(y, grid, align_corners=False) - y)

    return Net(body, a=conv(3, 6), flow=conv(6, 2), b=conv(6, 4))


@case(55, free=[8, 6], inexact=True)
def styles_modulate_kernels():
    """As in StyleGAN 2: every image scales and normalizes the kernels for itself, as groups of one convolution."""

    def body(s, x):
        b = x.shape[0]
        x = F.relu(s.a(x))
        style = s.style(x.mean((2, 3))) + 1
        w = s.w[None] * style[:, None, :, None, None]
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, *w.shape[2:]), padding=1, groups=b)
        return s.tail(F.leaky_relu(y.reshape(b, -1, 8, 8)))

    parts = {"style": nn.Linear(8, 8), "w": nn.Parameter(torch.randn(6, 8, 3, 3) / 9)}
    return Net(body, a=conv(3, 8), tail=tail(6), **parts)


@case(55, free=[2, 4, 5])
def involution():
    """Kernels per position from a small network, shared by the channels of a group."""

    def body(s, x):
        x = F.relu(s.a(x))
        kernels = s.kernels(F.relu(s.reduce(x))).view(-1, 2, 9, 8, 8)
        patches = F.unfold(x, 3, padding=1).view(-1, 2, 4, 9, 8, 8)
        return s.b((kernels[:, :, None] * patches).sum(3).flatten(1, 2))

    return Net(body, a=conv(3, 8), reduce=conv(8, 5, 1), kernels=conv(5, 18, 1), b=conv(8, 4))


@case(13, free=[6])
def haar_wavelet():
    def body(s, x):
        x = F.relu(s.a(x))
        a, b, c, d = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
        return s.b(torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1))

    return Net(body, a=conv(3, 6), b=conv(24, 4))


@case(15, free=[8])
def unpooled_by_indices():
    def body(s, x):
        x, at = F.max_pool2d(F.relu(s.a(x)), 2, return_indices=True)
        return s.c(F.max_unpool2d(s.b(x), at, 2))

    return Net(body, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))


@case(39, free=[8], inexact=True)
def similarity_of_two_branches():
    return Net(lambda s, x: F.cosine_similarity(s.a(x).mean((2, 3)), s.b(x).mean((2, 3))), a=conv(3, 8), b=conv(3, 8))
