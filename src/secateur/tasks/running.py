"""Models on the user's data: how they are called, copied, put in a mode, and scored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import DataError
from secateur.progress import track
from secateur.tasks.intervals import Scores
from secateur.tasks.task import Task


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on user inputs: a dict goes in as keyword, a tuple or list as positional arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def clone(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy but for ``shared``. Torch's own warning about copying captured programs (2.13) is kept from the user.

    What modules keep of their last computation (``weight`` under weight_norm's hooks) is copied by value.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    computed = {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return copy.deepcopy(model, {**computed, **{id(tensor): tensor for tensor in shared}})


SEVERAL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers that run a model on several devices."""


def plain(model: nn.Module) -> nn.Module:
    """The model inside what only runs it: ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            inner = model._orig_mod
        elif isinstance(model, SEVERAL):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU where it has neither."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors, however nested, on ``device``."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)


def batches(task: Task, split: str, model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The task's batches on the model's device. Raises DataError where the split has none."""
    device = device_of(model)
    batch = None
    for batch in task.batches(split):
        inputs, targets = to_device(batch, device)
        yield inputs, targets
    if batch is None:
        raise DataError(f"the {split} split has no batches; give it at least one example")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set training or evaluation mode, and give every module its own mode back at the end.

    An exported program refuses, and keeps the mode that it was captured in.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with suppress(NotImplementedError):
            model.train(training)
        yield
    finally:
        for module, was in modes:
            module.training = was


def evaluate(model: nn.Module, task: Task, split: str) -> Scores:
    """The score of every example of ``split``, in evaluation mode and without gradients.

    Returns float64 of shape (examples,). Raises DataError for an empty split, and for scores that
    are not one finite number per example.
    """
    return judge(model, task, split, summarize=False)[0]


def judge(model: nn.Module, task: Task, split: str, *, summarize: bool = True) -> tuple[Scores, dict[str, float]]:
    """``evaluate``, and the numbers of the whole split that ``task.summary`` gives; {} where it has none."""
    parts: list[Scores] = []

    def outputs() -> Iterator[tuple[Any, Any]]:
        for inputs, targets in track(batches(task, split, model), f"Evaluating on {split}"):
            output = call(model, inputs)
            scores = task.scores(output, targets)
            if scores.ndim != 1:
                shape = tuple(scores.shape)
                raise DataError(f"task.scores returned shape {shape}, expected one score per example")
            parts.append(scores.double().cpu().numpy())
            yield output, targets

    found: dict[str, float] = {}
    summary = getattr(task, "summary", None) if summarize else None
    with mode(model, training=False), torch.inference_mode():
        stream = outputs()
        if summary is not None:
            found = {str(name): float(value) for name, value in summary(stream).items()}
        for _ in stream:  # what the summary left, which is everything where there is none
            pass
    if lost := [name for name, value in found.items() if np.isnan(value)]:
        raise DataError(f"task.summary gave NaN for {lost[0]!r} on the {split} split; check it and the model's outputs")
    scores: Scores = np.concatenate(parts)
    if bad := int((~np.isfinite(scores)).sum()):
        raise DataError(
            f"{bad} of {len(scores)} scores on the {split} split are NaN or infinite; "
            "check the model's outputs and task.scores"
        )
    return scores, found
