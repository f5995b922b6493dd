"""Other people's pruning while training, in the form of ``secateur.train``'s methods: for comparison only.

pip install --no-deps torchao==0.18.0 torch-pruning==1.6.1
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import analyze

Optimizer = torch.optim.Optimizer


class Pat:
    """torchao's ``prototype.pat``: its optimizer round the user's, a global sparsity that rises along a cubic curve.

    Warm-up (none from trained weights) and the step from which masks are fixed are ``Gradual``'s first and last.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, sparsity: float, begin: int, end: int) -> None:
        from torchao.prototype.pat.optim import PruneOptimizer

        ours = {"group_type": "ElemGrouper", "prox_type": "GlobalMinSparsityConstraint", "min_sparsity": sparsity}
        wide = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": wide, **ours, "min_sparsity_schedule": True}, {"params": rest}]
        base = type(optimizer)([g for g in groups if g["params"]], **optimizer.defaults)
        self.optimizer = PruneOptimizer(base, warmup_steps=begin, healing_start_step=end)

    def step(self) -> None:
        """All is done in the optimizer."""

    def finish(self) -> None:
        """Zeros are in the weights."""


class TorchPruning:
    """torch-pruning: its regularizer in every step, and at half of the training the smallest groups go.

    ``pruning_ratio`` is found by bisection, so that the multiply-adds left are at most ``macs`` of an image.
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        optimizer: Optimizer,
        inputs: Tensor,
        macs: float,
        at: int,
        ignored: list[nn.Module],
    ) -> None:
        self.model, self.optimizer, self.inputs, self.macs, self.at = model, optimizer, inputs, macs, at
        self.make: Callable[..., Any] = lambda model, ratio, ignored: _pruner(kind)(
            model, inputs, importance=_importance(), global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored
        )
        self.ignored = [name for name, module in model.named_modules() if module in ignored]
        self.pruner, self.steps = self._of(model, 0.5), 0
        self.handle = optimizer.register_step_pre_hook(lambda *_: self.pruner.regularize(model))

    def step(self) -> None:
        self.steps += 1
        if self.steps < self.at and hasattr(self.pruner, "update_reg") and self.steps % 10 == 0:
            self.pruner.update_reg()
        if self.steps == self.at:
            self.handle.remove()
            self._of(self.model, self._ratio()).step()
            self.optimizer.state.clear()
            self.optimizer.param_groups[0]["params"] = list(self.model.parameters())

    def finish(self) -> None:
        assert analyze(self.model, self.inputs[:1]).cost().macs <= self.macs

    def _of(self, model: nn.Module, ratio: float) -> Any:
        return self.make(model, ratio, [model.get_submodule(name) for name in self.ignored])

    def _ratio(self) -> float:
        low, high = 0.0, 1.0
        while high - low > 1e-3:
            part = (low + high) / 2
            model = copy.deepcopy(self.model)
            self._of(model, part).step()
            if analyze(model, self.inputs[:1]).cost().macs <= self.macs:
                high = part
            else:
                low = part
        return high


def _pruner(kind: str) -> Any:
    import torch_pruning as tp

    return getattr(tp.pruner, kind)


def _importance() -> Any:
    import torch_pruning as tp

    return tp.importance.GroupMagnitudeImportance()
