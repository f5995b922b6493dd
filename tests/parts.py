"""What the small networks of the tests are made of."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A body given as a function of (self, x); submodules as keyword arguments."""

    def __init__(self, body, **parts):
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


def conv(i, o, k=3, **kwargs):
    return nn.Conv2d(i, o, k, padding=kwargs.pop("padding", k // 2), **kwargs)


def image(c=3, batch=2):
    return torch.randn(batch, c, 8, 8)


def tail(c, n=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n))
