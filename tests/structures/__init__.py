"""The structures that a channel pruner must get right, as small networks: 59 rows, several variants each.

Every network is a case, registered by a decorator that says which row it belongs to, the sizes of *all* axes that must
be free (so that a silent freeze fails, and a false freedom too), and what must be frozen or refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """One network of one row.

    ``build`` makes it, ``inputs`` gives example inputs for a batch size. ``free`` are the sizes of all free axes;
    ``frozen`` is a pattern that the reason of a frozen axis matches; ``refused`` one that the refusal matches.
    ``inexact`` says that something is averaged over what is removed, so that removing is more than zeroing.
    """

    row: int
    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    free: tuple[int, ...]
    frozen: str = ""
    refused: str = ""
    inexact: bool = False
    budget: str = "params=60%"
    batches: tuple[int, ...] = (1, 5)

    @property
    def id(self) -> str:
        return f"{self.row:02d}-{self.name}"


CASES: list[Case] = []


def maps(channels: int = 3, size: int = 8) -> Inputs:
    """Images: (batch, channels, size, size)."""
    return lambda batch: torch.randn(batch, channels, size, size)


IMAGES = maps()


def tokens(features: int = 8, count: int = 5) -> Inputs:
    """Sequences: (batch, count, features)."""
    return lambda batch: torch.randn(batch, count, features)


def vectors(features: int = 6) -> Inputs:
    """(batch, features)."""
    return lambda batch: torch.randn(batch, features)


def ids(vocabulary: int = 20, count: int = 7) -> Inputs:
    """Words: (batch, count)."""
    return lambda batch: torch.randint(0, vocabulary, (batch, count))


def case(row: int, variant: Any = None, *, free: Sequence[int] = (), inputs: Inputs = IMAGES, **rest: Any) -> Any:
    """Register the decorated factory as a case of a row; a ``variant`` is the factory's argument."""

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        made = build if variant is None else lambda: build(variant)
        name = build.__name__ if variant is None else f"{build.__name__}-{variant}"
        CASES.append(Case(row, name, made, inputs, tuple(sorted(free)), **rest))
        return build

    return register
