"""Rows 41-45: modules used twice, outputs and inputs of every kind, autograd's own functions, branches without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nets
from nets import Net, conv, tail
from structures import case, tokens

case(41, free=[8])(nets.shared_module)


@case(41, free=[8, 10], inputs=lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)))
def siamese():
    def body(s, x, y):
        x, y = (F.relu(s.b(F.relu(s.a(t)))).mean((2, 3)) for t in (x, y))
        return s.head(torch.cat([x * y, (x - y).abs()], 1))

    return Net(body, a=conv(3, 8), b=conv(8, 10), head=nn.Linear(20, 3))


@case(41, free=[8, 6])
def block_applied_three_times():
    def body(s, x):
        x = s.stem(x)
        for _ in range(3):
            x = x + s.b(F.relu(s.a(x)))
        return s.tail(x)

    return Net(body, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), tail=tail(8))


@case(41, free=[8, 10, 6])
def head_shared_between_scales():
    def body(s, x):
        c3 = F.relu(s.c3(x))
        c4 = F.relu(s.c4(c3))
        p4 = s.l4(c4)
        p3 = s.l3(c3) + F.interpolate(p4, scale_factor=2, mode="nearest")
        return [s.head(p) for p in (p3, p4)]

    parts = {"c3": conv(3, 8), "c4": conv(8, 10, stride=2), "l3": conv(8, 6, 1), "l4": conv(10, 6, 1)}
    return Net(body, head=conv(6, 4), **parts)


@case(41, free=[8])
def two_convolutions_one_norm():
    return Net(
        lambda s, x: s.c(F.relu(s.norm(s.a(x))) - F.relu(s.norm(s.b(x)))),
        a=conv(3, 8), b=conv(3, 8), c=conv(8, 4), norm=nn.BatchNorm2d(8),
    )  # fmt: skip


case(42, free=[8])(nets.two_outputs)


@dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None
    steps: int


torch.export.register_dataclass(Answer, serialized_type_name="tests.structures.Answer")


@dataclass
class Unregistered:
    logits: torch.Tensor


FEATURE = "model output 1: its shape is promised"


@case(42, "tuple with an int", free=[8])
@case(42, "dataclass", free=[8])
@case(42, "nested", free=[8])
@case(42, "reduced feature", free=[8], inexact=True)
@case(42, "norm of a feature", free=[8], inexact=True)
@case(42, "feature", frozen=FEATURE)
@case(42, "feature in a list in a dict", frozen=FEATURE)
def output_with(what):
    def body(s, x):
        z = F.relu(s.a(x))
        y = s.b(z)
        return {
            "tuple with an int": lambda: (y, 7, None),
            "dataclass": lambda: Answer(y, None, 3),
            "nested": lambda: {"a": [y, (y.mean(), None)], "b": ()},
            "reduced feature": lambda: (y, z.amax(1)),
            "norm of a feature": lambda: (y, z.square().sum()),
            "feature": lambda: (y, z),
            "feature in a list in a dict": lambda: {"y": y, "features": [z]},
        }[what]()

    return Net(body, a=conv(3, 8), b=conv(8, 4))


@case(42, refused="cannot be captured.*plain tensors as inputs and outputs")
def output_of_a_class_nobody_registered():
    return Net(lambda s, x: Unregistered(s.b(F.relu(s.a(x)))), a=conv(3, 8), b=conv(8, 4))


@case(42, free=[6], frozen="model output [12]", inputs=tokens(), budget="params=90%")
def cached_keys_and_values():
    """The cache is an output, so that its heads and widths are promised to the caller."""

    def body(s, x):
        q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return s.c(F.relu(s.b(y))), (k, v)

    parts = {name: nn.Linear(8, 24) for name in "qkv"}
    return Net(body, b=nn.Linear(24, 6), c=nn.Linear(6, 8), **parts)


@case(43, "tuple", free=[6, 5, 10], inputs=lambda n: (torch.randn(n, 6), torch.randn(n, 4)))
@case(43, "dict", free=[6, 5, 10], inputs=lambda n: {"x": torch.randn(n, 6), "y": torch.randn(n, 4)})
@case(43, "list", free=[6, 5, 10], inputs=lambda n: [torch.randn(n, 6), torch.randn(n, 4)])
@case(43, "optional", free=[6, 5, 10], inputs=lambda n: (torch.randn(n, 6), torch.randn(n, 4), None))
def inputs_in_a(kind):
    def body(s, x, y, mask=None):
        z = torch.cat([s.a(x), s.b(y)], -1).relu()
        return s.d(F.relu(s.c(z if mask is None else z * mask)))

    return Net(body, a=nn.Linear(6, 6), b=nn.Linear(4, 5), c=nn.Linear(11, 10), d=nn.Linear(10, 3))


@case(43, free=[6, 5], inputs=lambda n: ([torch.randn(n, 6), torch.randn(n, 4)], {"scale": torch.rand(n, 1)}))
def nested_inputs():
    def body(s, pair, options):
        x, y = pair
        return s.c(torch.cat([s.a(x), s.b(y)], -1).relu() * options["scale"])

    return Net(body, a=nn.Linear(6, 6), b=nn.Linear(4, 5), c=nn.Linear(11, 3))


class Squash(torch.autograd.Function):
    """x / (1 + |x|), with a gradient of its own."""

    @staticmethod
    def forward(x):
        return x / (1 + x.abs())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()).square()


class Halves(torch.autograd.Function):
    """The product of both halves of the channels."""

    @staticmethod
    def forward(x):
        a, b = x.chunk(2, 1)
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors[0].chunk(2, 1)
        return torch.cat([grad * b, grad * a], 1)


@case(44, "element-wise", free=[8])
@case(44, "of half the channels", free=[8])
def autograd_function(kind):
    f = Squash if kind == "element-wise" else Halves
    return Net(lambda s, x: s.b(f.apply(s.a(x))), a=conv(3, 8 if f is Squash else 16), b=conv(8, 4))


@case(45, "detach", free=[8, 6])
@case(45, "no_grad", free=[8, 6])
@case(45, "checkpoint", free=[8, 6])
@case(45, "reentrant checkpoint", free=[8, 6])
@case(45, "frozen", free=[8, 6])
@case(45, "all frozen", free=[8, 6])
@case(45, "set_grad_enabled", free=[8, 6])
def branch_under(what):
    def body(s, x):
        x = F.relu(s.a(x))
        if what == "detach":
            y = s.b(x.detach()).detach()
        elif what == "no_grad":
            with torch.no_grad():
                y = s.b(x)
        elif what == "set_grad_enabled":
            with torch.set_grad_enabled(s.training):
                y = s.b(x)
        elif "checkpoint" in what:
            y = checkpoint(s.b, x, use_reentrant=what.startswith("reentrant"))
        else:
            y = s.b(x)
        return s.tail(torch.cat([x, F.relu(y)], 1))

    net = Net(body, a=conv(3, 8), b=conv(8, 6), tail=tail(14))
    if what == "frozen":
        net.b.requires_grad_(False)
    return net.requires_grad_(what != "all frozen") if what == "all frozen" else net
