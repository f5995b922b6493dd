"""From labelled tensors to named axes: which units exist, where they show up, and which are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.graph import naming
from secateur.graph.labels import Atoms
from secateur.graph.program import Program
from secateur.graph.rules.base import each
from secateur.graph.rules.contraction import KERNEL
from secateur.graph.types import Axis, Flags, Member, Units, Weight

Slot = tuple[str, int, Atoms]  # tensor, dimension, resolved atoms


def gather(program: Program, weights: Mapping[str, Weight]) -> tuple[Axis, ...]:
    """Atoms that show up in the same dimensions of the same tensors form one axis, in program order."""
    slots = [
        (t.name, d, atoms)
        for t in program.tensors.values()
        if t.kind != "constant"
        for d, dim in enumerate(t.dims)
        if (atoms := program.atoms(dim)) is not None
    ]
    signature = _signatures(program, slots).view(np.int64)
    reasons, reason = _frozen(program, slots)
    inexact = np.zeros(program.labels, bool)
    for dim in program.engine.inexact:
        inexact[program.engine.resolve(dim)] = True
    inexact[0] = False
    present = np.zeros(program.labels, bool)
    for _, _, atoms in slots:
        present[atoms] = True
    present[0] = False
    members = np.flatnonzero(present)
    groups, axis_of, unit_of = _grouped(program, members, (inexact, reason, signature))
    if len(lonely := _could_vanish(program, slots, axis_of, groups, reason)):
        reason[lonely] = len(reasons)
        reasons.append("removing it could leave nothing of what is selected here")
        groups, axis_of, unit_of = _grouped(program, members, (inexact, reason, signature))

    where: dict[int, list[Member]] = {}
    parts: dict[int, list[tuple[int, Units]]] = {}  # of dimensions with the same labels
    for name, d, atoms in slots:
        if id(atoms) not in parts:
            parts[id(atoms)] = [part for row in atoms for part in _units(axis_of[row], unit_of[row])]
        for axis, units in parts[id(atoms)]:
            where.setdefault(axis, []).append(Member(name, d, units))
    words, word = _words(program)
    found = []
    for axis, here in where.items():
        atoms = groups[axis]
        if reasons[reason[atoms[0]]] != KERNEL:
            found.append((atoms, _merge_rows(here)))
    names = naming.name([naming.Place(here, words[word[atoms[0]]]) for atoms, here in found], weights)
    least = _least(program, axis_of)
    return tuple(
        Axis(
            name,
            len(atoms),
            tuple(here),
            reasons[reason[atoms[0]]],
            not inexact[atoms[0]],
            atoms,
            least.get(int(axis_of[atoms[0]]), 1),
        )
        for name, (atoms, here) in zip(names, found, strict=True)
    )


def _alike(members: Units, keys: Sequence[NDArray[Any]]) -> list[Units]:
    """The members in groups of equal keys, each in order; the last key sorts the groups."""
    order = np.lexsort(keys)
    differs = np.zeros(max(len(members) - 1, 0), bool)
    for key in keys:
        differs |= key[order][1:] != key[order][:-1]
    return np.split(members[order], np.flatnonzero(differs) + 1)


def _units(axis: NDArray[np.int32], unit: NDArray[np.int32]) -> list[tuple[int, Units]]:
    """Per axis that has indices here (-1: none), the unit that each index belongs to."""
    present = axis[:1] if (axis == axis[0]).all() else np.unique(axis)
    return [(int(a), np.where(axis == a, unit, -1).astype(np.int64)) for a in present if a >= 0]


def _words(program: Program) -> tuple[list[str], Units]:
    """What rules called the units: words, and per atom the number of its word; the first one given counts."""
    words, number = [""], np.zeros(program.labels, np.int64)
    for dim, word in reversed(program.engine.words):
        number[program.engine.resolve(dim)] = len(words)
        words.append(word)
    number[0] = 0
    return words, number


def _least(program: Program, axis_of: NDArray[np.int32]) -> dict[int, int]:
    """Per axis how many units must stay, where that is more than one.

    Of a product each factor must keep that many: more than needed, never less.
    """
    least: dict[int, int] = {}
    for dim, count in program.engine.least:
        for axis in np.unique(axis_of[program.engine.resolve(dim)]):
            least[int(axis)] = max(count, least.get(int(axis), 1))
    return least


def _merge_rows(members: list[Member]) -> list[Member]:
    """One member per tensor and dimension, unless an index belongs to two units of the axis at once."""
    out: list[Member] = []
    first: dict[tuple[str, int], int] = {}
    for m in members:
        at = first.setdefault((m.tensor, m.dim), len(out))
        if at < len(out) and not ((out[at].units >= 0) & (m.units >= 0)).any():
            out[at] = Member(m.tensor, m.dim, np.maximum(out[at].units, m.units))
        else:
            out.append(m)
    return out


def _frozen(program: Program, slots: list[Slot]) -> tuple[list[str], NDArray[np.int64]]:
    """Reason texts, and per atom the number of its reason (0: free). The first reason given wins."""
    reasons: list[str] = [""]
    number: dict[str, int] = {"": 0}
    reason = np.zeros(program.labels, np.int64)

    def mark(atoms: Atoms, why: str) -> None:
        if why not in number:
            number[why] = len(reasons)
            reasons.append(why)
        reason[atoms[reason[atoms] == 0]] = number[why]

    for dim, why in program.engine.freezes:
        mark(program.engine.resolve(dim), why)
    for name, d, atoms in slots:
        everywhere = (atoms[:, None] == atoms[None, :, :1]).any(0).all(1)  # rows of the first column, in all columns
        mark(atoms[everywhere, 0], f"removing it would leave dimension {d} of {name} empty")
    seen = np.zeros(program.labels, np.int64)
    for _, _, atoms in slots:
        seen[atoms] += 1  # once, however often an atom occurs
    if (seen[1:] == 1).any():
        mark(np.flatnonzero((seen == 1) & ~_computed_with(program)), "nothing reads it on the example inputs")
    reason[0] = 0
    return reasons, reason


def _could_vanish(
    program: Program,
    slots: list[Slot],
    axis_of: NDArray[np.int32],
    groups: Sequence[Units],
    reason: NDArray[np.int64],
) -> Atoms:
    """Atoms of one index of each dimension or selection of which nothing might stay, though every axis keeps a unit.

    A whole product, every unit with every other, has an index left whatever is chosen; a selection out of one may not.
    """
    sizes, found = np.array([len(atoms) for atoms in groups]), [np.zeros(0, np.int64)]
    dims = {id(atoms): atoms for _, _, atoms in slots}
    for atoms in (*dims.values(), *map(program.engine.resolve, program.engine.parts)):
        left = np.where((reason[atoms] == 0) & (axis_of[atoms] >= 0), atoms, 0)
        if len(atoms) == 1 or not left.any(0).all():
            continue  # an index stays in any case
        columns = np.unique(np.sort(left, axis=0), axis=1)
        kinds = np.sort(np.where(columns != 0, axis_of[columns], -1), axis=0)
        of, count = np.unique(kinds, axis=1, return_counts=True)
        whole = (n == np.prod(sizes[np.unique(k[k >= 0])]) for k, n in zip(of.T, count, strict=True))
        if not any(whole):
            found.append(columns[columns[:, 0] != 0, 0])
    return np.concatenate(found)


def _grouped(
    program: Program, members: Units, keys: Sequence[NDArray[Any]]
) -> tuple[list[Units], NDArray[np.int32], NDArray[np.int32]]:
    """The atoms of each axis; and per atom its axis and its unit."""
    groups = _alike(members, [key[members] for key in keys])
    axis_of, unit_of = np.full(program.labels, -1, np.int32), np.full(program.labels, -1, np.int32)
    for axis, atoms in enumerate(groups):
        axis_of[atoms], unit_of[atoms] = axis, np.arange(len(atoms))
    return groups, axis_of, unit_of


def _computed_with(program: Program) -> Flags:
    """Atoms that show up in what operators compute; without it, a part of a table that the example does not reach."""
    found: Flags = np.zeros(program.labels, bool)
    for node, value in program.values.items():
        if node.op == "call_function":
            for dim in (dim for dims in each(value) for dim in dims):
                if (atoms := program.atoms(dim)) is not None:
                    found[atoms] = True
    return found


def _signatures(program: Program, slots: list[Slot]) -> NDArray[np.uint64]:
    """Equal for atoms that show up in the same places as the same factor: the sum of one random number per place."""
    signature = np.zeros(program.labels, np.uint64)
    places = [(f"{name}:{d}", atoms) for name, d, atoms in slots]
    places += [(f"part {i}", program.engine.resolve(p)) for i, p in enumerate(program.engine.parts)]
    for place, atoms in places:
        signature[atoms[0] if len(atoms) == 1 else np.unique(atoms)] += _number(place)  # once, however often it occurs
    told_apart = signature.copy()
    for place, atoms in places:
        for number, factor in enumerate(_factors(atoms, signature)):
            told_apart[factor] += _number(f"{place} {number}")
    return told_apart


def _number(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _factors(atoms: Atoms, signature: NDArray[np.uint64]) -> list[Atoms]:
    """The factors of a product whose atoms are otherwise alike, such as heads and their widths.

    Two atoms of one factor never meet in a column, and every column holds one of each factor. Where that cannot be, as
    in the product of an axis with itself, there is but one factor.
    """
    factors: list[Atoms] = []
    kinds = signature[atoms]
    kinds[atoms == 0] = 0
    ordered = np.sort(kinds, axis=0)
    for kind in np.unique(ordered[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)]):
        alike = np.where(kinds == kind, atoms, 0)
        column = alike[:, np.argmax((alike != 0).sum(0))]
        first = column[column != 0]
        every = np.unique(alike[alike != 0])
        apart = np.stack([~np.isin(every, alike[:, (alike == x).any(0)]) | (every == x) for x in first])
        factor = np.zeros(int(every[-1]) + 1, np.int64)
        factor[every] = apart.argmax(0) + 1
        rows = np.sort(factor[alike], axis=0)
        if (apart.sum(0) == 1).all() and not ((rows[1:] == rows[:-1]) & (rows[1:] != 0)).any():
            factors += [every[factor[every] == i + 1] for i in range(len(first))]
    return factors
