"""What lowering a model to a target came to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur.measure import Latency
from secateur.runtime.tune import Choice


@dataclass(frozen=True)
class Lowering:
    """A choice for every layer, and the time of one call of both models, taken in turns where anything was chosen.

    form: "program" where the model was captured and what follows layers was fused into them; "module" where layers of
    the user's class were replaced; "dense" where nothing was faster. gap: the largest difference of outputs, relative
    to the largest output.
    """

    form: str
    choices: tuple[Choice, ...]
    dense: Latency | None = None
    lowered: Latency | None = None
    gap: float = 0.0
    note: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than dense: the median over paired rounds."""
        return 1.0 if self.dense is None or self.lowered is None else 1 / self.lowered.ratio(self.dense).value

    def told(self) -> tuple[str, ...]:
        """A line on the whole model, and one on each layer."""
        whole = f"lowered, it is {self.gain:.2f}x as fast; outputs differ by {self.gap:.0e} (relative)"
        return (self.note or whole, *(f"{c.layer}: {c.form}, {c.why}" for c in self.choices))


def lowering_of(model: nn.Module) -> Lowering:
    """What ``lower`` says of a model that it returned."""
    found = model.lowering
    assert isinstance(found, Lowering)
    return found
