"""How much to prune, of what: the checks and the arithmetic that all methods share."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from secateur.errors import SpecError

Amount = int | float
"""An int is a number of units, a float in [0, 1] a part of those that are left."""

Order = int | float | str
"""The ``p`` of ``torch.norm``."""


def check_amount(amount: Amount) -> None:
    """Raises TypeError for what is no number; SpecError for a negative int, or a float outside [0, 1]."""
    if not isinstance(amount, numbers.Real):
        raise TypeError(f"amount={amount!r} has an invalid type; give an int (units) or a float in [0, 1] (a part)")
    if not (amount >= 0 if isinstance(amount, numbers.Integral) else 0 <= amount <= 1):
        raise SpecError(
            f"amount={amount} should either be a float in the range [0, 1] (a part) or a non-negative integer (units)"
        )


def check_amount_of(amount: Amount, tensor_size: int) -> None:
    """Raises SpecError where more units are asked for than there are."""
    if isinstance(amount, numbers.Integral) and amount > tensor_size:
        raise SpecError(
            f"amount={amount} should be smaller than the number of parameters to prune={tensor_size}; "
            "what is pruned already does not count"
        )


def count(amount: Amount, tensor_size: int) -> int:
    """The number of units; parts are rounded as Python does, halves to the even neighbour."""
    return int(amount) if isinstance(amount, numbers.Integral) else round(amount * tensor_size)


def check_structured(t: Tensor) -> None:
    """Raises SpecError for a tensor of one dimension, which has no channels."""
    if t.dim() <= 1:
        raise SpecError(
            "Structured pruning can only be applied to multidimensional tensors. "
            f"Found tensor of shape {list(t.shape)} with {t.dim()} dims; use an unstructured method"
        )


def check_dim(t: Tensor, dim: int) -> None:
    """Raises TypeError for what is no whole number, IndexError where ``t`` has no dimension ``dim``."""
    if not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim={dim!r} has an invalid type; give the number of a dimension")
    if not -t.dim() <= dim < t.dim():
        raise IndexError(f"Invalid index {dim} for tensor of size {list(t.shape)}; it has {t.dim()} dimensions")


def norm(t: Tensor, n: Order, dim: int) -> Tensor:
    """The ``n``-norm of every channel along ``dim``, of shape ``[t.shape[dim]]``.

    ``"fro"`` is the 2-norm, in any number of dimensions; ``"nuc"`` needs channels that are matrices.
    """
    others = [d for d in range(t.dim()) if d != dim % t.dim()]
    norms: Tensor = torch.norm(t, p=2 if n == "fro" else n, dim=others)
    return norms
