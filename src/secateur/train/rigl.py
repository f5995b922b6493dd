"""RigL: what has gone comes back where the loss asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.train.regrow import DropAndGrow
from secateur.train.shards import total
from secateur.train.stages import Stage

DENSE = "dense_gradient"


class RigL(DropAndGrow):
    """Sparse training that moves weights to where gradients are largest (Evci et al. 2020).

    After step t, in each weight tensor, with f = a / 2 (1 + cos(pi t / end)):

        drop  the f k smallest |w| of the k that are left
        grow  as many, those of the largest |dL/dw| among all others

    As in the authors' code the others include what was dropped just now; what is dropped and grown at once keeps its
    value. There, an update of the masks takes the place of a step; here that step is an ordinary one, whose gradient
    (with accumulation, the sum) is the one that grows, and the weights after it are those that are dropped.

    Evci et al. gain most with more steps than dense training takes, such as 5 times as many. Blocks are dropped and
    grown whole, by the mean of their elements; with N:M a group gets back as many as it loses. A weight tensor whose
    gradient is zero wherever it has been pruned keeps its mask.

    start, fraction, every, end: see ``DropAndGrow``; for everything else, ``Pruner``. ``criterion`` says what drops.
    Raises SpecError where ``every`` leaves no exchange before ``end``.
    """

    def before(self, name: str, weight: Tensor, grad: Tensor | None) -> None:
        self._keep(name, grad)
        super().before(name, weight, grad)

    def mask_gradients(self) -> None:
        for name, _, grad in self.live():
            self._keep(name, grad)
        super().mask_gradients()

    def change(self, stage: Stage) -> None:
        try:
            super().change(stage)
        finally:
            for kept in self.state.values():
                kept.pop(DENSE, None)

    def growth(self, name: str, stage: Stage) -> Tensor | None:
        here = self.state[name].get(DENSE)
        mask = self._kept(name)
        if here is None:
            here = mask.new_zeros(mask.shape, dtype=self.value(name).dtype)
        counts = torch.stack([(~here.isfinite()).sum(), ((here != 0) & ~mask).sum()])
        wrong, useful = total(counts, self.parts[name].group).tolist()
        if wrong:
            raise DataError(f"gradients of {name!r} are not finite; look at the loss and the learning rate")
        return here if useful else None

    def _keep(self, name: str, grad: Tensor | None) -> None:
        """Before the step that masks change after: gradients, before anyone masks them."""
        if grad is None or self.done == len(self.schedule) or self.schedule[self.done].step > self.applied + 1:
            return
        state, mask = self.state[name], self.mask(name)
        if DENSE not in state or mask is None or bool(grad.masked_fill(mask, 0).any()):
            state[DENSE] = grad.detach().abs()
