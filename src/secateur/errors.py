"""Every error Secateur raises on purpose.

    PruneError                 the base: catch this one to catch them all
    ├── SpecError              a wish that cannot be read: unknown pattern, criterion, budget, name
    ├── BudgetError            a wish that can be read but not met; says the nearest possible value
    ├── DataError              data, files or scores that cannot be used (missing, damaged, NaN)
    ├── PlanError              a plan that does not fit the model, or cannot be carried out
    ├── TraceError             a model that cannot be captured or fails on its own inputs
    ├── LawError               a result that does not equal the original with the same units zeroed
    ├── TargetError            a runtime that cannot take the model, or disagrees with it
    └── MissingExtra           an optional package is needed (also an ImportError)

A message says where, what was found, what was expected, and what to do.
"""

from __future__ import annotations


class PruneError(Exception):
    """Base of every error raised on purpose."""


class SpecError(PruneError, ValueError):
    """A wish that cannot be read."""


class BudgetError(PruneError, ValueError):
    """A budget that cannot be met; the message names the nearest possible value.

    ``nearest`` is that value as a part of the dense model, where it is known.
    """

    def __init__(self, message: str, nearest: float | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class DataError(PruneError, ValueError):
    """Data, files or scores that cannot be used."""


class PlanError(PruneError, ValueError):
    """A plan that does not fit the model, or cannot be carried out."""


class TraceError(PruneError, RuntimeError):
    """A model that cannot be captured, or fails on its own inputs."""


class LawError(PruneError, RuntimeError):
    """A shrunk model that does not equal the original with the same units zeroed."""


class TargetError(PruneError, RuntimeError):
    """A runtime that cannot take the model, or disagrees with eager PyTorch."""


class MissingExtra(PruneError, ImportError):
    """An optional package is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; run: pip install 'secateur[{extra}]'"
        )
