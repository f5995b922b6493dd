"""The choices of a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.errors import DataError, SpecError
from secateur.recipe import choose
from secateur.recover.schedules import SCHEDULES, Schedule

Factory = Callable[..., torch.optim.Optimizer]

SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
AMP: dict[bool | str, torch.dtype | None] = {
    False: None,
    True: torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Recovery:
    """The options of ``recover``; they are its keyword arguments.

    lr: the highest learning rate. The default is high on purpose: the usual 0.001 costs a pruned network accuracy
        (Le and Hua 2021).
    schedule: "cosine" (a rise over 5 % of the steps, then down to zero), "rewind" (``schedules.rewind`` with its
        defaults), ``module:function``, or a function from the part of the steps done to a factor on ``lr``. Every
        call of ``recover`` starts it anew.
    optimizer: "sgd" (Nesterov momentum 0.9, no weight decay), ``module:function`` such as ``torch.optim:AdamW``, or
        a function called as ``optimizer(parameters, lr=lr)``. Groups that it gives rates of their own keep their
        proportion.
    accumulate: batches whose gradients make one step, weighted by their examples: for a loss that is a mean over
        examples this is the step of one big batch, apart from batch norms.
    clip: the largest norm of the gradient; that of masked weights does not count.
    ema: decay of a running average of the weights, which is then what is validated and returned. Early steps
        average over less, min(ema, (1 + step) / (10 + step)).
    temperature, alpha: of distillation, see ``recover``.
    patience: stop after that many epochs in a row without a better validation score.
    amp: "bf16" (or True) or "fp16": compute in that format where autocast finds it safe. In fp16 the loss is scaled,
        and a step whose gradients overflow is skipped: neither schedule nor average advance.
    seed: of data order, augmentation and dropout.
    checkpoint: a folder; the run is written there at the end of every epoch, and within one after a step once
        ``every`` seconds have passed.

    Raises SpecError for a value out of range, DataError for a checkpoint folder that is a file.
    """

    epochs: int = 2
    lr: float = 0.01
    schedule: str | Schedule = "cosine"
    optimizer: str | Factory = "sgd"
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    patience: int | None = None
    amp: bool | str = False
    seed: int = 0
    checkpoint: Path | str | None = None
    every: float = 300.0

    def __post_init__(self) -> None:
        for name, (fits, expected) in _EXPECTED.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not fits(value):
                raise SpecError(f"{name} is {value!r}, expected {expected}")
        if self.checkpoint is not None and Path(self.checkpoint).is_file():
            raise DataError(f"checkpoint {self.checkpoint} is a file, expected a folder or a free name")
        # Looked up now, so that a wrong name does not end an hour of pruning.
        self.rate(0.5)
        self.factory()

    def rate(self, done: float) -> float:
        """The schedule's factor once that part of the steps is done. Raises SpecError for one below 0 or not finite."""
        factor = choose(self.schedule, SCHEDULES, "schedule")(min(1.0, done))
        if not _number(factor) or factor < 0:
            raise SpecError(f"the schedule gave {factor!r} at {done:.0%} of the steps, expected a number from 0 up")
        return float(factor)

    def factory(self) -> Factory:
        found: Factory = choose(self.optimizer, {"sgd": SGD}, "optimizer")
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None without it."""
        return AMP[self.amp]

    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON. The optimizer is described once it is made."""
        skipped = {"schedule", "optimizer", "checkpoint", "every"}
        values = {name: value for name, value in vars(self).items() if name not in skipped}
        return {**values, "amp": str(self.dtype), "schedule": [self.rate(i / 20) for i in range(21)]}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: _whole(v, 0), "a whole number, 0 or more"),
    "lr": (lambda v: _number(v) and v > 0, "a number above 0"),
    "accumulate": (lambda v: _whole(v, 1), "a whole number of batches, 1 or more"),
    "clip": (lambda v: _number(v) and v > 0, "a number above 0, or None"),
    "ema": (lambda v: _number(v) and 0 < v < 1, "a decay between 0 and 1, such as 0.999, or None"),
    "temperature": (lambda v: _number(v) and v > 0, "a number above 0"),
    "alpha": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "patience": (lambda v: _whole(v, 1), "a whole number of epochs, 1 or more, or None"),
    "amp": (lambda v: isinstance(v, (bool, str)) and v in AMP, "False, True, 'bf16' or 'fp16'"),
    "seed": (lambda v: _whole(v, 0), "a whole number, 0 or more"),
    "every": (lambda v: _number(v) and v >= 0, "seconds, 0 or more"),
}
_OPTIONAL = ("clip", "ema", "patience")
