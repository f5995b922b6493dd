"""From labelled tensors to named axes: which units exist, where they show up, and which are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secateur.graph.labels import Atoms
from secateur.graph.program import Program
from secateur.graph.rules.contraction import KERNEL
from secateur.graph.types import Axis, Member, Weight

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
    reasons, reason = _frozen(program, slots)
    inexact = np.zeros(program.labels, bool)
    for dim in program.engine.inexact:
        inexact[program.engine.resolve(dim)] = True
    inexact[0] = False
    signature = _signatures(program, slots)
    key = np.stack([signature.view(np.int64), reason, inexact.astype(np.int64)], axis=1)
    present = np.zeros(program.labels, bool)
    for _, _, atoms in slots:
        present[atoms] = True
    present[0] = False
    members = np.flatnonzero(present)
    _, group = np.unique(key[members], axis=0, return_inverse=True)
    axis_of = np.full(program.labels, -1)
    axis_of[members] = group.reshape(-1)
    unit_of = np.full(program.labels, -1)
    order = np.argsort(group.reshape(-1), kind="stable")
    sizes = np.bincount(group.reshape(-1)) if len(members) else np.zeros(0, np.int64)
    unit_of[members[order]] = np.concatenate([np.arange(n) for n in sizes]) if len(sizes) else []

    where: dict[int, list[Member]] = {}
    for name, d, atoms in slots:
        for row in atoms:
            for axis in np.unique(axis_of[row]):
                if axis >= 0:
                    units = np.where(axis_of[row] == axis, unit_of[row], -1)
                    where.setdefault(int(axis), []).append(Member(name, d, units))
    names = _Names(weights)
    axes = []
    for axis, found in where.items():
        atoms = members[group.reshape(-1) == axis]
        why = reasons[reason[atoms[0]]]
        if why != KERNEL:
            found = _merge_rows(found)
            name = names.of(found)
            axes.append(Axis(name, len(atoms), tuple(found), why, not inexact[atoms[0]], atoms))
    return tuple(axes)


def _merge_rows(members: list[Member]) -> list[Member]:
    """One member per tensor and dimension, unless an index belongs to two units of the axis at once."""
    out: list[Member] = []
    for m in members:
        last = next((o for o in out if (o.tensor, o.dim) == (m.tensor, m.dim)), None)
        if last is not None and not ((last.units >= 0) & (m.units >= 0)).any():
            out[out.index(last)] = Member(m.tensor, m.dim, np.maximum(last.units, m.units))
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
    reason[0] = 0
    return reasons, reason


def _signatures(program: Program, slots: list[Slot]) -> NDArray[np.uint64]:
    """Equal for atoms that show up in the same places: the sum of one random number per place."""
    signature = np.zeros(program.labels, np.uint64)
    places = [(f"{name}:{d}", atoms) for name, d, atoms in slots]
    places += [(f"part {i}", program.engine.resolve(p)) for i, p in enumerate(program.engine.parts)]
    for place, atoms in places:
        number = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")
        signature[np.unique(atoms)] += np.uint64(number)
    return signature


class _Names:
    """Unique, stable names: the module that produces the units, numbered where one produces several axes."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        self.taken: dict[str, int] = {}

    def of(self, members: list[Member]) -> str:
        producer = next(
            (m for m in members if m.tensor in self.weights and m.dim == self.weights[m.tensor].out_dim),
            members[0],
        )
        base = producer.tensor.removesuffix(".weight")
        if producer.tensor in self.weights and producer.dim != self.weights[producer.tensor].out_dim:
            base += " inputs"
        n = self.taken[base] = self.taken.get(base, 0) + 1
        return base if n == 1 else f"{base} #{n}"
