"""Methods that hold zeros from before the first step on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import SpecError
from secateur.train import averages
from secateur.train.bits import pack, unpack
from secateur.train.choose import Masks
from secateur.train.pruner import Pruner
from secateur.train.shards import local


class SparseStart(Pruner):
    """Its schedule's first stage is met when it is made.

    A state may still be loaded into it, whether the model got the state's weights before or after. So weights are kept
    as they were given until the first step, and so long moments and averages are left alone.
    """

    _given: Mapping[str, tuple[Tensor, Tensor]] = {}
    """What was here of each weight, and the bits of its first mask."""

    def start_with(self, masks: Mapping[str, Tensor]) -> None:
        """Let these be the masks before the first step, and the first stage be done."""
        given = {name: local(self.tensor(name)).detach().clone() for name in masks}
        self.bits = {name: pack(mask) for name, mask in masks.items()}
        self._given = {name: (given[name], self.bits[name]) for name in masks}
        with torch.no_grad():
            for name, weight, _ in self.live():
                self.after(name, weight)
        self.done = 1

    def scored(self) -> dict[str, Tensor]:
        """Scores of what is here of all weights. Raises DataError, in every process, where they are not finite."""
        assert isinstance(self.wish, Masks)
        values = {name: self.value(name) for name in self.weights}
        return self.wish.scorer.scores(values, self._means(), list(values))

    def require_scores_now(self) -> None:
        """Raise SpecError for a criterion that asks for gradients, which there are none of before the first step."""
        if isinstance(self.wish, Masks) and (asked := self.wish.scorer.gathered):
            raise SpecError(
                f"criterion {self.wish.scorer.criterion!r} asks for {min(asked)!r}, and before the first step there "
                "are no gradients; use magnitude, or start later"
            )

    def restored(self) -> None:
        for name, (given, bits) in self._given.items():
            weight = local(self.tensor(name)).detach()
            if torch.equal(weight, given.masked_fill(~unpack(bits, weight.shape), 0)):
                weight.copy_(given)  # the state's weights were here first
        self._given = {}
        for name, weight, _ in self.live():
            self.after(name, weight)

    def _prepare(self) -> None:
        if self._given:
            self._given = {}
            for name in self.bits:
                mask = self.mask(name)
                assert mask is not None
                averages.clear_moments(self.optimizer, self.tensor(name), ~mask)
            self._mask_average()
        super()._prepare()
