"""The k-th smallest of many tensors together, exactly, without concatenating them.

A small sample brackets the value; one pass counts what lies below the bracket and gathers what lies inside. Extra
memory: the sample, the gathered part (a fraction of a percent), and flags of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_SAMPLE = 1 << 18
_CHUNK = 1 << 22


def kth_smallest(tensors: Sequence[Tensor], k: int) -> Tensor:
    """The value at place ``k`` (from 0) of all elements in ascending order: a 0-dimensional tensor.

    tensors: floating point, finite, of any shapes. Ties need no care: the value is exact.
    """
    total = sum(t.numel() for t in tensors)
    assert 0 <= k < total
    low, high = _bracket(tensors, k, total)
    while True:
        below = inside = 0
        gathered: list[Tensor] = []
        for chunk in _chunks(tensors):
            below += int((chunk < low).sum())
            if low == high:
                inside += int((chunk == low).sum())
            else:
                found = chunk[(chunk >= low) & (chunk <= high)]
                inside += found.numel()
                gathered.append(found)
        if below <= k < below + inside:
            if low == high:
                return low
            return torch.cat(gathered).kthvalue(k - below + 1).values
        infinity = torch.full_like(low, math.inf)  # the sample misled: take everything on the side it missed
        low, high = (-infinity, low) if k < below else (high, infinity)


def smallest_below(tensors: Sequence[Tensor], value: Tensor) -> list[int]:
    """Per tensor, how many elements are smaller than ``value``."""
    return [sum(int((chunk < value).sum()) for chunk in _chunks([t])) for t in tensors]


def best(scores: Tensor, count: int) -> Tensor:
    """Flags of the ``count`` largest elements of a flat tensor; among equals the first ones stay."""
    n = scores.numel()
    if count >= n or count <= 0:
        return torch.full((n,), count > 0, dtype=torch.bool, device=scores.device)
    value = kth_smallest([scores], n - count)
    keep = scores > value
    missing = count - int(keep.sum())
    keep[(scores == value).nonzero()[:missing, 0]] = True
    return keep


def _bracket(tensors: Sequence[Tensor], k: int, total: int) -> tuple[Tensor, Tensor]:
    """Two values that very likely enclose the wanted one: sample quantiles, six standard errors apart."""
    stride = max(1, total // _SAMPLE)
    dtype = max((t.dtype for t in tensors), key=lambda d: torch.finfo(d).bits)
    sample = torch.cat([t.flatten()[::stride].to(dtype) for t in tensors if t.numel()]).sort().values
    n, p = len(sample), (k + 0.5) / total
    margin = 6 * math.sqrt(p * (1 - p) / n) + 2 / n if stride > 1 else 0.5 / n
    first, last = math.floor((p - margin) * n), math.ceil((p + margin) * n)
    infinity = torch.full_like(sample[0], math.inf)
    return (sample[first] if first >= 0 else -infinity), (sample[last] if last < n else infinity)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from torch.split(tensor.flatten(), _CHUNK)
