"""Hugging Face's ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import MissingExtra, SpecError
from secateur.plan import Plan
from secateur.train.integrations.work import Make, Work
from secateur.train.optimizers import innermost
from secateur.train.pruner import Pruner
from secateur.train.shards import is_shared

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "the callback for its Trainer") from error

KEY = "secateur"


class PruningCallback(TrainerCallback):
    """Prunes what a ``Trainer`` trains.

        pruning = PruningCallback(partial(Gradual, budget="sparsity=90%"))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[pruning])
        trainer.train()
        pruning.plan

    make: called as ``make(model, optimizer, steps=…)`` once the Trainer has made its optimizer; gives the method.

    The method's state is part of the optimizer's in the Trainer's checkpoints, so that ``resume_from_checkpoint``, of
    whatever folder, goes on as if nothing had been. ``pruner`` is the method, ``plan`` what stayed, None until the end.
    The Trainer clips gradients (``max_grad_norm``) by the norm of all of them, those of removed weights included.

    ``train()`` raises SpecError for a Trainer that takes no steps, for a second method on its optimizer, for
    ``load_best_model_at_end``, which would bring back other zeros, and for checkpoints of FSDP, which cannot hold the
    state; DataError where a checkpoint has none; PlanError where the training ends before the schedule does.
    """

    def __init__(self, make: Make) -> None:
        self._work = Work(make)
        self._handle: RemovableHandle | None = None

    @property
    def pruner(self) -> Pruner | None:
        return self._work.pruner

    @property
    def plan(self) -> Plan | None:
        return self._work.plan

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        assert optimizer is not None
        if args.load_best_model_at_end:
            raise SpecError(
                "load_best_model_at_end would bring back weights of an earlier step, with other zeros; set it to False"
            )
        saving = args.save_strategy != "no" or state.global_step
        if saving and any(is_shared(parameter) for parameter in model.parameters()):
            raise SpecError(
                "the Trainer's checkpoints under FSDP cannot hold the method's state; set save_strategy='no'"
            )
        self._let_go()
        inner = innermost(optimizer)
        pruner = self._work.start(model, optimizer, state.max_steps, state.global_step, inner.state.pop(KEY, None))  # type: ignore[call-overload]
        self._handle = inner.register_state_dict_post_hook(
            lambda _, saved: saved["state"].update({KEY: pruner.state_dict()})
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._work.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._work.finish()
        self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
