"""Layers that run on the engine."""

from __future__ import annotations

from dataclasses import dataclass

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
    another state. Floats of other dtypes than ``float32`` are converted for the engine, and the result back.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, bias: Tensor | None, outputs: int, activation: str = "") -> None:
        super().__init__()
        self.outputs, self.activation = outputs, activation
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        given = x.dtype
        bias = None if self.bias is None else self.bias.float()
        residual = None if residual is None else residual.float()
        y: Tensor = torch.ops.secateur.linear(x.float(), self.packed, bias, residual, self.activation, self.outputs)
        return y.to(given)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, activation={self.activation or None}"


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
        given, single = x.dtype, x.ndim == (2 if self.flat else 3)

        def shaped(value: Tensor) -> Tensor:
            value = value.float()
            value = value.unsqueeze(0) if single else value
            return value.unsqueeze(2) if self.flat else value

        bias = None if self.bias is None else self.bias.float()
        after = (bias, None if residual is None else shaped(residual), self.activation, self.outputs)
        w = self.window
        y: Tensor = torch.ops.secateur.conv2d(shaped(x), self.packed, *after, w.kernel, w.stride, w.padding, w.dilation)
        y = y.squeeze(2) if self.flat else y
        return (y.squeeze(0) if single else y).to(given)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, {self.window}, activation={self.activation or None}"
