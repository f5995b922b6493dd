"""The zoo with other tools, for comparison: torch-pruning 1.6.1 and torch-kirigami 0.2.1.

    pip install --no-deps torch-pruning==1.6.1 torch-kirigami==0.2.1

Both are called as their quick starts say, with nothing said about the model but its last layer, and asked for the same
40 % fewer parameters.

torch-pruning: ``BasePruner(model, example_inputs, importance, pruning_ratio, ignored_layers)`` and ``step()``. The
ratio removes channels, so it begins at 0.225 (1 - 0.775**2 = 40 %) and is corrected twice on a fresh model. Ignored are
the convolutions and linear layers that are as wide as the first output, "the final classifier" of its examples.
Detectors are left out for both tools: their last layers cannot be told from the output's width.

torch-kirigami: ``DependencyGraph.build``, ``discover_candidates()``, ``plan(candidates, ParameterBudget(60 %),
Greedy(GroupMagnitude(p=2)))``, ``apply(plan)``. Where it raises that this cannot be met, 75 % and 90 % are tried.

Which elements stay is read from the result itself: every element is replaced by its own number before the tool cuts.
The numbers that are left say what was removed, so the same elements can be zeroed in the original.

law      the pruned model gives the outputs of the original with the removed elements zeroed
forward  it runs and its first output has the old shape; a norm lost channels, so zeroing them is another function
wrong    it runs, and its output has another shape, or differs from the zeroed original
nothing  less than 1 % of the parameters was removed, without an error
crash    building, pruning or the pruned model's forward raises
hang     over 60 seconds of processor time, 10 for the tiny models of Hugging Face
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import common
from secateur.graph.types import example_args
from zoo_entry import Entry
from zoo_models import build

BUDGET = 0.6
WRONG = 1e-3
Row = dict[str, Any]


def peer_row(entry: Entry, prune: Callable[[nn.Module, Any, Tensor], nn.Module]) -> Row:
    """Prune one model with a tool and say what came out."""
    start = time.perf_counter()
    row: Row = {"outcome": "crash", "message": ""}
    try:
        model, inputs = build(entry)
        row["params"] = size = sum(p.numel() for p in model.parameters())
        expected = first(model, inputs)
        numbered = prune(copy.deepcopy(model), inputs, expected)
        kept = {name: p.detach().clone() for name, p in numbered.named_parameters()}
        row["left"] = sum(p.numel() for p in numbered.parameters()) / size
        if row["left"] > 0.99:
            return row | {"outcome": "nothing", "message": f"{row['left']:.1%} of the parameters are left"}
        small, zeroed = unnumber_(numbered, model), zero_(copy.deepcopy(model), kept)
        found = first(small, inputs)
        row |= judge(found, expected, first(zeroed, inputs), norms_cut(model, kept))
    except Exception as error:
        row |= {"message": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "trace": common.trace(3)}
    finally:
        row["seconds"] = {"whole": time.perf_counter() - start}
    return row


def judge(found: Tensor, dense: Tensor, zeroed: Tensor, inexact: bool) -> Row:
    if found.shape != dense.shape:
        return {"outcome": "wrong", "message": f"the output became {tuple(found.shape)}, was {tuple(dense.shape)}"}
    error = float((found - zeroed).abs().max() / zeroed.abs().max().clamp_min(1e-12))
    if error <= WRONG:
        return {"outcome": "law", "error": error}
    if inexact:
        return {"outcome": "forward", "error": error}
    return {"outcome": "wrong", "error": error, "message": f"differs from the zeroed original by {error:.2g}"}


def first(model: nn.Module, inputs: Any) -> Tensor:
    """The first tensor that the model returns."""
    args, kwargs = example_args(inputs)
    with torch.no_grad():
        return leaf(model(*args, **kwargs))


def leaf(output: Any) -> Tensor:
    return next(x for x in tree_leaves(output) if isinstance(x, Tensor))


# --- what a tool removed ---------------------------------------------------------------------------


def number_(model: nn.Module) -> None:
    """Every parameter and statistic becomes the numbers of its own elements, in double precision."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)


def unnumber_(numbered: nn.Module, dense: nn.Module) -> nn.Module:
    """Put the values of ``dense`` in place of the numbers that are left."""
    values = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name, tensor in (*numbered.named_parameters(), *numbered.named_buffers()):
        if tensor.is_floating_point() and name in values:
            tensor.data = values[name].detach().flatten()[tensor.detach().long()]
    return numbered


def zero_(dense: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """Zero the elements of the parameters whose numbers are gone."""
    for name, parameter in dense.named_parameters():
        if name in kept:
            mask = torch.zeros(parameter.numel(), dtype=parameter.dtype)
            mask[kept[name].long().flatten()] = 1
            parameter.data *= mask.reshape(parameter.shape)
    return dense


def norms_cut(dense: nn.Module, kept: dict[str, Tensor]) -> bool:
    """Whether a norm over channels lost some: zeroing them is another function then."""
    for path, module in dense.named_modules():
        kind = type(module).__name__
        if "Norm" in kind and "BatchNorm" not in kind:
            for name, parameter in module.named_parameters(path, recurse=False):
                if name in kept and kept[name].numel() < parameter.numel():
                    return True
    return False


# --- the tools -------------------------------------------------------------------------------------


def last_layers(model: nn.Module, output: Tensor) -> list[nn.Module]:
    """Convolutions and linear layers as wide as the output."""
    width = output.shape[1] if output.dim() > 3 else output.shape[-1]
    widths = {"out_features", "out_channels"}
    return [m for m in model.modules() if any(getattr(m, w, None) == width for w in widths)]


def torch_pruning(model: nn.Module, inputs: Any, output: Tensor) -> nn.Module:
    import torch_pruning as tp

    start, ratio, size = time.perf_counter(), 0.225, sum(p.numel() for p in model.parameters())
    for _ in range(3):
        pruned = copy.deepcopy(model)
        pruner = tp.pruner.BasePruner(
            pruned,
            inputs,
            importance=tp.importance.RandomImportance(),
            pruning_ratio=ratio,
            ignored_layers=last_layers(pruned, output),
            output_transform=leaf,
        )
        number_(pruned)
        pruner.step()
        left = sum(p.numel() for p in pruned.parameters()) / size
        if 0.55 <= left <= 0.62 or left > 0.99 or time.perf_counter() - start > 15:
            break
        ratio = min(0.9, ratio * (1 - BUDGET) / (1 - left))
    return pruned


def torch_kirigami(model: nn.Module, inputs: Any, output: Tensor) -> nn.Module:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, PlanningError, Pruner

    model.double()  # the numbers need it, and a plan is tied to a precision
    args, kwargs = example_args(tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs))
    size = sum(p.numel() for p in model.parameters())
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=args, kwargs=kwargs))
    candidates = pruner.discover_candidates()
    for part in (BUDGET, 0.75, 0.9):
        try:
            plan = pruner.plan(
                candidates, budget=ParameterBudget(int(part * size)), strategy=Greedy(GroupMagnitude(p=2))
            )
        except PlanningError:
            if part == 0.9:
                raise
        else:
            break
    numbered = copy.deepcopy(model)
    number_(numbered)
    return Pruner(numbered, graph=None).apply(plan)[0]


PEERS: dict[str, Callable[[Entry], Row]] = {
    "torch-pruning": lambda entry: peer_row(entry, torch_pruning),
    "torch-kirigami": lambda entry: peer_row(entry, torch_kirigami),
}
