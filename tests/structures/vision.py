"""Row 56: deformable convolution in plain torch. (torchvision's operators have tests of their own.)"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv
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
