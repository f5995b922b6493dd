"""Rows 57-59: forms that a model can come in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv, tail
from structures import case, maps, tokens, vectors


def small():
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.ReLU(), tail(12))


class FakeQuantized(nn.Conv2d):
    """A convolution in quantization-aware training: scales per output channel, rounding straight through."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.full((self.out_channels,), 0.02))
        self.register_buffer("zero_point", torch.zeros(self.out_channels, dtype=torch.int32))

    def forward(self, x):
        w = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero_point, 0, -128, 127)
        return F.conv2d(x, w, self.bias, padding=self.padding)


@case(57, free=[8, 12])
def quantization_aware_training():
    first, second = FakeQuantized(3, 8, 3, padding=1), FakeQuantized(8, 12, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), tail(12))


@case(57, free=[8, 12])
def activations_fake_quantized():
    def body(s, x):
        x = torch.fake_quantize_per_tensor_affine(F.relu(s.a(x)), 0.05, 0, 0, 255)
        return s.tail(F.relu(s.b(x)))

    return Net(body, a=conv(3, 8), b=conv(8, 12), tail=tail(12))


@case(57, refused="ScriptModule.*original")
def torchscript():
    return torch.jit.trace(small().eval(), torch.randn(2, 3, 8, 8))


@case(57, free=[8, 12])
def exported_graph_module():
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(small().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=dynamic).module()


@case(57, free=[8, 12])
def symbolically_traced():
    return torch.fx.symbolic_trace(small().eval())


@case(57, free=[8, 12])
def compiled():
    return torch.compile(small(), backend="eager")


@case(57, free=[8, 12])
def one_module_compiled():
    net = small()
    net[3] = torch.compile(net[3], backend="eager")
    return net


class LoRA(nn.Module):
    """A linear layer beside which a product of low rank is trained."""

    def __init__(self, base, rank=3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5


@case(58, free=[16, 3, 3], inputs=tokens(6))
def lora_adapters():
    return nn.Sequential(LoRA(nn.Linear(6, 16)), nn.GELU(), LoRA(nn.Linear(16, 4)))


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_features) + 0.5)

    def forward(self, x):
        return torch.tanh(super().forward(x)) * self.gain


@case(58, free=[16, 10], inputs=tokens(6))
def subclass_of_linear():
    return nn.Sequential(ScaledLinear(6, 16), ScaledLinear(16, 10), nn.Linear(10, 3))


class Masked(nn.Linear):
    """A subclass that multiplies its weight by a buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.3).to(self.weight.dtype))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


@case(58, free=[16], inputs=tokens(6))
def weights_under_a_mask():
    return nn.Sequential(Masked(6, 16), nn.SiLU(), Masked(16, 3))


@case(59, torch.float16, free=[8, 12], inputs=lambda n: torch.randn(n, 3, 8, 8, dtype=torch.float16))
@case(59, torch.bfloat16, free=[8, 12], inputs=lambda n: torch.randn(n, 3, 8, 8, dtype=torch.bfloat16))
@case(59, torch.float64, free=[8, 12], inputs=lambda n: torch.randn(n, 3, 8, 8, dtype=torch.float64))
def weights_of_type(dtype):
    return small().to(dtype)


@case(59, free=[16], inputs=lambda n: torch.randn(6), batches=())
def one_vector_without_a_batch():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@case(59, free=[8], inputs=lambda n: torch.randn(3, 8, 8), batches=())
def one_image_without_a_batch():
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))


@case(59, free=[8, 12])
def data_parallel():
    return nn.DataParallel(small())


@case(59, free=[8, 12])
def wrapped_once_more():
    return nn.Sequential(nn.ModuleDict({"net": small()})["net"], nn.Identity())


@case(59, free=[8, 12], inputs=maps(3))
def channels_last_memory():
    return small().to(memory_format=torch.channels_last)


@case(59, free=[16], inputs=vectors())
def mixed_types():
    return Net(
        lambda s, x: s.b(F.relu(s.a(x.double())).float()), a=nn.Linear(6, 16).double(), b=nn.Linear(16, 3)
    )  # fmt: skip
