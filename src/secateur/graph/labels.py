"""The algebra of channels: which indices of which dimensions live and die together.

A dimension of size n is described by an integer array of shape (k, n), or by None where nothing can be
removed. Column i holds the *atoms* of index i, padded with 0: the index stays if all its atoms stay.
One atom per index is a plain axis; columns side by side are a sum of axes (``cat``); two atoms per index
are a product (``view`` to heads x head_dim); any permutation or selection of columns is an index map.

Two facts are recorded about atoms: that two of them are one (union-find), and that one is the product of two
others (found when a ``view`` splits its dimension). Everything is vectorized over indices, so that the cost is
near-linear in nodes x channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Atoms = NDArray[np.int64]
Dim = Atoms | None

_LARGEST = 1 << 24  # indices of one dimension; larger merged dimensions are frozen rather than labelled


class Labels:
    """Atoms, what is known about them, and the notes taken while rules ran."""

    def __init__(self) -> None:
        self.count = 1  # atom 0 means "always stays"
        self._parent: Atoms = np.arange(1024)
        self._left: Atoms = np.zeros(1024, np.int64)
        self._right: Atoms = np.zeros(1024, np.int64)
        self.freezes: list[tuple[Atoms, str]] = []
        self.inexact: list[Atoms] = []
        self.parts: list[Atoms] = []  # subsets that must not become empty: they split axes apart
        self.least: list[tuple[Atoms, int]] = []  # how many indices of a dimension must stay
        self.words: list[tuple[Atoms, str]] = []  # what people call the units of a dimension
        self._refining = False

    def fresh(self, size: int) -> Dim:
        """New atoms for a dimension; None for size 0 or 1, where nothing can be removed."""
        return self._new(size)[None] if size > 1 else None

    def virtual(self, size: int) -> Dim:
        """Atoms for units with nothing behind them (padding); even a single one may go."""
        return self._new(size)[None] if size else None

    def freeze(self, dim: Dim, why: str) -> None:
        """Nothing of ``dim`` may be removed; the first reason given for an atom is the one reported."""
        if dim is not None:
            self.freezes.append((dim, why))

    def mark_inexact(self, dim: Dim) -> None:
        """Removing from ``dim`` is not the same as zeroing, because something is averaged over it."""
        if dim is not None:
            self.inexact.append(dim)

    def mark_part(self, dim: Dim) -> None:
        """``dim`` is a selection out of a larger dimension that must keep something of its own."""
        if dim is not None:
            self.parts.append(dim)

    def keep_at_least(self, dim: Dim, count: int) -> None:
        """Fewer than ``count`` indices of ``dim`` would make no sense."""
        if dim is not None:
            self.least.append((dim, count))

    def call(self, dim: Dim, word: str) -> None:
        """``word`` is what people call the units of ``dim``, such as heads; the first word counts."""
        if dim is not None:
            self.words.append((dim, word))

    def resolve(self, dim: Atoms) -> Atoms:
        """The atoms of ``dim`` as they are known now: sorted columns without repetition, shape (k', n)."""
        rows = self._roots(dim)
        while (split := self._left[rows] != 0).any():
            right = np.where(split, self._right[rows], 0)
            rows = np.where(split, self._left[rows], rows)
            rows = self._roots(np.concatenate([rows, right[right.any(1)]]))
        if len(rows) == 1:
            return rows
        rows = np.sort(rows, axis=0)
        rows[1:][rows[1:] == rows[:-1]] = 0
        rows = np.sort(rows, axis=0)
        first = int(np.argmax(rows.any(1)))  # rows of padding come first
        return rows[first:] if rows[first].any() else rows[-1:]

    def unite(self, a: Dim, b: Dim, why: str) -> None:
        """Index i of ``a`` and index i of ``b`` stay or go together. Freezes what has no common refinement."""
        if a is b:
            return
        if a is None or b is None:
            self.freeze(b if a is None else a, f"meets a dimension that nothing can be removed from, in {why}")
            return
        refined = self._refining
        while True:
            x, y = self._differences(a, b)
            nx, ny = (x != 0).sum(0), (y != 0).sum(0)
            for rows, mine, other in ((x, nx, ny), (y, ny, nx)):
                alone = (other == 0) & (mine > 0)
                if alone.any():
                    self.freeze(rows[:, alone], f"meets a channel that always stays, in {why}")
                    rows[:, alone] = 0
                    mine[alone] = 0
            if not x.any():
                return
            progress = (
                self._union(x, y, (nx == 1) & (ny == 1))
                or self._substitute(x, y, (nx == 1) & (ny > 1))
                or self._substitute(y, x, (ny == 1) & (nx > 1))
                or (not refined and (refined := self._refine(a, b, why)))
            )
            if not progress:
                self.freeze(x, f"two groupings without a common refinement meet in {why}")
                self.freeze(y, f"two groupings without a common refinement meet in {why}")
                return

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """The product of dimensions laid out in row-major order, as ``flatten`` makes it."""
        if all(d is None for d in dims):
            return None
        total = math.prod(sizes)
        if total > _LARGEST:
            for dim in dims:
                self.freeze(dim, f"flattened into a dimension of {total} indices")
            return None
        rows, inner = [], total
        for dim, size in zip(dims, sizes, strict=True):
            inner //= size
            if dim is not None:
                rows.append(np.tile(np.repeat(dim, inner, axis=1), total // (inner * size)))
        return np.concatenate(rows)

    def split(self, dim: Dim, sizes: Sequence[int], why: str) -> list[Dim]:
        """The inverse of ``merge``: factor a dimension, splitting atoms into products where needed."""
        if dim is None or math.prod(sizes) == 0:
            return [None] * len(sizes)
        parts, rest = self._factor(self.resolve(dim), sizes)
        if rest.any():
            rest = np.sort(rest, axis=0)
            grid = rest.reshape(len(rest), *sizes)
            new: list[Dim] = [
                self.fresh(n) if n > 1 and (grid != grid.take([0], axis=t + 1)).any() else None
                for t, n in enumerate(sizes)
            ]
            if all(n is None for n in new):  # the same atoms everywhere: any one dimension can carry them
                first = max(range(len(sizes)), key=lambda t: sizes[t])
                new[first] = np.repeat(rest[:, :1], sizes[first], axis=1)
            else:
                self.unite(rest, self.merge(new, sizes), why)
            return [_stack([part, n]) for part, n in zip(parts, new, strict=True)]
        return [part if part.any() else None for part in parts]

    def reshape(self, dims: Sequence[Dim], old: Sequence[int], new: Sequence[int], why: str) -> list[Dim]:
        """Carry labels through ``view``: merge and split the smallest runs of dimensions that match in size."""
        out: list[Dim] = []
        i = j = 0
        while i < len(old) or j < len(new):
            i0, j0 = i, j
            size_in = size_out = 1
            if i < len(old):
                size_in, i = old[i], i + 1
            if j < len(new):
                size_out, j = new[j], j + 1
            while size_in != size_out:
                if size_in < size_out and i < len(old):
                    size_in, i = size_in * old[i], i + 1
                elif j < len(new):
                    size_out, j = size_out * new[j], j + 1
                else:
                    break
            if i - i0 == 1 and j - j0 == 1:
                out.append(dims[i0])
            elif j > j0:
                out += self.split(self.merge(dims[i0:i], old[i0:i]), new[j0:j], why)
        return out

    def _new(self, size: int) -> Atoms:
        first, self.count = self.count, self.count + size
        while self.count > len(self._parent):
            n = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(n, 2 * n)])
            self._left = np.concatenate([self._left, np.zeros(n, np.int64)])
            self._right = np.concatenate([self._right, np.zeros(n, np.int64)])
        return np.arange(first, self.count)

    def _roots(self, atoms: Atoms) -> Atoms:
        roots = self._parent[atoms]
        while ((up := self._parent[roots]) != roots).any():
            roots = up
        self._parent[atoms] = roots
        return roots

    def _differences(self, a: Atoms, b: Atoms) -> tuple[Atoms, Atoms]:
        """Columns of both, without the atoms that they share."""
        x, y = self.resolve(a), self.resolve(b)
        same = x[:, None] == y[None]
        return np.where(same.any(1), 0, x), np.where(same.any(0), 0, y)

    def _union(self, x: Atoms, y: Atoms, columns: NDArray[np.bool_]) -> bool:
        if not columns.any():
            return False
        p, q = x[:, columns].max(0), y[:, columns].max(0)
        np.minimum.at(self._parent, np.maximum(p, q), np.minimum(p, q))
        return True

    def _substitute(self, one: Atoms, many: Atoms, columns: NDArray[np.bool_]) -> bool:
        """The single atoms of ``one`` become the products that stand in the same columns of ``many``."""
        if not columns.any():
            return False
        singles, first = np.unique(one[:, columns].max(0), return_index=True)
        targets = many[:, columns][:, first]
        fine = ~np.isin(singles, targets)  # an atom cannot become a product that contains it
        if not fine.any():
            return False
        singles, targets = singles[fine], np.sort(targets[:, fine], axis=0)
        right = targets[-1]
        for left in targets[-2:0:-1]:
            pair = self._new(len(singles))
            self._left[pair], self._right[pair] = (
                np.where(left != 0, left, right),
                np.where(left != 0, right, 0),
            )
            right = pair
        left = targets[0] if len(targets) > 2 else targets[-2]
        self._left[singles] = np.where(left != 0, left, right)
        self._right[singles] = np.where(left != 0, right, 0)
        return True

    def _refine(self, a: Atoms, b: Atoms, why: str) -> bool:
        """Two products of different shape: split one the way the other is built, then unite part by part."""
        n = a.shape[1]
        for x, y in ((a, b), (b, a)):
            rows = self.resolve(x)
            for inner in (d for d in range(2, n // 2 + 1) if n % d == 0):
                sizes = (n // inner, inner)
                parts, rest = self._factor(rows, sizes)
                if not rest.any() and all(p.any() for p in parts):
                    self._refining = True  # what the split unites must not start to refine in turn
                    for mine, other in zip(parts, self.split(y, sizes, why), strict=True):
                        self.unite(mine, other, why)
                    self._refining = False
                    return True
        return False

    def _factor(self, rows: Atoms, sizes: Sequence[int]) -> tuple[list[Atoms], Atoms]:
        """Per new dimension the atoms shared by a whole slab, and the atoms that no slab accounts for."""
        grid = rows.reshape(len(rows), *sizes)
        parts, rest = [], rows
        inner = rows.shape[1]
        for t, n in enumerate(sizes):
            inner //= n
            slabs = np.moveaxis(grid, t + 1, 1).reshape(len(rows), n, -1)
            candidates = slabs[:, :, 0]
            shared = (slabs[None] == candidates[:, None, :, None]).any(1).all(-1)
            part = np.where(shared, candidates, 0)
            if (part == part[:, :1]).all():
                part = np.zeros_like(part)  # the same everywhere says nothing about this dimension
            parts.append(part)
            everywhere = np.tile(np.repeat(part, inner, axis=1), rows.shape[1] // (inner * n))
            rest = np.where((rest[:, None] == everywhere[None]).any(1), 0, rest)
        return parts, rest


def _stack(dims: Sequence[Dim]) -> Dim:
    """Several sets of atoms over the same indices, all of which must stay."""
    rows = [d for d in dims if d is not None and d.any()]
    return np.concatenate(rows) if rows else None


def concatenate(dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """The sum of dimensions one after the other, as ``cat`` makes it."""
    if all(d is None for d in dims):
        return None
    k = max(len(d) for d in dims if d is not None)
    columns = []
    for dim, size in zip(dims, sizes, strict=True):
        column = np.zeros((k, size), np.int64)
        if dim is not None:
            column[: len(dim)] = dim
        columns.append(column)
    return np.concatenate(columns, axis=1)
