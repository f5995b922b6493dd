"""Weights that several processes share (FSDP2's DTensors): what is here of them, and choices that all make alike.

A threshold over all processes is found digit by digit: each counts its own scores, the counts are summed. No process
ever holds another one's weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.allocate import best
from secateur.errors import PlanError

Group = Any
"""A process group of torch.distributed; it has no public type."""

_DIGIT = 11


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

    @property
    def step(self) -> int:
        """The rows of the first process; the last ones may have fewer, or none."""
        return math.ceil(self.shape[0] / dist.get_world_size(self.group)) if self.group is not None else self.rows

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
    everything = Part(shape, 0, shape[0] if shape else 0)
    if not is_shared(tensor):
        return everything
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    split = [i for i, p in enumerate(placements) if not p.is_replicate()]
    # Strided shards, which FSDP2 makes of what tensor parallelism has split already, are no shards to is_shard.
    if len(split) > 1 or not all(placements[i].is_shard(0) for i in split):
        raise PlanError(f"{name!r} is placed as {placements}; training prunes tensors split by rows, as FSDP2 does")
    if not split:
        return everything
    size, rank = mesh.size(split[0]), mesh.get_local_rank(split[0])
    step = math.ceil(shape[0] / size)
    first = min(rank * step, shape[0])
    return Part(shape, first, min(step, shape[0] - first), mesh.get_group(split[0]))


def common_group(parts: Iterable[Part]) -> Group | None:
    """The processes that share any of the tensors. Raises PlanError where these are not the same ones for all."""
    groups = [part.group for part in parts if part.group is not None]
    if len({tuple(dist.get_process_group_ranks(group)) for group in groups}) > 1:
        raise PlanError("weights are split over different sets of processes; shard them over the same mesh")
    return groups[0] if groups else None


def total(value: Tensor, group: Group | None) -> Tensor:
    """The sum of a tensor over the processes of a group, in place."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def finite_everywhere(tensors: Iterable[Tensor], group: Group | None) -> list[bool]:
    """Which of the tensors are finite on all processes, one answer for all of them; there is at least one tensor."""
    flags = [_finite(tensor) for tensor in tensors]
    wrong = torch.stack([~flag.to(flags[0].device) for flag in flags]).int()
    return [not n for n in total(wrong, group).tolist()]


def _finite(tensor: Tensor) -> Tensor:
    """Whether all elements are finite, in one pass that writes nothing."""
    if tensor.is_complex() or not tensor.numel():
        return tensor.isfinite().all()
    return torch.stack(tensor.aminmax()).isfinite().all()


def gather(here: Tensor, part: Part) -> Tensor:
    """The whole tensor from everyone's rows; for flags, not for weights."""
    if part.group is None:
        return here
    mine = here.new_zeros(part.step, *part.shape[1:], dtype=torch.uint8)
    mine[: part.rows] = here
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(part.group))]
    dist.all_gather(parts, mine, group=part.group)
    return torch.cat(parts)[: part.shape[0]].to(here.dtype)


class SharedGlobal:
    """``allocate.Global`` over scores of which every process has a part: the same counts, from sums of counts."""

    def __init__(self, scores: Mapping[str, Tensor], parts: Mapping[str, Part], sizes: Mapping[str, int]) -> None:
        self._group = common_group(parts.values())
        # What every process has in full counts once.
        mine = [p.group is not None or dist.get_rank(self._group) == 0 for p in parts.values()]
        keys = _ordered(list(scores.values()))
        self._order = _Order([k if m else k[:0] for k, m in zip(keys, mine, strict=True)], self._group)
        self.sizes, self.rungs = dict(sizes), sum(sizes.values())

    def kept(self, rung: int) -> dict[str, int]:
        if not rung:
            return dict(self.sizes)
        _, removed, equal = self._order.at(rung - 1)
        ties = rung - sum(removed)
        for i in reversed(range(len(removed))):
            taken = min(ties, equal[i])
            removed[i] += taken
            ties -= taken
        return {place: n - gone for (place, n), gone in zip(self.sizes.items(), removed, strict=True)}


def best_here(scores: Tensor, kept: int, size: int, part: Part) -> Tensor:
    """``allocate.best`` of ``size`` scores of which every process has a part, in the order of the processes."""
    if part.group is None:
        return best(scores, kept)
    if not 0 < kept < size:
        return torch.full(scores.shape, kept > 0, dtype=torch.bool, device=scores.device)
    keys = _ordered([scores])
    value, below, equal = _Order(keys, part.group).at(size - kept)
    keep = keys[0] >= value
    ties = (keys[0] == value).nonzero()[:, 0]
    everyone = torch.zeros(dist.get_world_size(part.group), dtype=torch.int64, device=scores.device)
    everyone[dist.get_rank(part.group)] = len(ties)
    total(everyone, part.group)
    before = int(everyone[: dist.get_rank(part.group)].sum())
    stay = kept - (size - below[0] - equal[0])
    keep[ties[max(0, stay - before) :]] = False
    return keep


class _Order:
    """Keys of several places, of which every process has a part, in one order.

    How many have which leading digit is counted and summed once; a place in the order is then looked up digit by
    digit, among the keys that agree so far (radix selection).
    """

    def __init__(self, keys: Sequence[Tensor], group: Group) -> None:
        self._keys, self._group = keys, group
        self._bits = 8 * keys[0].element_size()
        widths = [min(_DIGIT, left) for left in range(self._bits, 0, -_DIGIT)]
        self._digits = [(self._bits - sum(widths[: i + 1]), width) for i, width in enumerate(widths)]
        self._leading = self._counts(keys, *self._digits[0])

    def at(self, rank: int) -> tuple[int, list[int], list[int]]:
        """The key at place ``rank`` (from 0); per place, how many keys are smaller, and how many are equal."""
        keys, counts, value = self._keys, self._leading, 0
        below = counts.new_zeros(len(keys))
        for i, (shift, width) in enumerate(self._digits):
            counts = self._counts(keys, shift, width) if i else self._leading
            digit = int((counts.sum(0).cumsum(0) <= rank).sum())
            before = counts[:, :digit].sum(1)
            below, rank = below + before, rank - int(before.sum())
            value = value << width | digit
            keys = [k[_digit(k, shift, width) == digit] for k in keys]
        return value - (1 << self._bits - 1), below.tolist(), counts[:, digit].tolist()

    def _counts(self, keys: Sequence[Tensor], shift: int, width: int) -> Tensor:
        """Per place, how many keys of all processes have which digit."""
        found = [torch.bincount(_digit(k, shift, width), minlength=1 << width) for k in keys]
        return total(torch.stack([counts.to(keys[0].device) for counts in found]), self._group).cpu()


def _digit(keys: Tensor, shift: int, width: int) -> Tensor:
    return ((keys ^ torch.iinfo(keys.dtype).min) >> shift) & ((1 << width) - 1)


def _ordered(scores: Sequence[Tensor]) -> list[Tensor]:
    """Flat integers in the order of the scores; -0.0 counts as 0.0, NaN has no place."""
    wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    found = []
    for score in scores:
        bits = (score.flatten().to(wide) + 0.0).view(torch.int64 if wide == torch.float64 else torch.int32)
        found.append(bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max))
    return found


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
