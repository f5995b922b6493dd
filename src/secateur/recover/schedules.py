"""How the learning rate runs over a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable

from secateur.errors import SpecError

Schedule = Callable[[float], float]
"""Part of all steps, 0 to 1 -> factor on the learning rate; asked at the middle of every step."""

WARMUP = 0.05
"""Part of the steps over which the cosine's rate rises: momentum starts from nothing."""


def cosine(done: float) -> float:
    """A linear rise over the first 5 % of the steps, then half a cosine down to zero."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def steps(done: float) -> float:
    """The full rate for half of the steps, a tenth for a quarter, a hundredth for the rest (He et al. 2016)."""
    return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01


def rewind(original: Schedule = steps, start: float = 0.25) -> Schedule:
    """Learning-rate rewinding: ``original`` again from ``start``, on the pruned weights (Renda et al. 2020).

    original: the schedule that the network was trained with. Give ``recover`` its highest rate as ``lr``, and as many
        epochs as the replayed part had: ``(1 - start)`` of the whole training.
    Raises SpecError for a start outside 0 to 1.
    """
    if not 0 <= start < 1:
        raise SpecError(f"rewind starts at {start}; expected a part of the original training, from 0 to below 1")
    return lambda done: original(start + (1 - start) * done)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "rewind": rewind()}
