"""Networks of layers, and what it takes to leave some of them out by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nets import attention, conv, tail
from secateur.depth import make
from secateur.graph import analyze
from secateur.graph.trace import run


class Basic(nn.Module):
    """A ResNet's block; where the width changes there is no identity."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.n = conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.b, self.m = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.m(self.b(F.relu(self.n(self.a(x)), inplace=True))) + self.down(x), inplace=True)


class Layer_(nn.Module):
    """A transformer's layer. ``post``: norms after the sums; ``index`` is remembered, as Hugging Face's layers do."""

    def __init__(self, post=False, index=0, pair=False):
        super().__init__()
        self.attn, self.up, self.out = attention(2, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.post, self.layer_idx, self.pair = post, index, pair

    def forward(self, x, scale=None):
        if self.post:
            x = self.n1(x + self.attn(x))
            x = self.n2(x + self.out(F.gelu(self.up(x))))
        else:
            x = x + self.attn(self.n1(x))
            x = x + self.out(F.gelu(self.up(self.n2(x))))
        return (x, None) if self.pair else x


def images():
    return torch.randn(2, 3, 8, 8)


def tokens():
    return torch.randn(2, 5, 8)


def resnet():
    stage = nn.Sequential(*(Basic(8, 8) for _ in range(3)))
    return nn.Sequential(conv(3, 8), stage, nn.Sequential(Basic(8, 12), Basic(12, 12)), tail(12))


def transformer(post=False, layers=4):
    return nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(*(Layer_(post, i) for i in range(layers))), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def mixer():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.t, self.u = nn.LayerNorm(8), nn.Linear(5, 7), nn.Linear(7, 5)
            self.m, self.c, self.d = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.u(F.gelu(self.t(self.n(x).transpose(1, 2)))).transpose(1, 2)
            return x + self.d(F.gelu(self.c(self.m(x))))

    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Mixer(), Mixer(), Mixer()), nn.Linear(8, 3))


class Counted(nn.Module):
    """Runs its list by a count of its own, and keeps one factor a layer elsewhere where ``factors``."""

    def __init__(self, layers=4, pair=False, factors=False):
        super().__init__()
        self.stem, self.num_layers = nn.Linear(8, 8), layers
        self.layers = nn.ModuleList(Layer_(index=i, pair=pair) for i in range(layers))
        self.head = nn.Linear(8, 3)
        self.factors = [1.0, 2.0, 3.0, 4.0] if factors else [1.0] * layers

    def forward(self, x):
        x = self.stem(x)
        for i in range(self.num_layers):
            x = self.layers[i](x * self.factors[i])
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def randomize(model, seed=0):
    """Norms that do something, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.6, 1.4, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model.eval()


def without(model, names, x):
    """What the model gives where each of these modules hands its first argument on: independent of the program."""
    handles = []
    for name in names:

        def hand_on(module, args, output):
            return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

        handles.append(model.get_submodule(name).register_forward_hook(hand_on))
    try:
        return run(model, x)
    finally:
        for handle in handles:
            handle.remove()


def free(model, x):
    return [b.name for b in analyze(model, x).blocks if not b.frozen]


def frozen(model, x):
    return {b.name: b.frozen for b in analyze(model, x).blocks if b.frozen}


def dropping(model, x, names):
    """A plan that drops exactly these blocks."""
    graph = analyze(model, x)
    keep = [b.name for b in graph.blocks if not b.frozen and b.name not in names]
    plan = make(model, graph, pattern="layer", budget="threshold=2", criterion="random", ignore=keep)
    assert set(plan.dropped) == set(names)
    return plan


CASES = {
    "resnet": (resnet, images, ["1.1", "2.1"]),
    "pre-norm": (transformer, tokens, ["1.0", "1.2"]),
    "post-norm": (lambda: transformer(post=True), tokens, ["1.1", "1.2"]),
    "neighbours": (transformer, tokens, ["1.0", "1.1", "1.2", "1.3"]),
    "mixer": (mixer, tokens, ["1.1"]),
    "counted": (Counted, tokens, ["layers.1", "layers.3"]),
}
