"""Model, example inputs and task that a command's words name together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur import datasets, recipe, store
from secateur.errors import SpecError
from secateur.tasks import Task


def opened(model: str, dense: str | None, input: str | None, data: str | None) -> tuple[nn.Module, Any, Task | None]:
    """The model, example inputs of one example, and the task where there is ``data``.

    dense: the model of the class, where ``model`` is a saved directory whose class only the user has. input: a shape;
    else the example is the first of the data, or the one that the directory keeps.
    Raises SpecError, DataError or PlanError for words that cannot be read or do not go together.
    """
    saved = Path(model).is_dir()
    net = store.load(model, recipe.load_model(dense) if dense else None) if saved else recipe.load_model(model)
    shape = recipe.example_input(input) if input else None
    named = dense or (store.saved_source(model) if saved else model)
    task = datasets.load(data, shape.shape[-1] if shape is not None else None, named) if data else None
    if shape is not None:
        return net, shape, task
    if task is not None:
        first, _ = next(iter(task.batches("calibration")))
        return net, tree_map(lambda v: v[:1].clone() if isinstance(v, Tensor) else v, first), task
    if saved:
        return net, store.saved_inputs(model), task
    raise SpecError("no example input; give its shape as --input 1x3x32x32, or --data")
