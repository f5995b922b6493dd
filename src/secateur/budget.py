"""What must hold. Notation is parsed here and nowhere else; ``parse(str(b)) == b``.

    sparsity=90%                       removed, of the weights that the pattern applies to
    params=50%  params=1.2M            what remains of the parameters (with masks: the nonzero ones)
    macs=50%    macs=40M               what remains of the multiply-adds
    size=50%    size=10MB              what remains of the bytes
    latency=50% latency=5ms            what remains of the time, measured on this machine
    threshold=1e-3                     every unit with a lower score is removed
    max_drop=1%                        the accuracy that may be lost

A fraction is written ``50%`` or ``0.5``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from secateur.errors import SpecError

_UNITS: dict[str, dict[str, int | Fraction]] = {
    "params": {"": 1, "k": 10**3, "M": 10**6, "G": 10**9},
    "macs": {"": 1, "k": 10**3, "M": 10**6, "G": 10**9},
    "size": {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "latency": {"ms": 1, "us": Fraction(1, 1000), "s": 1000},
}
KINDS = ("sparsity", "params", "macs", "size", "latency", "threshold", "max_drop")
_CANONICAL = {"params": "", "macs": "", "size": "B", "latency": "ms", "threshold": ""}


@dataclass(frozen=True)
class Budget:
    """``value`` is a fraction of the dense model where ``relative``, otherwise a count, bytes, ms or score."""

    kind: str
    value: Fraction
    relative: bool

    def __str__(self) -> str:
        if self.relative:
            return f"{self.kind}={_decimal(self.value * 100)}%"
        return f"{self.kind}={_decimal(self.value)}{_CANONICAL[self.kind]}"

    @property
    def removed(self) -> Fraction:
        """The part of the dense model that goes, of a relative budget."""
        return self.value if self.kind == "sparsity" else 1 - self.value

    def limit(self, total: float) -> float:
        """What may remain, where the dense model has ``total``."""
        return float(self.value * Fraction(total)) if self.relative else float(self.value)


def kept_count(sparsity: Fraction, total: int) -> int:
    """How many of ``total`` stay at that sparsity, in exact arithmetic: never too many."""
    return int((1 - sparsity) * total)


def rounds(budget: Budget, number: int) -> Iterator[Budget]:
    """The way to a budget in rounds that each keep the same part of what the one before left; the last is the budget.

    Raises SpecError for a budget that is no part of the dense model.
    """
    kinds = ("sparsity", "params", "macs", "size")
    if not (budget.relative and budget.kind in kinds):
        raise SpecError(f"budget {str(budget)!r} cannot be split into rounds; expected a part, such as macs=50%")
    removes = budget.kind == "sparsity"
    left = 1 - budget.value if removes else budget.value
    for done in range(1, number):
        now = Fraction(round(float(left) ** (done / number), 6)).limit_denominator(10**6)
        yield replace(budget, value=1 - now if removes else now)
    yield budget


def parse(text: str) -> Budget:
    """Read a budget. Raises SpecError for anything else than the forms above."""
    if not isinstance(text, str):
        raise SpecError(f"a budget is a text such as 'macs=50%', found {type(text).__name__}")
    kind, equals, written = (part.strip() for part in text.partition("="))
    found = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d\d?)?)\s*([A-Za-z%]*)", written)
    if kind not in KINDS or not equals or found is None or len(written) > 40:
        raise _unreadable(text)
    number, unit = Fraction(found[1]), found[2]
    if kind == "threshold":
        if unit:
            raise _unreadable(text)
        return Budget(kind, number, relative=False)
    if unit == "%" or (not unit and number < 1):
        value = number / 100 if unit == "%" else number
        if not (0 <= value < 1 if kind in ("sparsity", "max_drop") else 0 < value <= 1):
            raise SpecError(f"budget {text!r} is out of range; expected a part of the dense model, such as {kind}=50%")
        return Budget(kind, value, relative=True)
    units = _UNITS.get(kind, {})
    if unit not in units or number == 0 or (kind != "latency" and number * units[unit] < 1):
        raise _unreadable(text)
    return Budget(kind, number * units[unit], relative=False)


def _unreadable(text: str) -> SpecError:
    return SpecError(
        f"budget {text!r} cannot be read; expected one of sparsity=90%, params=50%, params=1.2M, macs=50%, macs=40M, "
        "size=10MB, latency=50%, latency=5ms, threshold=1e-3, max_drop=1%"
    )


def _decimal(value: Fraction) -> str:
    """Exact decimal notation: everything that ``parse`` reads has one."""
    places = next(n for n in range(400) if 10**n % value.denominator == 0)
    whole, part = divmod(int(value * 10**places), 10**places)
    return f"{whole}.{part:0{places}d}" if places else str(whole)
