"""Random small networks out of the operators that Secateur knows, for holding laws to structures nobody thought of."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[nn.Module, list[Tensor]], Tensor]


class Drawn(nn.Module):
    """A network that is drawn: every step reads tensors that earlier steps made, and makes one."""

    def __init__(self, seed: int, steps: int = 7) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.tokens = self.draw.random() < 0.4
        self.kinds: list[str] = []
        self.steps: list[Step] = []
        self.shapes = [(2, 5, 6) if self.tokens else (2, 3, 6, 6)]
        stem = nn.Linear(6, 12) if self.tokens else nn.Conv2d(3, 12, 3, padding=1)
        self._module("stem", stem, 0)
        catalogue = TOKENS if self.tokens else MAPS
        for _ in range(steps):
            kind = self.draw.choice(catalogue)
            kind(self, self.draw.randrange(max(1, len(self.shapes) - 3), len(self.shapes)))
        self._head()

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for step in self.steps:
            made.append(step(self, made))
        return made[-1]

    def example(self) -> Tensor:
        return torch.randn(self.shapes[0], generator=torch.Generator().manual_seed(1))

    # Building blocks for the catalogue. Sizes are found by running the step once.

    def add(self, kind: str, step: Step) -> int:
        made = [torch.randn(shape) for shape in self.shapes]
        with torch.no_grad():
            self.shapes.append(tuple(step(self, made).shape))
        self.kinds.append(kind)
        self.steps.append(step)
        return len(self.shapes) - 1

    def _module(self, kind: str, module: nn.Module, source: int) -> int:
        name = f"{kind}{len(self.steps)}"
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.uniform_(-0.3, 0.3)
                m.running_var.uniform_(0.7, 1.3)
            if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                nn.init.uniform_(m.weight, 0.6, 1.4)
                nn.init.uniform_(m.bias, -0.3, 0.3)
        self.add_module(name, module.eval())
        return self.add(kind, lambda s, t: getattr(s, name)(t[source]))

    def channels(self, i: int) -> int:
        return self.shapes[i][-1] if self.tokens else self.shapes[i][1]

    @property
    def dim(self) -> int:
        return 2 if self.tokens else 1

    def project(self, source: int, width: int) -> int:
        made = self.channels(source)
        return self._module("project", nn.Linear(made, width) if self.tokens else nn.Conv2d(made, width, 1), source)

    def _head(self) -> None:
        last = len(self.shapes) - 1
        if self.draw.random() < 0.3 and not self.tokens:
            n = self.channels(last) * self.shapes[last][2] * self.shapes[last][3]
            self._module("head", nn.Sequential(nn.Flatten(), nn.Linear(n, 3)), last)
        else:
            self.project(last, 3)


def widen(net: Drawn, i: int) -> None:
    width = net.draw.choice([6, 8, 12])
    if net.tokens or net.draw.random() < 0.4:
        net.project(i, width)
    else:
        net._module("conv", nn.Conv2d(net.channels(i), width, 3, padding=1, bias=net.draw.random() < 0.7), i)


def grouped(net: Drawn, i: int) -> None:
    c = net.channels(i)
    groups = net.draw.choice([g for g in (1, 2, 3, 4, c) if c % g == 0])
    out = c if groups == c and net.draw.random() < 0.7 else groups * net.draw.choice([2, 3])
    if net.draw.random() < 0.3:
        net._module("transposed", nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups), i)
    else:
        net._module("grouped", nn.Conv2d(c, out, 3, padding=1, groups=groups), i)


def activate(net: Drawn, i: int) -> None:
    net._module("act", net.draw.choice([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish()]), i)


def normalize(net: Drawn, i: int) -> None:
    c = net.channels(i)
    if net.tokens:
        net._module("norm", net.draw.choice([nn.LayerNorm(c), nn.RMSNorm(c)]), i)
    else:
        norms = [
            nn.BatchNorm2d(c),
            *([nn.InstanceNorm2d(c, affine=True)] if net.shapes[i][-1] > 1 else []),
            *[nn.GroupNorm(g, c) for g in (1, 2, 3) if c % g == 0],
        ]
        net._module("norm", net.draw.choice(norms), i)


def residual(net: Drawn, i: int) -> None:
    c = net.channels(i)
    inner = net.project(i, net.draw.choice([5, 8]))
    act = net._module("act", nn.ReLU(), inner)
    out = net.project(act, c)
    net.add("add", lambda s, t: t[i] + t[out])


def gate(net: Drawn, i: int) -> None:
    c = net.channels(i)
    pooled = net.add("pool", lambda s, t: t[i].mean((1,) if s.tokens else (2, 3), keepdim=True))
    small = net.project(pooled, 4)
    scale = net.project(net._module("act", nn.ReLU(), small), c)
    net.add("gate", lambda s, t: t[i] * torch.sigmoid(t[scale]))


def join(net: Drawn, i: int) -> None:
    j = net.draw.randrange(1, len(net.shapes))
    apart = [d for d in range(len(net.shapes[i])) if d != net.dim]
    if len(net.shapes[j]) == len(net.shapes[i]) and all(net.shapes[i][d] == net.shapes[j][d] for d in apart):
        net.add("cat", lambda s, t: torch.cat([t[i], t[j], t[i]], s.dim))


def halves(net: Drawn, i: int) -> None:
    if net.channels(i) % 2 == 0:
        other = net.draw.random() < 0.5

        def step(s: nn.Module, t: list[Tensor]) -> Tensor:
            a, b = t[i].chunk(2, s.dim)
            return a * torch.sigmoid(b) if other else torch.cat([b, a + 1], s.dim)

        net.add("halves", step)


def take(net: Drawn, i: int) -> None:
    c, start, step = net.channels(i), net.draw.randrange(2), net.draw.choice([1, 1, 2, 3])
    if len(range(start, c, step)) > 1:
        index = (slice(None),) * net.dim + (slice(start, c, step),)
        net.add("slice", lambda s, t: t[i][index])


def rearrange(net: Drawn, i: int) -> None:
    c = net.channels(i)
    order = torch.randperm(c)
    kind = net.draw.choice(["flip", "roll", "permuted", "select"])
    steps = {
        "flip": lambda s, t: t[i].flip(s.dim),
        "roll": lambda s, t: t[i].roll(2, s.dim),
        "permuted": lambda s, t: t[i][(slice(None),) * s.dim + (order,)],
        "select": lambda s, t: t[i].index_select(s.dim, order),
    }
    net.add(kind, steps[kind])


def shuffle(net: Drawn, i: int) -> None:
    c = net.channels(i)
    groups = net.draw.choice([g for g in (2, 3, 4) if c % g == 0] or [1])
    b, _, h, w = net.shapes[i]
    net.add("shuffle", lambda s, t: t[i].view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w))


def extend(net: Drawn, i: int) -> None:
    kind = net.draw.choice(["pad", "repeat", "repeat_interleave"])
    rest = len(net.shapes[i]) - 1 - net.dim
    steps = {
        "pad": lambda s, t: F.pad(t[i], (0, 0) * rest + (2, 1)),
        "repeat": lambda s, t: t[i].repeat(*[2 if d == s.dim else 1 for d in range(t[i].dim())]),
        "repeat_interleave": lambda s, t: t[i].repeat_interleave(2, s.dim),
    }
    if net.channels(i) <= 16:
        net.add(kind, steps[kind])


def scale(net: Drawn, i: int) -> None:
    c, name = net.channels(i), f"gamma{len(net.steps)}"
    shape = (c,) if net.tokens else (1, c, 1, 1)
    net.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))
    net.add("scale", lambda s, t: t[i] * getattr(s, name))


def attend(net: Drawn, i: int) -> None:
    heads, width = net.draw.choice([(2, 4), (3, 3), (4, 2)])
    b, n, _ = net.shapes[i]
    q, k, v = (net.project(i, heads * width) for _ in range(3))

    def step(s: nn.Module, t: list[Tensor]) -> Tensor:
        split = [t[j].view(b, n, heads, width).transpose(1, 2) for j in (q, k, v)]
        return F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(b, n, heads * width)

    net.add("attention", step)


def recur(net: Drawn, i: int) -> None:
    kind = net.draw.choice([nn.LSTM, nn.GRU])
    layer = kind(
        net.channels(i), 6, num_layers=net.draw.choice([1, 2]), bidirectional=net.draw.random() < 0.5, batch_first=True
    )
    name = f"rnn{len(net.steps)}"
    net.add_module(name, layer)
    net.add("rnn", lambda s, t: getattr(s, name)(t[i])[0])


def contract(net: Drawn, i: int) -> None:
    name = f"matrix{len(net.steps)}"
    net.register_parameter(name, nn.Parameter(torch.randn(net.channels(i), 3, 4)))
    net.add("einsum", lambda s, t: torch.einsum("bnc,chd->bnhd", t[i], getattr(s, name)).flatten(2))


def resize(net: Drawn, i: int) -> None:
    kind = net.draw.choice([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=2)])
    up = net._module("resize", kind, i)
    if net.shapes[up][-1] > 12:
        net._module("resize", nn.AdaptiveAvgPool2d(6), up)


def rearrange_space(net: Drawn, i: int) -> None:
    if net.channels(i) % 4 == 0:
        up = net._module("pixel_shuffle", nn.PixelShuffle(2), i)
        net._module("resize", nn.AdaptiveAvgPool2d(6), up)


MAPS = [
    widen, widen, grouped, grouped, activate, normalize, residual, gate, join, halves, take, rearrange, shuffle, extend,
    scale, resize, rearrange_space,
]  # fmt: skip
TOKENS = [
    widen, widen, activate, normalize, residual, gate, join, halves, take, rearrange, extend, scale, attend, recur,
    contract,
]  # fmt: skip
