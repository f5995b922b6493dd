"""Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secateur.errors import MissingExtra, SpecError
from secateur.plan import Plan
from secateur.train.integrations.work import Make, Work
from secateur.train.pruner import Pruner

if TYPE_CHECKING:
    Callback = object
else:
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingExtra("lightning", "lightning", "the callback for its Trainer") from error


class PruningCallback(Callback):
    """Prunes what a ``Trainer`` fits.

        pruning = PruningCallback(partial(Gradual, budget="sparsity=90%"))
        trainer = Trainer(max_epochs=10, callbacks=[pruning])
        trainer.fit(module, batches)
        pruning.plan

    make: called as ``make(module, optimizer, steps=…)`` when training starts; gives the method. ``module`` is the
        LightningModule; a method may be made for a part of it.

    The method's state is part of Lightning's checkpoints. ``pruner`` is the method, ``plan`` what stayed, None until
    the end.

    ``fit`` raises SpecError for a Trainer without a number of steps, for several optimizers, and for a second method on
    the same one; DataError where a checkpoint that it goes on from has no state of a method; PlanError where the
    training ends before the schedule does.
    """

    def __init__(self, make: Make) -> None:
        self._work = Work(make)
        self._state: Mapping[str, Any] | None = None

    @property
    def pruner(self) -> Pruner | None:
        return self._work.pruner

    @property
    def plan(self) -> Plan | None:
        return self._work.plan

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._state = state_dict  # there is no optimizer yet

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise SpecError(
                f"this training has {len(trainer.optimizers)} optimizers, expected one; make a method for each "
                "yourself, and call its step() in training_step"
            )
        state, self._state = self._state, None
        steps = trainer.estimated_stepping_batches
        self._work.start(pl_module, trainer.optimizers[0], steps, trainer.global_step, state)

    def on_train_batch_end(self, *_: Any) -> None:
        self._work.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._work.finish()
