"""What the loss says about weights: first derivatives, of batches and of single examples, and second ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import DataError
from secateur.graph.types import Weight

BLOCK = 50
"""Weights of one block of the Fisher matrix, consecutive inputs of an output (Kurtic et al. 2022)."""

DAMPING = 1e-7
"""What is added to the diagonal of the Fisher matrix before it is inverted (Kurtic et al. 2022)."""

LARGEST = 8 << 30
"""Bytes that the blocks of the Fisher matrix may take: 8 * BLOCK for every weight."""

TOGETHER = 16
"""Examples whose gradients are held before they go into the blocks: one product instead of many."""

COLLECTED = {
    "grad_abs": "the mean over calibration batches of |dL/dw|, of the weight's shape",
    "grad_square": "the mean over single calibration examples of (dL/dw)**2: the diagonal of the empirical Fisher "
    "matrix, of the weight's shape",
    "fisher_inverse": "the diagonal of the inverse of the empirical Fisher matrix in blocks, of the weight's shape",
    "hessian": "the diagonal of the loss's Hessian, by one random probe a batch (Hutchinson), of the weight's shape",
}

Grads = Mapping[str, Tensor]


def examples(batch: Any) -> Iterator[Any]:
    """A batch of inputs and targets as batches of one example, which are along dimension 0 of its tensors.

    Tensors of another length than the first one belong to every example.
    """
    tensors = [v for v in tree_leaves(batch) if isinstance(v, Tensor) and v.dim()]
    length = len(tensors[0]) if tensors else 1
    for i in range(length):
        yield tree_map(
            lambda v, i=i: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and len(v) == length else v, batch
        )


def first(loss: Tensor, weights: Grads, *, twice: bool = False) -> dict[str, Tensor]:
    """dL/dw of the weights that the loss depends on; with ``twice`` it can be derived once more."""
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, create_graph=twice)
    return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}


def seeded(text: str) -> torch.Generator:
    """A generator on the CPU whose seed is all of ``text``."""
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Means:
    """Means over calls of ``add`` of something made of gradients, in float32 at least."""

    def __init__(self, weights: Grads, of: Callable[[Tensor], Tensor]) -> None:
        self._weights, self._of, self._count = weights, of, 0
        self._sums: dict[str, Tensor] = {}

    def add(self, grads: Grads) -> None:
        self._count += 1
        for name, grad in grads.items():
            value = self._of(grad.detach().to(wide(grad.dtype)))
            self._sums[name] = self._sums[name].add_(value) if name in self._sums else value

    def values(self) -> dict[str, Tensor]:
        zeros = {n: torch.zeros_like(w, dtype=wide(w.dtype)) for n, w in self._weights.items() if n not in self._sums}
        return {**{name: total / self._count for name, total in self._sums.items()}, **zeros}


def curvature(grads: Grads, weights: Grads, seed: str) -> dict[str, Tensor]:
    """v * Hv for a random v of +1 and -1: its mean over many v is the diagonal of the Hessian H (Hutchinson 1989).

    grads: first derivatives that can be derived once more. Raises DataError where an operator has no second derivative.
    """
    probes = {
        name: torch.randint(0, 2, grad.shape, generator=seeded(f"{seed}:{name}")).mul_(2).sub_(1).to(grad)
        for name, grad in grads.items()
    }
    along = sum(((grads[name] * probe).sum() for name, probe in probes.items()), torch.zeros(()))
    if not along.requires_grad:
        return {}  # the loss is linear in the weights
    try:
        found = first(along, {name: weights[name] for name in probes})
    except RuntimeError as error:
        raise DataError(
            f"the loss cannot be derived twice: {str(error).splitlines()[0]}; use criterion='fisher', which needs "
            "first derivatives only"
        ) from error
    return {name: grad * probes[name] for name, grad in found.items()}


class FisherBlocks:
    """F = DAMPING * I + mean of g g^T over single examples, as blocks on the diagonal, and its inverse.

    Singh & Alistarh 2020 (WoodFisher) and Kurtic et al. 2022 (oBERT) update the inverse example by example (Woodbury).
    Here the blocks themselves are summed and inverted once, in float64: the same matrix, in fewer operations, and
    without the digits that the recursion loses when it starts from 1 / DAMPING.

    Weights are taken output by output; the last block of each is filled up with weights of zero gradient. Memory is
    8 * BLOCK bytes a weight. Raises DataError where that is more than ``LARGEST``.
    """

    def __init__(self, weights: Grads, places: Mapping[str, Weight]) -> None:
        size = sum(8 * BLOCK * w.numel() for w in weights.values())
        if size > LARGEST:
            raise DataError(
                f"the Fisher matrix of {sum(w.numel() for w in weights.values()):,} weights takes {size / 2**30:.1f} "
                f"GiB in blocks of {BLOCK}, more than {LARGEST / 2**30:g}; use criterion='fisher', which keeps its "
                "diagonal only, or ignore= the largest weights"
            )
        self._weights, self._places = weights, places
        self._blocks: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in weights}
        self._count = 0

    def add(self, grads: Grads) -> None:
        self._count += 1
        for name, grad in grads.items():
            self._waiting[name].append(self._rows(name, grad.detach()))
            if len(self._waiting[name]) == TOGETHER:
                self._flush(name)

    def values(self) -> dict[str, Tensor]:
        """The diagonal of the inverse."""
        found = {}
        for name, weight in self._weights.items():
            self._flush(name)
            rows = self._rows(name, weight.detach())
            blocks = self._blocks.pop(name, None)
            flat = torch.full(rows.shape, 1 / DAMPING, dtype=torch.float64, device=rows.device)
            if blocks is not None:
                flat = torch.cat([_inverse_diagonal(part / self._count) for part in torch.split(blocks, 4096)])
            out_dim = self._places[name].out_dim
            shape = weight.movedim(out_dim, 0).shape
            found[name] = flat.flatten()[: weight.numel()].view(shape).movedim(0, out_dim).to(wide(weight.dtype))
        return found

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """(blocks, BLOCK): a tensor of the weight's shape, output by output."""
        flat = tensor.movedim(self._places[name].out_dim, 0).flatten()
        return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)

    def _flush(self, name: str) -> None:
        if waiting := self._waiting[name]:
            together = torch.stack(waiting, dim=2).double()
            waiting.clear()
            if name not in self._blocks:
                self._blocks[name] = together.new_zeros(len(together), BLOCK, BLOCK)
            self._blocks[name].baddbmm_(together, together.mT)


def _inverse_diagonal(blocks: Tensor) -> Tensor:
    damped = blocks + DAMPING * torch.eye(BLOCK, dtype=blocks.dtype, device=blocks.device)
    inverse: Tensor = torch.linalg.inv(damped)
    return inverse.diagonal(dim1=1, dim2=2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision to sum in."""
    return torch.promote_types(dtype, torch.float32)
