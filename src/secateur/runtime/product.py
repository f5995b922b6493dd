"""A layer that the engine could run: its weight, what it is applied to, and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime.formats import Format, pack, read_header
from secateur.runtime.layers import SparseConv, SparseLinear, Window

FEW_TOKENS = 16
"""Up to here the bytes of weights are what a linear layer waits for."""


@dataclass(frozen=True, eq=False)
class Product:
    """A linear layer (``window`` is None) or a convolution, with what can be done in the same pass.

    weight: as torch has it. shape: of the input it was seen with. activation: one of ``kernels.ACTIVATIONS``.
    residual: whether another tensor is added before the activation. flat: a convolution of one dimension.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    shape: tuple[int, ...]
    window: Window | None = None
    groups: int = 1
    flat: bool = False
    activation: str = ""
    residual: bool = False

    @property
    def density(self) -> float:
        """The part of the weight that is not zero."""
        return int(self.weight.count_nonzero()) / max(self.weight.numel(), 1)

    def fill(self, height: int) -> float:
        """The part of the blocks of ``height`` outputs x 1 input that have a weight which is not zero."""
        flat = self.weight.flatten(1) != 0
        padded = F.pad(flat, (0, 0, 0, -len(flat) % height))
        return float(padded.view(-1, height, flat.shape[1]).any(1).float().mean()) if flat.numel() else 0.0

    @property
    def tokens(self) -> int:
        """How many times the weight is applied to the input it was seen with."""
        sizes = self.shape[:-1] if self.window is None else (self.shape[0], *self.shape[2:])
        return int(torch.Size(sizes).numel())

    def dense(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer and what follows it, by torch."""
        y = self.by_torch(x)
        return activate(y if residual is None else y + residual, self.activation)

    def by_torch(self, x: Tensor) -> Tensor:
        """The layer alone."""
        if self.window is None:
            return F.linear(x, self.weight, self.bias)
        w = self.window
        if self.flat:
            return F.conv1d(x, self.weight, self.bias, w.stride[1], w.padding[1], w.dilation[1], self.groups)
        return F.conv2d(x, self.weight, self.bias, w.stride, w.padding, w.dilation, self.groups)

    def sparse(self, format: Format) -> nn.Module:
        """The layer and what follows it, by the engine."""
        return self.by_engine(pack(self.weight.flatten(1), format, self.groups))

    def by_engine(self, packed: Tensor) -> nn.Module:
        """The same, of the weight as it is packed already."""
        if self.window is None:
            return SparseLinear(packed, self.bias, len(self.weight), self.activation, self._quantizes(packed))
        return SparseConv(packed, self.bias, len(self.weight), self.window, self.flat, self.activation)

    def _quantizes(self, packed: Tensor) -> bool:
        """Whether integers are added up: for one or few tokens, bytes of weights are what takes the time."""
        format = read_header(packed).format
        return format.values == "int8" and format.kind == "blocks" and format.height == 4 and self.tokens > FEW_TOKENS


class DenseLayer(nn.Module):
    """A product by torch: what is left where no form of the engine is faster."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.product.dense(x, residual)


def of_module(name: str, module: nn.Module, shape: tuple[int, ...]) -> Product | str:
    """The product that a module is, seen with an input of ``shape``; or why the engine has no form for it."""
    if type(module) is nn.Linear:
        return Product(name, module.weight, module.bias, shape)
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return f"a {type(module).__name__} is no Linear, Conv1d or Conv2d"
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"it pads with {module.padding_mode!r}, {module.padding!r}; the engine pads with a number of zeros"
    flat = isinstance(module, nn.Conv1d)
    window = window_of(module.kernel_size, module.stride, module.padding, module.dilation)
    return Product(name, module.weight, module.bias, shape, window, module.groups, flat)


def window_of(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Window:
    """The window of a convolution of one or two dimensions."""

    def pair(values: tuple[int, ...], first: int) -> tuple[int, int]:
        return (first, values[0]) if len(values) == 1 else (values[0], values[1])

    return Window(pair(kernel, 1), pair(stride, 1), pair(padding, 0), pair(dilation, 1))


def activate(y: Tensor, activation: str) -> Tensor:
    """What the engine does after a product, in torch."""
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[activation](y) if activation else y
