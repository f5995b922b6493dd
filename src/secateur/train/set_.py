"""SET: what has gone comes back anywhere."""

from __future__ import annotations

from torch import Tensor

from secateur.train.regrow import DropAndGrow
from secateur.train.stages import Stage


class SET(DropAndGrow):
    """Sparse training that moves weights to random places (Mocanu et al. 2018).

    After step t, in each weight tensor, the f k smallest |w| of the k that are left are dropped, and as many are grown
    anywhere among the others, as zeros. f falls along half a cosine, as Evci et al. (2020) do; Mocanu et al. leave it
    at 30 %, and grow random values.

    Places are drawn from ``seed``, the step and the weight's name alone: the same in all processes, however many.

    start, fraction, every, end: see ``DropAndGrow``; for everything else, ``Pruner``. ``criterion`` says what drops.
    Raises SpecError where ``every`` leaves no exchange before ``end``.
    """

    def growth(self, name: str, stage: Stage) -> Tensor | None:
        return self.random(name, str(stage.step))
