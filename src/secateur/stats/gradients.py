"""What the loss says about weights: first derivatives, of batches and of single examples, and second ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from secateur.errors import DataError
from secateur.graph.types import Weight

BLOCK = 50
"""Weights of one block of the Fisher matrix, consecutive inputs of an output (Kurtic et al. 2022)."""

DAMPING = 1e-7
"""What is added to the diagonal of the Fisher matrix before it is inverted (Kurtic et al. 2022)."""

LARGEST = 8 << 30
"""Bytes that the blocks of the Fisher matrix may take: 8 * BLOCK for every weight."""

PROBES = 4
"""Random probes of each batch's outputs."""

OUTPUTS = 1024
"""Numbers that the model may give for one example, for the loss's Hessian by them to be worked out."""

TOGETHER = 16
"""Examples whose gradients are held before they go into the blocks: one product instead of many."""

COLLECTED = {
    "grad_abs": "the mean over calibration batches of |dL/dw|, of the weight's shape",
    "grad_square": "the mean over single calibration examples of (dL/dw)**2: the diagonal of the empirical Fisher "
    "matrix, of the weight's shape",
    "fisher_inverse": "the diagonal of the inverse of the empirical Fisher matrix in blocks, of the weight's shape",
    "curvature": "the diagonal of the loss's Gauss-Newton matrix, by random probes of the outputs, of the weight's "
    "shape",
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


def first(loss: Tensor, weights: Grads, along: Tensor | None = None) -> dict[str, Tensor]:
    """dL/dw of the weights that the loss depends on. What was computed on the way to it is kept."""
    found = torch.autograd.grad(loss, list(weights.values()), along, retain_graph=True, allow_unused=True)
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


def probes(output: Any, loss: Callable[[Any], Tensor], weights: Grads, seed: str) -> Iterator[dict[str, Tensor]]:
    """Gradients whose mean square is the diagonal of the Gauss-Newton matrix J^T H J, of the outputs' Jacobian J and
    the Hessian H of the loss by the outputs.

    With H = S S^T and a random e of +1 and -1, J^T S e is such a gradient (Botev et al. 2017): one derivation of the
    model a probe. H is in blocks, one per example, and where it has negative eigenvalues they count as none.
    """
    leaves, form = tree_flatten(output)
    at = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.requires_grad]
    length = len(leaves[at[0]]) if at and leaves[at[0]].dim() else 0
    if not length or any(leaves[i].dim() < 1 or len(leaves[i]) != length for i in at):
        raise DataError(
            "criterion 'obd' needs outputs with one row per example; use 'fisher', which needs the loss only"
        )
    rows = torch.cat([leaves[i].flatten(1) if leaves[i].dim() > 1 else leaves[i][:, None] for i in at], 1)
    if rows.shape[1] > OUTPUTS:
        raise DataError(
            f"the model gives {rows.shape[1]:,} numbers per example, more than the {OUTPUTS} whose Hessian criterion "
            "'obd' works out; use 'fisher', which needs the loss only"
        )

    def of_rows(z: Tensor) -> Tensor:
        parts = torch.split(z, [leaves[i].numel() // length for i in at], 1)
        changed = {i: part.view(leaves[i].shape) for i, part in zip(at, parts, strict=True)}
        return loss(tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)], form))

    values, vectors = torch.linalg.eigh(_hessian(of_rows, rows.detach()))
    for k in range(PROBES):
        signs = torch.randint(0, 2, values.shape, generator=seeded(f"{seed}:{k}")).mul_(2).sub_(1).to(values)
        along = (vectors * values.clamp_min(0).sqrt()[:, None]) @ signs[:, :, None]
        yield first(rows, weights, along[:, :, 0].to(rows.dtype))


def _hessian(loss: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """(examples, outputs, outputs), symmetric: the second derivatives of the loss by each example's outputs."""
    z = rows.to(wide(rows.dtype)).requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
    columns = []
    for c in range(z.shape[1]):
        found = torch.autograd.grad(grad[:, c].sum(), z, retain_graph=True) if grad.requires_grad else (None,)
        columns.append(found[0] if found[0] is not None else torch.zeros_like(z))
    blocks = torch.stack(columns, 2)
    return (blocks + blocks.mT) / 2


class FisherBlocks:
    """F = DAMPING * I + mean of g g^T over single examples, as blocks on the diagonal, and its inverse.

    Singh & Alistarh 2020 (WoodFisher) and Kurtic et al. 2022 (oBERT) update the inverse example by example (Woodbury).
    Here the blocks themselves are summed and inverted once, in float64: the same matrix, in fewer operations, and
    without the digits that the recursion loses when it starts from 1 / DAMPING.

    Weights are taken output by output; the last block of each is filled up with weights of zero gradient. Memory is
    8 * BLOCK bytes a weight. Raises DataError where that is more than ``LARGEST``.
    """

    def __init__(self, weights: Grads, places: Mapping[str, Weight]) -> None:
        require_room(sum(w.numel() for w in weights.values()), "criterion='fisher'")
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


def require_room(weights: int, instead: str) -> None:
    """Raise DataError where the blocks of so many weights would take more than ``LARGEST``."""
    if (size := 8 * BLOCK * weights) > LARGEST:
        raise DataError(
            f"the Fisher matrix of {weights:,} weights takes {size / 2**30:.1f} GiB in blocks of {BLOCK}, more than "
            f"{LARGEST / 2**30:g}; use {instead}, which keeps its diagonal only, or ignore= the largest weights"
        )


def damped(blocks: Tensor, damping: float) -> Tensor:
    """Blocks (n, b, b) with ``damping`` added to their diagonals, so that they can be inverted."""
    return blocks + damping * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def _inverse_diagonal(blocks: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(damped(blocks, DAMPING))
    return inverse.diagonal(dim1=1, dim2=2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision to sum in."""
    return torch.promote_types(dtype, torch.float32)
