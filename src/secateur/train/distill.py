"""Distillation inside one's own loop: the network as it was before pruning teaches the one that is pruned."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from secateur.errors import DataError, SpecError
from secateur.recover.distill import distillation_loss
from secateur.tasks import call, clone, mode, plain
from secateur.train.shards import is_shared


class Distill:
    """A loss that asks the student for its teacher's outputs, too.

        with Distill(model, features={"encoder.3": 1.0}) as distill:
            for inputs, targets in batches:
                output = model(inputs)
                loss = distill(output, cross_entropy(output, targets), inputs)

    loss = alpha · T² · KL(teacher ‖ student, softened by T) + (1 - alpha) · task loss
           + sum over features of weight · ‖student - teacher‖² / ‖teacher‖²

    (Hinton et al. 2015; the features' part, of which every layer has as much say whatever its scale, is the SquareHead
    loss of Kurtic et al. 2023.)

    student: the model that is trained; ``torch.compile`` and DDP may be around it.
    teacher: a model with outputs of the student's shape; it is used in evaluation mode and without gradients, and its
        mode is given back. None takes a frozen copy of the student as it is now, which shares the parameters that are
        not trained: make it before weights are pruned or a checkpoint is loaded.
    temperature: T, above 0. alpha: from 0 (the task's loss alone) to 1.
    features: weights by the names of modules that both have, and whose outputs are of one shape; of a module that
        returns several tensors the first is compared, of one that is called several times the last call.

    With features, the student's modules carry forward hooks until ``close()``, or the end of ``with``.
    Raises SpecError for numbers out of range, modules that are not there, a student that cannot be copied or hooked.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        features: Mapping[str, float] | None = None,
    ) -> None:
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise SpecError(f"temperature {temperature} and alpha {alpha}; expected more than 0, and from 0 to 1")
        features = dict(features or {})
        if bad := [name for name, weight in features.items() if not 0 < weight < float("inf")]:
            raise SpecError(f"the feature {bad[0]!r} has weight {features[bad[0]]}; expected a number above 0")
        if teacher is not None and plain(teacher) is plain(student):
            raise SpecError("teacher is the student itself; leave it out to have a copy made")
        if features and isinstance(student, nn.DataParallel):
            raise SpecError("DataParallel copies modules in every step, so their outputs are out of reach; use DDP")
        self.temperature, self.alpha, self.features = temperature, alpha, features
        inner = plain(student)
        _modules(inner, features, "student")  # before the work of copying
        self.teacher = _frozen(inner) if teacher is None else teacher
        self._told = _modules(plain(self.teacher), features, "teacher")
        self._taps = {name: _Tap() for name in features}
        self._handles = _listen(_modules(inner, features, "student"), self._taps)

    def __call__(self, output: Any, loss: Tensor, inputs: Any) -> Tensor:
        """The loss to call ``backward()`` on, of shape ().

        output: what the student just gave, logits or what carries them as ``.logits``. loss: the task's. inputs: the
        batch that the student was given: a dict goes to the teacher as keyword, a tuple or list as positional
        arguments. Call it where the student was called, under the same autocast.

        A term of weight 0 is not computed. Raises DataError for outputs of different shapes, and for a feature's module
        that did not run since the last call.
        """
        taps = {name: _Tap(without_gradients=True) for name in self.features}
        with ExitStack() as stack:
            for handle in _listen(self._told, taps):
                stack.callback(handle.remove)
            stack.enter_context(mode(self.teacher, training=False))
            stack.enter_context(torch.no_grad())
            told = call(self.teacher, inputs) if self.alpha > 0 or taps else None
        terms = [distillation_loss(output, told, self.temperature) * self.alpha] if self.alpha > 0 else []
        if self.alpha < 1:
            terms.append(loss * (1 - self.alpha))
        for name, weight in self.features.items():
            terms.append(
                weight * _apart(self._taps[name].take(name, "student"), taps[name].take(name, "teacher"), name)
            )
        return functools.reduce(torch.add, terms)

    def close(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Tap:
    """A forward hook that keeps the module's last output of a training step. Copies of the module get a dead one."""

    def __init__(self, alive: bool = True, without_gradients: bool = False) -> None:
        self.alive, self.without_gradients = alive, without_gradients
        self.seen: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.alive and (self.without_gradients or torch.is_grad_enabled()):
            self.seen = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return _Tap(alive=False)

    def take(self, name: str, who: str) -> Tensor:
        seen, self.seen = self.seen, None
        if seen is None:
            raise DataError(
                f"the {who}'s module {name!r} gave no tensor since the last call: it did not run, or without "
                "gradients, or the model was compiled and called before Distill was made; make Distill first"
            )
        return seen


def _listen(modules: Mapping[str, nn.Module], taps: Mapping[str, _Tap]) -> list[RemovableHandle]:
    return [modules[name].register_forward_hook(tap) for name, tap in taps.items()]


def _modules(model: nn.Module, names: Mapping[str, float], who: str) -> dict[str, nn.Module]:
    found = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in names if name not in found]:
        raise SpecError(f"features names {missing[0]!r}, which is no module of the {who}, a {type(model).__name__}")
    return {name: found[name] for name in names}


def _frozen(student: nn.Module) -> nn.Module:
    parameters = dict(student.named_parameters())
    if split := [name for name, parameter in parameters.items() if is_shared(parameter)]:
        raise SpecError(
            f"processes share {split[0]!r}, so no copy can be made; give teacher=, copied before fully_shard"
        )
    copy = clone(student, shared=[p for p in parameters.values() if not p.requires_grad])
    return copy.requires_grad_(False).eval()


def _apart(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    if student.shape != teacher.shape:
        raise DataError(
            f"the outputs of {name!r} are of shape {tuple(student.shape)} from the student and {tuple(teacher.shape)} "
            "from the teacher; expected one shape"
        )
    learned, told = student.float(), teacher.float()
    # A layer that gives nothing but zeros has no scale.
    return F.mse_loss(learned, told) / told.square().mean().clamp_min(torch.finfo(torch.float32).eps)
