"""Operators of torchvision under the law. Its compiled library may be absent, so reference kernels stand in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv, image
from secateur.graph import analyze
from secateur.testing import check_removing_is_zeroing

DEFORM = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt "
    "stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt "
    "offset_groups, bool use_mask) -> Tensor"
)
ALIGN = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)


def deform(x, weight, offset, mask, bias, *numbers):
    """3 x 3 taps, stride and padding of one: tap k of offset group g reads at its place plus its offset."""
    groups, offset_groups = numbers[6], numbers[7]
    n, c, h, w = x.shape
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    taps = []
    for k in range(9):
        parts = []
        for g, part in enumerate(x.chunk(offset_groups, 1)):
            dy, dx = offset.view(n, offset_groups, 9, 2, h, w)[:, g, k].unbind(1)
            grid = torch.stack([xs + k % 3 - 1 + dx, ys + k // 3 - 1 + dy], -1) * 2 / (h - 1) - 1
            parts.append(
                F.grid_sample(part, grid, align_corners=True) * mask.view(n, offset_groups, 9, h, w)[:, g, k, None]
            )
        taps.append(torch.cat(parts, 1))
    taps = torch.stack(taps, 2).view(n, groups, c // groups, 9, h, w)
    kernel = weight.view(groups, -1, c // groups, 9)
    return torch.einsum("ngckhw,gock->ngohw", taps, kernel).reshape(n, -1, h, w) + bias.view(1, -1, 1, 1)


def align(x, rois, *_):
    return x[rois[:, 0].long()][:, :, :4, :4]


@pytest.fixture(scope="module")
def library(torchvision):
    """Schemas and kernels of the operators that the installed torchvision lacks."""
    held = torch.library.Library("torchvision", "FRAGMENT")
    for schema, kernel in ((DEFORM, deform), (ALIGN, align)):
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            held.define(schema)
            held.impl(name, kernel, "CPU")
            held._register_fake(name, kernel)
    return held


@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_deformable_convolutions(library, groups, offset_groups):
    def body(s, x):
        x = F.relu(s.a(x))
        numbers = (1, 1, 1, 1, 1, 1, groups, offset_groups, True)
        y = torch.ops.torchvision.deform_conv2d(x, s.w, s.offset(x), torch.sigmoid(s.mask(x)), s.bias, *numbers)
        return s.b(F.relu(y))

    net = Net(
        body,
        a=conv(3, 8),
        w=nn.Parameter(torch.randn(8, 8 // groups, 3, 3) / 5),
        bias=nn.Parameter(torch.randn(8)),
        offset=conv(8, 18 * offset_groups),
        mask=conv(8, 9 * offset_groups),
        b=conv(8, 4),
    ).eval()
    assert analyze(net, image()).weights["w"].macs == 2 * 64 * 8 * 9 * 8 // groups
    free = sorted(a.units for a in analyze(net, image()).free)
    assert free == {(1, 1): [8, 8], (2, 1): [2, 4, 4], (1, 2): [4, 8], (4, 2): [2, 2, 2]}[groups, offset_groups]
    check_removing_is_zeroing(net, image(), "params=80%")


def test_features_of_regions(library):
    def body(s, x):
        rois = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 2, 2, 6, 6], [1.0, 0, 0, 8, 8]])
        return s.b(torch.ops.torchvision.roi_align(F.relu(s.a(x)), rois, 1.0, 4, 4, 2, True))

    net = Net(body, a=conv(3, 8), b=conv(8, 4)).eval()
    assert [a.units for a in analyze(net, image()).free] == [8]
    check_removing_is_zeroing(net, image())
