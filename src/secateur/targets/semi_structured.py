"""Torch's semi-structured kernels: what they take, how a weight is packed for them, a Linear layer that runs on them.

Of every four consecutive inputs of a weight at most two are not zero ("2:4"); Ampere and later multiply such weights on
sparse tensor cores. Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from secateur.errors import TargetError
from secateur.graph.trace import first_line

BACKENDS: Mapping[str, Any] = {
    "cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT,
    "CUTLASS": SparseSemiStructuredTensorCUTLASS,
}
"""Torch's tensors of this kind; both store half of the values, and two bits for each that say where it was."""


def why_not(weight: Tensor, bias: Tensor | None, backend: str) -> str:
    """Why a kernel cannot take a weight (outputs, inputs) of this dtype and shape; "" where it can.

    The bounds are torch's own. float32 is refused: torch's kernel for it keeps 1 of 2, not 2 of 4, and rounds to TF32.
    """
    if weight.dtype == torch.float32:
        return "is float32, for which torch has no 2:4 kernel; use bfloat16 or float16"
    limits = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS.get(weight.dtype)
    if limits is None or weight.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        return f"is {short(weight.dtype)}, expected bfloat16 or float16"
    outputs, inputs = weight.shape
    rows, cols = limits.sparse_min_rows, limits.sparse_min_cols
    if not outputs or not inputs or outputs % rows or inputs % cols:
        return f"has {outputs} outputs and {inputs} inputs, expected multiples of {rows} and {cols} for {backend}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"has a bias of {short(bias.dtype)} and a weight of {short(weight.dtype)}, expected one dtype"
    return ""


def is_24(weight: Tensor) -> bool:
    """Whether of each four consecutive inputs of a weight (outputs, inputs) at most two are not zero."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(weight.shape[0], -1, 4).sum(2) <= 2).all())


@dataclass(frozen=True)
class Packing:
    """A kernel, and its algorithm for ``tokens`` rows of activations, found by torch's search; 0 is the default."""

    backend: str
    algorithm: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.backend} algorithm {self.algorithm}" if self.algorithm else self.backend


def pack(weight: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """Values and places as the kernel wants them; -0.0, which a packer may take for a value, becomes 0."""
    clean = torch.where(weight == 0, torch.zeros_like(weight), weight).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these tensors a prototype
        made = BACKENDS[backend].from_dense(clean)
    return made.packed, made.meta


def multiply(
    x: Tensor,
    packed: Tensor,
    meta: Tensor | None,
    bias: Tensor | None = None,
    algorithm: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (tokens, inputs) times the packed weight: (tokens, outputs). Tokens are a multiple of what the kernel pads to.

    These are the operators behind torch's semi-structured tensors, without the cost of a tensor subclass in each call.
    """
    if meta is None:
        return torch._cslt_sparse_mm(
            packed, x.t(), bias=bias, out_dtype=out_dtype, transpose_result=True, alg_id=algorithm
        )
    if bias is None:
        return torch._sparse_semi_structured_mm(packed, meta, x.t(), out_dtype=out_dtype).t().contiguous()
    return torch._sparse_semi_structured_addmm(bias, packed, meta, x.t(), out_dtype=out_dtype).t().contiguous()


def padding(dtype: torch.dtype, backend: str) -> int:
    """Tokens come in multiples of that."""
    limits = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    # The activations are the kernel's transposed operand; torch pads both of its sides alike.
    return int(max(limits.dense_min_rows, limits.dense_min_cols))


class Linear24(nn.Module):
    """A Linear layer whose weight is packed 2:4, for inference: x (…, inputs) -> (…, outputs)."""

    packed: Tensor
    meta: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, packing: Packing) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packing, self.multiple = packing, padding(weight.dtype, packing.backend)
        packed, meta = pack(weight.detach(), packing.backend)
        for name, value in (("packed", packed), ("meta", meta), ("bias", None if bias is None else bias.detach())):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise TargetError("a model lowered to 'cuda-2:4' is for inference; call it under torch.inference_mode()")
        rows = x.reshape(-1, self.in_features).contiguous()
        tokens = rows.shape[0]
        if tokens == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if missing := -tokens % self.multiple:
            rows = F.pad(rows, (0, 0, 0, missing))
        # Algorithms are numbered for one problem size; elsewhere the default is safe.
        algorithm = self.packing.algorithm if rows.shape[0] == self.packing.tokens else 0
        y = multiply(rows, self.packed, self.meta, self.bias, algorithm)
        return y[:tokens].view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packing}"


def packings(weight: Tensor, bias: Tensor | None, tokens: int) -> tuple[list[Packing], list[str]]:
    """The ways to multiply ``tokens`` activations by a weight on this device, and what keeps the others from it."""
    found: list[Packing] = []
    failed: list[str] = []
    for backend in BACKENDS:
        if why := why_not(weight, bias, backend):
            failed.append(why)
            continue
        # A library or a card may lack a kernel, or a shape in it; torch says so only when asked.
        try:
            Linear24(weight, bias, Packing(backend))(weight.new_zeros(tokens, weight.shape[1]))
        except RuntimeError as error:
            failed.append(f"{backend}: {first_line(error)}")
            continue
        found.append(Packing(backend))
        with suppress(RuntimeError):
            found += [best for best in searched(weight, bias, tokens, backend) if best.algorithm]
    return found, failed


def searched(weight: Tensor, bias: Tensor | None, tokens: int, backend: str = "cuSPARSELt") -> list[Packing]:
    """The algorithm that the library's own search finds best; the default can be half as fast."""
    if backend != "cuSPARSELt":
        return []
    packed, _ = pack(weight, backend)
    padded = tokens + -tokens % padding(weight.dtype, backend)
    x = torch.ones(padded, weight.shape[1], device=weight.device).to(weight.dtype)
    out_dtype = torch.int32 if weight.dtype == torch.int8 else None
    best = torch._cslt_sparse_mm_search(packed, x.t(), bias=bias, out_dtype=out_dtype, transpose_result=True)
    return [Packing(backend, int(best), padded)]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
