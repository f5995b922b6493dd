"""``secateur train``: from a recipe to a pruned model that is measured, reported and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from secateur import patterns
from secateur.apply.shrink import Shrunk, carry_out
from secateur.errors import SpecError
from secateur.files import require_folder
from secateur.graph import Graph, analyze
from secateur.names import chosen
from secateur.opening import opened
from secateur.recover.randomness import seed_all, untouched
from secateur.report import Report
from secateur.report.log import Log
from secateur.store import Result, save
from secateur.tasks import Task
from secateur.train.logs import logging, require
from secateur.train.pruner import Pruner
from secateur.train.recipe import Recipe
from secateur.train.run import Trained, train


def run(recipe: Recipe) -> Report:
    """Train as the recipe says, and write the model with its report into its folder; returns the report.

    Where an earlier call was stopped, at whatever moment, this one goes on. The random states are as before afterwards.
    Raises PruneError's children, those of the recipe's own values naming their place in it.
    """
    require_folder(recipe.out)
    require(recipe.log)
    with untouched(torch.device("cpu")):
        seed_all(recipe.how.seed)  # of a model that is made anew each time
        with recipe.naming("[model] and [data]"):
            dense, example, found = opened(recipe.model, recipe.dense, recipe.input, recipe.data)
    assert found is not None
    task = found if recipe.batch is None else _batched(found, recipe)
    graph = analyze(dense, example)
    with recipe.naming("[method]"):
        _require_exact(dense, graph, recipe.method.arguments)
    kind: Any = recipe.method.kind

    def make(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, average: nn.Module | None) -> Pruner:
        common: dict[str, Any] = {"graph": graph, "task": task, "average": average, "seed": recipe.how.seed}
        with recipe.naming("[method]"):
            made: Pruner = kind(model, optimizer, steps=steps, **recipe.method.arguments, **common)
        return made

    about, folder = recipe.method.about(), recipe.out / "checkpoint"
    settings = {**about, "model": recipe.model, "data": recipe.data, **_told(recipe)}
    with logging(recipe.log, folder, recipe.file.stem, settings) as tell:
        teacher = dense if recipe.teacher else None
        trained = train(dense, task, make, recipe.how, about=about, teacher=teacher, tell=tell)
    result = _finished(recipe, dense, graph, task, trained)
    save(result, recipe.out)
    return result.report


def _batched(task: Task, recipe: Recipe) -> Task:
    """The task with batches of the recipe's size."""
    if not is_dataclass(task) or "batch_size" not in {f.name for f in fields(task)}:
        raise SpecError(
            f"{recipe.file}: [train] batch is {recipe.batch}, and a {type(task).__name__} has no batch_size to set; "
            "choose it where the data is made"
        )
    return cast(Task, replace(task, batch_size=recipe.batch))


def _require_exact(model: nn.Module, graph: Graph, wishes: Mapping[str, Any]) -> None:
    """Raise SpecError for channels that would be trained as zeros where these are not the same as removal."""
    if not isinstance(patterns.parse(wishes.get("pattern", "unstructured")), patterns.Channel):
        return
    ignored = chosen(wishes.get("ignore", ()), [*graph.weights, *(a.name for a in graph.axes)], model, "ignore")
    for axis in graph.free:
        if not (axis.exact or axis.name in ignored or ignored & {member.tensor for member in axis.members}):
            raise SpecError(
                f"channels train as zeros before they go, and a norm or mean runs over axis {axis.name!r}, so that "
                f"zeros are not the same as removal there; add {axis.name!r} to ignore"
            )


def _finished(recipe: Recipe, dense: nn.Module, graph: Graph, task: Task, trained: Trained) -> Result:
    """What was trained, without what it has lost, and what it scores on the test split."""
    model, plan = trained.model, trained.plan
    done = carry_out(model, plan, graph.inputs) if plan.units else Shrunk(model, "module", "", None)
    log = Log(dense, graph, plan, done, task, notes=(_told_epoch(trained),))
    log.stage("trained", done.model)
    report = log.report()
    report = replace(report, meta={**report.meta, **_told(recipe)}, history=trained.history)
    return Result(done.model, plan, report, graph.inputs, done.form, recipe.model, done.attributes, done.taken)


def _told_epoch(trained: Trained) -> str:
    """Which epoch's weights these are, and why."""
    epochs, ended = len(trained.history), trained.ended
    if ended == epochs:
        return f"The weights are those of the last epoch, {epochs}: the budget was reached in it."
    return (
        f"The weights are those of epoch {trained.chosen} of {epochs}: the best validation score from epoch {ended} "
        "on, in which the budget was reached. The test split was looked at once, afterwards."
    )


def _told(recipe: Recipe) -> Mapping[str, str | int]:
    """How it was trained, for the report."""
    how = recipe.how
    optional: dict[str, Any] = {"batch": recipe.batch, "clip": how.clip, "ema": how.ema}
    optional |= {"teacher": f"dense, alpha {how.alpha:g}, temperature {how.temperature:g}" if recipe.teacher else None}
    optional |= {"accumulate": how.accumulate if how.accumulate > 1 else None, "amp": str(how.amp) if how.amp else None}
    given = {name: str(value) for name, value in optional.items() if value is not None}
    return {"epochs": how.epochs, "lr": str(how.lr), **given}
