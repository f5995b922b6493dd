"""What Secateur does with one model of the zoo: a row with exactly one outcome, and everything that explains it.

law      the law held with at most 60 % of the parameters left
frozen   not enough is free for that: the law held at the nearest size that can be had, or nothing is free at all
refused  a PruneError, with its message
wrong    the result differs from the oracle
crash    any other exception
hang     (given by the parent process) no answer within the time limit

Where the first pruning touched a norm or mean over channels, its oracle is the sliced program, which the engine itself
makes. So the model is pruned once more, exact axes only, and held to the original with the same units zeroed.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import nn

import common
from secateur.apply.shrink import Shrunk, carry_out, relative_error
from secateur.errors import BudgetError, LawError, PruneError
from secateur.graph import analyze
from secateur.graph.graph import Graph
from secateur.graph.trace import run
from secateur.planning import make
from zoo_entry import Entry
from zoo_models import build

BUDGET = 0.6
Row = dict[str, Any]


def law_row(entry: Entry) -> Row:
    """Prune one model to 60 % of its parameters, at random, and say what came out."""
    start = time.perf_counter()
    row: Row = {"outcome": "crash", "message": ""}
    try:
        model, inputs = build(entry)
        row["params"] = sum(p.numel() for p in model.parameters())
        clock = _Clock()
        with clock:
            graph = analyze(model, inputs)
        row["seconds"] = {"export": clock.exporting, "analysis": clock.total - clock.exporting}
        row |= reach(graph)
        row |= _prune(model, inputs, graph)
    except LawError as error:
        row |= {"outcome": "wrong", "message": _line(error)}
    except PruneError as error:
        row |= {"outcome": "refused", "message": _line(error)}
    except Exception as error:
        row |= {"outcome": "crash", "message": f"{type(error).__name__}: {_line(error)}", "trace": common.trace(7)}
    row.setdefault("seconds", {})["whole"] = time.perf_counter() - start
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return row


def reach(graph: Graph) -> Row:
    """The part of the parameters in reach of free axes, and what keeps the rest: reasons, operators without a rule.

    A parameter counts as reachable where removing units of some free axis would remove it.
    """
    untouched = {
        t.name: [np.ones(size, bool) for size in t.shape]
        for t in graph.program.tensors.values()
        if t.kind == "parameter"
    }
    for axis in graph.free:
        for member in axis.members:
            if member.tensor in untouched:
                untouched[member.tensor][member.dim] &= member.units < 0
    lost = {name: prod(int(flags.sum()) for flags in dims) for name, dims in untouched.items()}
    total = graph.cost().params
    reasons: Counter[str] = Counter()
    for axis in graph.axes:
        if axis.frozen:
            reasons[axis.frozen] += sum(lost.get(name, 0) for name in {m.tensor for m in axis.members})
    operators = Counter(found[1] for a in graph.axes if (found := re.match(r"no rule for (\S+)", a.frozen)))
    return {
        "reachable": 1 - sum(lost.values()) / total if total else 0.0,
        "axes": [len(graph.free), len(graph.axes)],
        "frozen": [[why, count] for why, count in reasons.most_common(6)],
        "without_rule": dict(operators.most_common()),
    }


def _prune(model: nn.Module, inputs: Any, graph: Graph) -> Row:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense, size = run(model, inputs), graph.cost().params
    try:
        reached, done = _at_budget(model, graph, ())
    except BudgetError as error:
        return {"outcome": "frozen", "message": _line(error)}
    row = _found(done, size) | {"outcome": "law" if reached <= BUDGET else "frozen", "budget": reached}
    row["changed"] = relative_error(run(done.model, inputs), dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "dense model changed"
    assert done.law is not None
    exact = [axis.name for axis in graph.free if axis.exact]
    if done.law.oracle != "zeroed original" and exact:
        inexact = tuple(axis.name for axis in graph.free if not axis.exact)
        try:
            _, again = _at_budget(model, graph, inexact)
            row["exact"] = _found(again, size)
        except BudgetError as error:
            row["exact"] = {"message": _line(error)}
    return row


def _at_budget(model: nn.Module, graph: Graph, ignore: tuple[str, ...]) -> tuple[float, Shrunk]:
    """Prune to the budget, or to the nearest one that can be met; and the part of the parameters asked for."""
    wish = BUDGET
    for _ in range(2):
        try:
            plan = make(
                model, graph, budget=f"params={100 * wish:g}%", criterion="random", allocate="uniform", ignore=ignore
            )
        except BudgetError as error:
            if error.nearest is None or error.nearest >= 0.995:
                raise
            wish = ceil(error.nearest * 1000) / 1000
        else:
            return wish, carry_out(model, plan)
    raise BudgetError(f"params={100 * wish:g}% was named as the nearest possible and cannot be met either")


def _found(done: Shrunk, size: int) -> Row:
    assert done.law is not None
    left = sum(p.numel() for p in done.model.parameters())
    return {"form": done.form, "why": done.why, "oracle": done.law.oracle, "error": done.law.error, "left": left / size}


class _Clock:
    """Seconds of a block, and of ``torch.export.export`` within it."""

    def __enter__(self) -> None:
        self.exporting, self.original = 0.0, torch.export.export
        torch.export.export = self._export
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total = time.perf_counter() - self.start
        torch.export.export = self.original

    def _export(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.original(*args, **kwargs)
        finally:
            self.exporting += time.perf_counter() - start


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
