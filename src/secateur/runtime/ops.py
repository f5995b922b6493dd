"""The engine as torch operators, ``secateur::linear``, ``linears``, ``conv2d`` and ``max_pool2d``, for inference.

They take activations of shape (…, inputs) and (batch, channels, height, width) in ``float32`` on the CPU, and a packed
weight; what follows a layer (bias, residual, activation) is done in the same pass. They are known to ``torch.export``
and ``torch.compile``; they have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import TargetError
from secateur.runtime import kernels

_library: Any = torch.library.Library("secateur", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, str activation, int outputs, "
    "bool quantize=False) -> Tensor"
)
_library.define(
    "linears(Tensor x, Tensor[] packed, Tensor?[] bias, str[] activation, int[] outputs, bool[] quantize) -> Tensor[]"
)
_library.define(
    "conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, str activation, int outputs, "
    "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor"
)
_library.define("max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding) -> Tensor")


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, outputs: int,
    quantize: bool = False,
) -> Tensor:  # fmt: skip
    _require_no_gradients(x, residual)
    return kernels.linear(x, packed, bias, residual, activation, quantize)


def _linear_shape(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, outputs: int,
    quantize: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], outputs)


def _linears(
    x: Tensor, packed: list[Tensor], bias: list[Tensor | None], activation: list[str], outputs: list[int],
    quantize: list[bool],
) -> list[Tensor]:  # fmt: skip
    _require_no_gradients(x, None)
    return kernels.linears(x, packed, bias, [None] * len(packed), activation, quantize)


def _linears_shapes(
    x: Tensor, packed: list[Tensor], bias: list[Tensor | None], activation: list[str], outputs: list[int],
    quantize: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(*x.shape[:-1], n) for n in outputs]


def _conv2d(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, outputs: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _require_no_gradients(x, residual)
    return kernels.conv(x, packed, bias, residual, activation, (kernel, stride, padding, dilation))


def _conv2d_shape(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, outputs: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    size = kernels.image_size(x.shape[2:], kernel, stride, padding, dilation)
    return x.new_empty(x.shape[0], outputs, *size)


def _max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    _require_no_gradients(x, None)
    return kernels.max_pool(x.float(), kernel, stride, padding).to(x.dtype)  # as layers convert other floats


def _max_pool2d_shape(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], *kernels.image_size(x.shape[2:], kernel, stride, padding, (1, 1)))


def _require_no_gradients(x: Tensor, residual: Tensor | None) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        raise TargetError(
            "layers of the sparse engine have no gradients; run the model under torch.inference_mode(), and train it "
            "before it is lowered"
        )


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (_linear, _linear_shape),
    "linears": (_linears, _linears_shapes),
    "conv2d": (_conv2d, _conv2d_shape),
    "max_pool2d": (_max_pool2d, _max_pool2d_shape),
}
for _name, (_run, _shape) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"secateur::{_name}", _shape, lib=_library)
