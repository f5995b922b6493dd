"""Places that keep the same part of their units, because one number has to say how many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from secateur.errors import SpecError

Groups = Sequence[Sequence[str]]


def known(groups: Groups, axes: Iterable[str]) -> Groups:
    """The groups as they are. Raises SpecError for a name that is no axis."""
    names = set(axes)
    for name in (name for group in groups for name in group):
        if name not in names:
            raise SpecError(f"equal names {name!r}, which is no axis; `secateur inspect` lists them")
    return groups


def of_one_size(totals: Mapping[str, int]) -> Groups:
    """Places with equally many units."""
    found: dict[int, list[str]] = {}
    for name, total in totals.items():
        found.setdefault(total, []).append(name)
    return list(found.values())


def steps(groups: Groups) -> dict[str, tuple[str, ...]]:
    """For every place in a group all that change with it; groups that share a place are one."""
    found: dict[str, tuple[str, ...]] = {}
    for group in groups:
        whole = tuple(dict.fromkeys(n for name in group for n in (name, *found.get(name, ()))))
        found |= dict.fromkeys(whole, whole)
    return found


def level(
    counts: Mapping[str, int], totals: Mapping[str, int], groups: Groups, allowed: Callable[[str, int], int]
) -> dict[str, int]:
    """``counts`` with the same part kept throughout each group: the mean part, or the next that is possible.

    Possible are parts into which all totals of the group divide, and counts that ``allowed`` returns as they are.
    """
    out = dict(counts)
    for group in groups:
        parts = math.gcd(*(totals[n] for n in group))
        kept, total = sum(counts[n] for n in group), sum(totals[n] for n in group)
        k = max(1, -(-kept * parts // total))
        while k < parts and any(allowed(n, k * totals[n] // parts) != k * totals[n] // parts for n in group):
            k += 1
        out |= {n: k * totals[n] // parts for n in group}
    return out
