"""Layers that run on the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime import ops  # noqa: F401  declares torch.ops.secateur

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """How a convolution walks over its input, all as (vertical, horizontal). In one dimension the first is 1 or 0."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


class SparseLinear(nn.Module):
    """activation(x @ weight.T + bias + residual) by the engine; x (…, inputs), residual and result (…, outputs).

    packed: a packed weight (``formats.pack``). It is a buffer, so it is saved with the model; to change it load
    another state. quantize: round activations to 8 bits, too, for int8 blocks of height 4 (``kernels.linear``). Floats
    of other dtypes than ``float32`` are converted for the engine, and the result back.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, bias: Tensor | None, outputs: int, activation: str = "", quantize: bool = False
    ) -> None:
        super().__init__()
        self.outputs, self.activation, self.quantize = outputs, activation, quantize
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        given = x.dtype
        bias = None if self.bias is None else self.bias.float()
        residual = None if residual is None else residual.float()
        after = (bias, residual, self.activation, self.outputs, self.quantize)
        y: Tensor = torch.ops.secateur.linear(x.float(), self.packed, *after)
        return y.to(given)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, activation={self.activation or None}"


class SharedLinears(nn.Module):
    """Layers that read the same x, such as queries, keys and values, in one call; gives one result for each."""

    def __init__(self, layers: Iterable[SparseLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        layers: list[Any] = list(self.layers)
        packed, bias = [each.packed for each in layers], [each.bias for each in layers]
        floats = [None if b is None else b.float() for b in bias]
        activation, outputs = [each.activation for each in layers], [each.outputs for each in layers]
        quantize = [each.quantize for each in layers]
        ys = torch.ops.secateur.linears(x.float(), packed, floats, activation, outputs, quantize)
        return [y.to(x.dtype) for y in ys]


class SparseConv(nn.Module):
    """The same of a convolution of 2 dimensions, or of 1 with ``flat``; groups stand in the packed weight's zeros.

    x: (batch, channels, height, width) or (batch, channels, length), or either without the batch.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, bias: Tensor | None, outputs: int, window: Window, flat: bool = False,
        activation: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.outputs, self.activation, self.window, self.flat = outputs, activation, window, flat
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        w, bias = self.window, None if self.bias is None else self.bias.float()

        def conv(x: Tensor, residual: Tensor | None) -> Tensor:
            after = (bias, residual, self.activation, self.outputs)
            y: Tensor = torch.ops.secateur.conv2d(x, self.packed, *after, w.kernel, w.stride, w.padding, w.dilation)
            return y

        if x.dtype == torch.float32 and x.ndim == 4:  # the rest costs as much as a small layer
            return conv(x, None if residual is None else residual.float())
        given, single = x.dtype, x.ndim == (2 if self.flat else 3)

        def shaped(value: Tensor) -> Tensor:
            value = value.float()
            value = value.unsqueeze(0) if single else value
            return value.unsqueeze(2) if self.flat else value

        y = conv(shaped(x), None if residual is None else shaped(residual))
        y = y.squeeze(2) if self.flat else y
        return (y.squeeze(0) if single else y).to(given)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, {self.window}, activation={self.activation or None}"
