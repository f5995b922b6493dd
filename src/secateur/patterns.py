"""The shape of what is removed. Notation is parsed here and nowhere else; ``parse(str(p)) == p``.

unstructured    single weights
2:4             N kept of every M weights along the inputs
block:4x1       blocks of 4 outputs x 1 input
channel         whole units, really removed
channel/8       whole units, kept counts in multiples of 8
layer           whole residual blocks, really removed
channel+layer   both, under one budget; also channel/8+layer
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SpecError
from secateur.graph.types import Weight


@dataclass(frozen=True)
class Unstructured:
    """Single weights."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """``n`` weights are **kept** of every ``m`` consecutive ones along the input dimension."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` outputs x ``cols`` inputs, on the weight seen as (outputs, everything else)."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Channel:
    """Units of an axis; what is kept is a multiple of ``multiple``, or the whole axis."""

    multiple: int = 1

    def __str__(self) -> str:
        return "channel" if self.multiple == 1 else f"channel/{self.multiple}"


@dataclass(frozen=True)
class Layer:
    """Residual blocks as a whole, such as the layers of a transformer."""

    def __str__(self) -> str:
        return "layer"


@dataclass(frozen=True)
class Both:
    """Blocks, and units of what is left."""

    channel: Channel = Channel()

    def __str__(self) -> str:
        return f"{self.channel}+layer"


Pattern = Unstructured | NM | Block | Channel | Layer | Both


def parse(text: str) -> Pattern:
    """Read a pattern. Raises SpecError for anything else than the forms above."""
    if not isinstance(text, str):
        raise SpecError(f"a pattern is a text such as 'channel' or '2:4', found {type(text).__name__}")
    text = text.strip()
    if text == "unstructured":
        return Unstructured()
    if text == "layer":
        return Layer()
    if text.endswith("+layer") and isinstance(units := parse(text.removesuffix("+layer")), Channel):
        return Both(units)
    if text == "channel":
        return Channel()
    if found := re.fullmatch(r"channel/([1-9]\d*)", text):
        return Channel(int(found[1]))
    if (found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)) and int(found[1]) < int(found[2]):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", text):
        return Block(int(found[1]), int(found[2]))
    raise SpecError(
        f"pattern {text!r} is unknown; expected unstructured, N:M (N kept of M, such as 2:4), block:RxC (such as "
        "block:4x1), channel, channel/K (kept counts in multiples of K), layer, or channel+layer"
    )


def why_not(pattern: Pattern, weight: Weight) -> str:
    """Why the pattern cannot be applied to a weight; "" where it can."""
    if isinstance(pattern, NM) and weight.shape[weight.in_dim] < pattern.m:
        return f"has {weight.shape[weight.in_dim]} inputs, fewer than the {pattern.m} of a {pattern} group"
    if isinstance(pattern, Block):
        outputs, inputs = _matrix(weight)
        if outputs < pattern.rows or inputs < pattern.cols:
            return f"is {outputs}x{inputs}, smaller than a block of {pattern.rows}x{pattern.cols}"
    return ""


def pool(pattern: Pattern, scores: Tensor, weight: Weight) -> Tensor:
    """Element scores (of the weight's shape) -> unit scores, flat: the mean of each unit's elements."""
    if isinstance(pattern, Block):
        rows, cols = _grid(pattern, weight)
        view = scores.movedim(weight.out_dim, 0).flatten(1)
        padded = scores.new_zeros(rows * pattern.rows, cols * pattern.cols)
        padded[: view.shape[0], : view.shape[1]] = view
        sums = padded.view(rows, pattern.rows, cols, pattern.cols).sum((1, 3))
        return (sums / _sizes(pattern, *view.shape).to(sums)).flatten()
    return scores.flatten()


def unit_size(pattern: Pattern) -> int:
    """Elements of one unit; blocks at the edge of a weight may have fewer (see ``edge_sizes``)."""
    return pattern.rows * pattern.cols if isinstance(pattern, Block) else 1


def edge_sizes(pattern: Pattern, weight: Weight) -> Tensor | None:
    """Elements of every unit, flat, where blocks do not tile the weight; None where all units are equal."""
    outputs, inputs = _matrix(weight)
    if not isinstance(pattern, Block) or (outputs % pattern.rows == 0 and inputs % pattern.cols == 0):
        return None
    return _sizes(pattern, outputs, inputs).flatten()


def spread(pattern: Pattern, keep: Tensor, weight: Weight) -> Tensor:
    """Flat flags per unit -> a mask of the weight's shape; the inverse of ``pool``."""
    if isinstance(pattern, Block):
        rows, cols = _grid(pattern, weight)
        outputs, inputs = _matrix(weight)
        wide = keep.view(rows, 1, cols, 1).expand(rows, pattern.rows, cols, pattern.cols)
        view = wide.reshape(rows * pattern.rows, cols * pattern.cols)[:outputs, :inputs]
        moved = [n for d, n in enumerate(weight.shape) if d != weight.out_dim]
        return view.reshape(outputs, *moved).movedim(0, weight.out_dim).contiguous()
    return keep.view(weight.shape)


def nm_mask(pattern: NM, scores: Tensor, weight: Weight) -> Tensor:
    """The mask that keeps the ``n`` best of every ``m`` along the inputs, the first ones among equals.

    A tail of fewer than ``m`` inputs stays dense.
    """
    along = scores.movedim(weight.in_dim, -1)
    groups = along.shape[-1] // pattern.m
    mask = torch.ones(along.shape, dtype=torch.bool, device=scores.device)
    whole = along[..., : groups * pattern.m].reshape(-1, pattern.m)
    best = whole.argsort(dim=-1, descending=True, stable=True)[:, : pattern.n]
    kept = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, best, True)
    mask[..., : groups * pattern.m] = kept.view(*along.shape[:-1], groups * pattern.m)
    return mask.movedim(-1, weight.in_dim).contiguous()


def _matrix(weight: Weight) -> tuple[int, int]:
    """Outputs, which a process may have none of, and everything else."""
    others = (n for dim, n in enumerate(weight.shape) if dim != weight.out_dim)
    return weight.shape[weight.out_dim], math.prod(others)


def _grid(pattern: Block, weight: Weight) -> tuple[int, int]:
    outputs, inputs = _matrix(weight)
    return math.ceil(outputs / pattern.rows), math.ceil(inputs / pattern.cols)


def _sizes(pattern: Block, outputs: int, inputs: int) -> Tensor:
    """Elements of every block, of shape (block rows, block columns)."""
    rows, cols = (
        torch.tensor([min(step, n - start) for start in range(0, n, step)])
        for n, step in ((outputs, pattern.rows), (inputs, pattern.cols))
    )
    return rows[:, None] * cols[None]
