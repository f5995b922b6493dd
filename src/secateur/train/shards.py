"""Weights that several processes share (FSDP2's DTensors): what is here of them, and choices that all make alike.

A threshold over all processes is found by bisection: each counts its own scores, the counts are summed. No process
ever holds another one's weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.allocate import best
from secateur.errors import PlanError

Group = Any
"""A process group of torch.distributed; it has no public type."""


@dataclass(frozen=True, eq=False)
class Part:
    """Of a tensor of ``shape`` the rows from ``first`` on, ``rows`` of them, are here; ``group`` holds the others."""

    shape: tuple[int, ...]
    first: int
    rows: int
    group: Group | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:]) if self.group is not None else self.shape

    def slice(self, whole: Tensor) -> Tensor:
        """What is here of a tensor of the whole shape."""
        return whole if self.group is None else whole[self.first : self.first + self.rows]


def local(tensor: Tensor) -> Tensor:
    """What is here of a tensor: its own storage."""
    found = tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]
    assert isinstance(found, Tensor)
    return found


def is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def part_of(tensor: Tensor, name: str) -> Part:
    """Where this process's rows of a tensor lie. Raises PlanError for tensors that are split otherwise than by rows."""
    shape = tuple(tensor.shape)
    if not is_shared(tensor):
        return Part(shape, 0, shape[0] if shape else 0)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    split = [i for i, p in enumerate(placements) if p.is_shard()]
    if any(p.is_partial() for p in placements) or len(split) > 1 or any(placements[i].dim != 0 for i in split):
        raise PlanError(f"{name!r} is placed as {placements}; training prunes tensors split by rows, as FSDP2 does")
    if not split:
        return Part(shape, 0, shape[0] if shape else 0)
    size, rank = mesh.size(split[0]), mesh.get_local_rank(split[0])
    step = math.ceil(shape[0] / size)
    first = min(rank * step, shape[0])
    return Part(shape, first, min(step, shape[0] - first), mesh.get_group(split[0]))


def total(value: Tensor, group: Group | None) -> Tensor:
    """The sum of a tensor over the processes of a group, in place."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def gather(here: Tensor, part: Part) -> Tensor:
    """The whole tensor from everyone's rows; for flags, not for weights."""
    if part.group is None:
        return here
    step = math.ceil(part.shape[0] / dist.get_world_size(part.group))
    mine = here.new_zeros(step, *part.shape[1:], dtype=torch.uint8)
    mine[: part.rows] = here
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(part.group))]
    dist.all_gather(parts, mine, group=part.group)
    return torch.cat(parts)[: part.shape[0]].to(here.dtype)


class SharedGlobal:
    """``allocate.Global`` over scores of which every process has a part: the same counts, from sums of counts."""

    def __init__(self, scores: Mapping[str, Tensor], parts: Mapping[str, Part], sizes: Mapping[str, int]) -> None:
        self._keys = {place: _ordered(s.flatten()) for place, s in scores.items()}
        self._group = next(p.group for p in parts.values() if p.group is not None)
        # What every process has in full counts once.
        self._mine = [p.group is not None or dist.get_rank(self._group) == 0 for p in parts.values()]
        self.sizes, self.rungs = dict(sizes), sum(sizes.values())

    def kept(self, rung: int) -> dict[str, int]:
        if not rung:
            return dict(self.sizes)
        value = _kth(lambda v: int(self._count(torch.le, v).sum()), rung)
        removed, upto = self._count(torch.lt, value).tolist(), self._count(torch.le, value).tolist()
        ties = rung - sum(removed)
        for i in reversed(range(len(removed))):
            taken = min(ties, upto[i] - removed[i])
            removed[i] += taken
            ties -= taken
        return {place: n - gone for (place, n), gone in zip(self.sizes.items(), removed, strict=True)}

    def _count(self, compare: Callable[[Tensor, int], Tensor], value: int) -> Tensor:
        """Per place, how many keys of all processes compare so."""
        found = [
            compare(keys, value).count_nonzero() if mine else keys.new_zeros((), dtype=torch.int64)
            for keys, mine in zip(self._keys.values(), self._mine, strict=True)
        ]
        return total(torch.stack(found), self._group)


def best_here(scores: Tensor, kept: int, size: int, part: Part) -> Tensor:
    """``allocate.best`` of ``size`` scores of which every process has a part, in the order of the processes."""
    if part.group is None:
        return best(scores, kept)
    if not 0 < kept < size:
        return torch.full(scores.shape, kept > 0, dtype=torch.bool, device=scores.device)
    keys = _ordered(scores)
    value = _kth(lambda v: int(total((keys <= v).sum(), part.group)), size - kept + 1)
    keep = keys >= value
    ties = (keys == value).nonzero()[:, 0]
    everyone = keys.new_zeros(dist.get_world_size(part.group), dtype=torch.int64)
    everyone[dist.get_rank(part.group)] = len(ties)
    total(everyone, part.group)
    surplus = int(total(keep.sum(), part.group)) - kept
    later = int(everyone[dist.get_rank(part.group) + 1 :].sum())
    keep[ties[max(0, len(ties) - max(0, surplus - later)) :]] = False
    return keep


def noise(text: str, part: Part, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for the rows that are here, from ``text`` and their place in the whole tensor alone.

    The same whichever process makes them (SplitMix64; Steele et al. 2014).
    """
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    inner = math.prod(part.shape[1:])
    count = math.prod(part.local_shape)
    z = torch.arange(count, dtype=torch.int64, device=device).add_(part.first * inner if part.group is not None else 0)
    z = z.mul_(-7046029254386353131).add_(seed)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _right(z, shift)).mul_(factor)
    z ^= _right(z, 31)
    return _right(z, 40).to(torch.float32).mul_(2.0**-24).view(part.local_shape)


def _right(z: Tensor, shift: int) -> Tensor:
    """Shift the 64 bits right and fill with zeros."""
    return (z >> shift) & ((1 << (64 - shift)) - 1)


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of the scores; -0.0 counts as 0.0."""
    wide = (scores if scores.dtype == torch.float64 else scores.float()) + 0.0
    bits = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _kth(upto: Callable[[int], int], k: int) -> int:
    """The smallest key up to which there are at least ``k``."""
    low, high = -(1 << 63), (1 << 63) - 1
    if upto((1 << 31) - 1) >= k and upto(-(1 << 31) - 1) == 0:
        low, high = -(1 << 31), (1 << 31) - 1
    while low < high:
        middle = (low + high) // 2
        if upto(middle) >= k:
            high = middle
        else:
            low = middle + 1
    return low
