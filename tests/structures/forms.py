"""Rows 57-59: forms that a model can come in."""

from __future__ import annotations

import warnings

import torch
import torch.ao.nn.quantized as quantized
import torch.distributed as dist
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


class Observed(nn.Module):
    """Fake quantization that keeps watching the range of what it quantizes, in evaluation too."""

    def __init__(self, rows, per_row):
        super().__init__()
        self.per_row = per_row
        for name in ("observing", "quantizing"):
            self.register_buffer(name, torch.ones(1, dtype=torch.long))
        for name, value in {"low": -1.0, "high": 1.0, "scale": 0.02}.items():
            self.register_buffer(name, torch.full((rows,), value))
        self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.int32))

    def forward(self, x):
        state = (self.observing, self.quantizing, self.low, self.high, self.scale, self.zero_point)
        return torch.fused_moving_avg_obs_fake_quant(x, *state, 0.01, -128, 127, 0, self.per_row, True)


@case(57, free=[8, 12])
def ranges_observed_while_quantizing():
    def body(s, x):
        x = s.range(F.relu(s.a(x)))
        return s.tail(F.relu(F.conv2d(x, s.ranges(s.b.weight), s.b.bias, padding=1)))

    parts = {"range": Observed(1, per_row=False), "ranges": Observed(12, per_row=True)}
    return Net(body, a=conv(3, 8), b=conv(8, 12), tail=tail(12), **parts)


@case(57, "dynamic", refused="quantized: its weights are packed integers", inputs=vectors())
@case(57, "static", refused="quantized: its weights are packed integers", inputs=vectors())
def really_quantized(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        if kind == "dynamic":
            return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), quantized.dynamic.Linear(16, 4))
        return nn.Sequential(quantized.Quantize(0.1, 0, torch.quint8), quantized.Linear(6, 16), quantized.DeQuantize())


@case(57, "traced", refused="TorchScript, which has no Python code to follow")
@case(57, "scripted", refused="TorchScript, which has no Python code to follow")
def torchscript(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = small().eval()
        return torch.jit.script(net) if how == "scripted" else torch.jit.trace(net, torch.randn(2, 3, 8, 8))


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
def distributed_data_parallel():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(small())


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
