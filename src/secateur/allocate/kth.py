"""Order statistics of many tensors together: exact, without concatenating or sorting them.

A random sample brackets the wanted value; one pass counts what lies outside the bracket, and only what lies inside,
a percent or so, is gathered. Extra memory is that percent and the flags of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SAMPLE = 1 << 16
# As many elements as torch computes on one thread: threads gain nothing here, and on a busy machine thousands of
# short parallel sections take minutes, waiting for each other.
_CHUNK = 1 << 15


def kth_smallest(tensors: Sequence[Tensor], k: int) -> Tensor:
    """The value at place ``k`` (from 0) of all elements in ascending order: a 0-dimensional tensor.

    tensors: floating point without NaN, of any shapes, of one dtype and on one device.
    """
    total = sum(t.numel() for t in tensors)
    assert 0 <= k < total
    if total <= _SAMPLE:
        return torch.cat([t.flatten() for t in tensors]).kthvalue(k + 1).values
    low, high = _bracket(tensors, k)
    while True:
        upto = count(tensors, torch.le, low)
        if k < upto:
            if count(tensors, torch.lt, low) <= k:
                return low
            low, high = torch.full_like(low, -math.inf), low
            continue
        inside = torch.cat([between(t, low, high) for t in tensors])
        if k < upto + len(inside):
            return inside.kthvalue(k - upto + 1).values
        if k < count(tensors, torch.le, high):
            return high
        low, high = high, torch.full_like(high, math.inf)


def count(tensors: Sequence[Tensor], compare: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> int:
    """How many elements compare so with ``value``: ``torch.lt`` counts those that are smaller."""
    return sum(int(compare(chunk, value).count_nonzero()) for t in tensors for chunk in _chunks(t))


def between(tensor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The elements strictly between two values, flat, in order."""
    return torch.cat([chunk.masked_select((chunk > low) & (chunk < high)) for chunk in _chunks(tensor)])


def best(scores: Tensor, kept: int) -> Tensor:
    """Flags of the ``kept`` largest elements of a flat tensor; among equals the first ones stay."""
    n = scores.numel()
    if not 0 < kept < n:
        return torch.full((n,), kept > 0, dtype=torch.bool, device=scores.device)
    value = kth_smallest([scores], n - kept)
    keep = scores >= value
    surplus = int(keep.count_nonzero()) - kept
    for part, flags in zip(reversed(_chunks(scores)), reversed(_chunks(keep)), strict=True):
        if not surplus:
            break
        last = (part == value).nonzero()[-surplus:, 0]
        flags[last] = False
        surplus -= len(last)
    return keep


def _bracket(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Two values that enclose the wanted one, unless the sample is six standard errors off."""
    total = sum(t.numel() for t in tensors)
    generator = torch.Generator().manual_seed(0)
    parts = [t.flatten() for t in tensors if t.numel()]
    for i, part in enumerate(parts):
        size = math.ceil(_SAMPLE / total * len(part))
        parts[i] = part[torch.randint(len(part), (size,), generator=generator).to(part.device)]
    sample = torch.cat(parts).sort().values
    n, p = len(sample), (k + 0.5) / total
    margin = 6 * math.sqrt(p * (1 - p) * n) + 2
    first, last = math.floor(p * n - margin), math.ceil(p * n + margin)
    infinity = torch.full_like(sample[0], math.inf)
    return sample[first] if first >= 0 else -infinity, sample[last] if last < n else infinity


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.flatten(), _CHUNK)
