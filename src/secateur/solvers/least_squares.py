"""Kept weights, refitted in closed form so that a layer gives what it is asked to (He et al. 2017, channel pruning)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS, ENOUGH = 200, 1e-5
"""Conjugate gradients, where every output keeps other inputs: at most so many steps, or that relative residual."""


@dataclass(eq=False)
class Moments:
    """Sums over pairs of inputs x (inputs,) and wanted outputs y (outputs,): all that least squares needs to know.

    Both are shifted by their first batch's mean, so that single precision is enough to add them up.
    """

    count: int = 0
    _shift: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _sums: list[Tensor] = field(default_factory=list, repr=False)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Take in rows: x of shape (rows, inputs), y of shape (rows, outputs)."""
        x, y = x.float(), y.float()
        if self._shift is None:
            self._shift = x.mean(0), y.mean(0)
        x, y = x - self._shift[0], y - self._shift[1]
        sums = [part.double() for part in (x.T @ x, x.T @ y, x.sum(0), y.sum(0))]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.count += len(x)

    @property
    def inputs(self) -> int:
        assert self._shift is not None
        return len(self._shift[0])

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariances of x with x and with y, and the means of both: float64."""
        assert self._shift is not None
        xx, xy, x, y = (part / self.count for part in self._sums)
        return xx - x.outer(x), xy - x.outer(y), x + self._shift[0], y + self._shift[1]

    def raw(self) -> tuple[Tensor, Tensor]:
        """Second moments of x with x and with y, for layers that cannot add a constant: float64."""
        xx, xy, x, y = self.centred()
        return xx + x.outer(x), xy + x.outer(y)


def solve(gram: Tensor, cross: Tensor, weight: Tensor, keep: Tensor, damp: float) -> Tensor:
    """The weights closest to mapping inputs to wanted outputs, of those that are zero outside ``keep``.

    Minimizes E|W x - y|² + damp · mean(diag(gram)) · |W - weight|², which leaves alone what the data say nothing of.

    gram: (inputs, inputs), cross: (inputs, outputs), weight and keep: (outputs, inputs), keep of bools. Returns
    (outputs, inputs), float64.
    """
    weight = torch.where(keep, weight.double(), 0.0)
    ridge = damp * gram.diagonal().mean().clamp_min(1e-30)
    asked = torch.where(keep, cross.T - weight @ gram, 0.0)
    shared = keep.any(0)
    if bool((keep == (shared & keep.any(1, keepdim=True))).all()):
        return weight + _alike(gram, asked, shared, ridge)
    return weight + _apart(gram, asked, keep, ridge)


def _alike(gram: Tensor, asked: Tensor, kept: Tensor, ridge: Tensor) -> Tensor:
    """Every output that keeps any keeps the same inputs: one factorization serves all."""
    change = torch.zeros_like(asked)
    if bool(kept.any()):
        system = gram[kept][:, kept]
        system = system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
        change[:, kept] = torch.cholesky_solve(asked[:, kept].T, torch.linalg.cholesky(system)).T
    return change


def _apart(gram: Tensor, asked: Tensor, keep: Tensor, ridge: Tensor) -> Tensor:
    """Every output keeps inputs of its own: conjugate gradients on all of them at once, within what each keeps."""
    scale = gram.diagonal() + ridge
    change, residual = torch.zeros_like(asked), asked
    step = residual / scale
    fall = (residual * step).sum(1, keepdim=True)
    enough = ENOUGH**2 * fall
    for _ in range(STEPS):
        if bool((fall <= enough).all()):
            break
        image = torch.where(keep, step @ gram + ridge * step, 0.0)
        length = fall / (step * image).sum(1, keepdim=True).clamp_min(1e-300)
        change, residual = change + length * step, residual - length * image
        ready = residual / scale
        before, fall = fall, (residual * ready).sum(1, keepdim=True)
        step = ready + fall / before.clamp_min(1e-300) * step
    return change
