"""Schedules: iterators of budgets, each with the step after which it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from secateur.budget import Budget
from secateur.budget import parse as parse_budget
from secateur.errors import SpecError


@dataclass(frozen=True)
class Stage:
    """After ``step`` optimizer steps masks are made anew, for ``budget``; None makes everything dense again."""

    step: int
    budget: Budget | None


def part(budget: str | Budget) -> Budget:
    """A budget that steps can lead to. Raises SpecError where it is no part of the dense model that masks can meet."""
    wish = parse_budget(budget) if isinstance(budget, str) else budget
    if not wish.relative or wish.kind not in ("sparsity", "params", "macs", "size"):
        raise SpecError(f"budget {str(wish)!r} has no way to it in steps; expected a part, such as sparsity=90%")
    return wish


def between(begin: int, end: int, every: int, steps: int) -> range:
    """The steps of updates, the last one at ``end``. Raises SpecError for a schedule that ends before it begins."""
    if not 0 <= begin <= end <= steps:
        raise SpecError(f"the schedule runs from step {begin} to {end} of {steps}; expected 0 <= begin <= end <= steps")
    if every < 1:
        raise SpecError(f"masks are updated every {every} steps; expected 1 or more")
    return range(end - (end - begin) // every * every, end + 1, every)


def cubic(budget: Budget, begin: int, end: int, every: int, steps: int) -> Iterator[Stage]:
    """s_t = s (1 - (1 - (t - begin) / (end - begin))^3): much at first, little at the end (Zhu and Gupta 2017)."""
    for step in between(begin, end, every, steps):
        done = Fraction(step - begin + every, end - begin + every)
        yield Stage(step, partly(budget, 1 - (1 - done) ** 3))


def partly(budget: Budget, done: Fraction) -> Budget:
    """The budget that removes ``done`` (0 to 1) of what ``budget`` removes."""
    if done >= 1:
        return budget
    now = Fraction(round(budget.removed * done * 10**6), 10**6)
    return replace(budget, value=now if budget.kind == "sparsity" else 1 - now)


def number(steps: int) -> int:
    """How many steps a training has. Raises SpecError for none."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SpecError(
            f"steps is {steps!r}; expected how many steps the optimizer will take in all, such as steps=10_000"
        )
    return steps


def given(schedule: Iterable[tuple[int, str | None]], steps: int, wish: Budget) -> tuple[Stage, ...]:
    """A schedule of one's own: (step, budget) pairs in ascending order of steps. Raises SpecError for others."""
    found = tuple(Stage(int(step), None if text is None else part(text)) for step, text in schedule)
    at = [stage.step for stage in found]
    if not found or at != sorted(set(at)) or not 0 <= at[0] <= at[-1] <= steps or found[-1].budget != wish:
        raise SpecError(
            f"the schedule has updates at steps {at}; expected at least one, in ascending order, from 0 to {steps}, "
            f"the last one with {wish}"
        )
    return found
