"""``shrink_`` in the middle of a training: the model, its optimizer and its running average become small together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.attributes import put_, read
from secateur.apply.shrink import Shrunk, become_, carry_out
from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.tasks import SEVERAL, plain
from secateur.train import averages
from secateur.train.optimizers import innermost
from secateur.train.pruner import Pruner

Keep = Mapping[int, Tensor]
"""Dimension -> bool per index, True stays."""


def shrink_(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
    inputs: Any = None,
) -> nn.Module:
    """Remove for good the channels that ``plan`` removes, and go on training with the same optimizer.

    plan = pruner.finish()
    shrink_(model, plan, optimizer, average)

    The model's parameters are replaced by smaller ones. They take the old ones' places in the optimizer's groups, which
    stay the same objects, so that schedulers of the learning rate go on; what the optimizer remembers of each weight
    (momentum, Adam's moments) is cut as the weight is, and so is its gradient. The next step is the one that the large
    model would have taken with its zeros kept (but for norms over what goes: those are over what stays from now on, so
    that outputs change, as with ``secateur.shrink``). ``average``, a copy or torch's ``AveragedModel``, shrinks too.

    inputs: example inputs; by default those of the plan's graph. Model and average are each held to the law on them, as
    by ``secateur.shrink``.
    Raises PlanError for a plan that does not fit, LawError where the check fails. Whatever is raised, the model, the
    optimizer and the average are as they were.
    """
    optimizer, small = innermost(optimizer), plain(model)
    _require_alone(model, plan, optimizer)
    if inputs is None and plan.graph is not None:
        inputs = plan.graph.inputs  # the graph itself holds values from when it was made
    models = [small]
    if average is not None:
        averages.require_same(average, small)
        models.append(averages.inner(average))
    done = [_carried_out(each, plan, inputs) for each in models]
    old, cuts = dict(small.named_parameters()), _cuts(small, plan)
    state = _cut_state(optimizer, old, cuts)
    grads = {name: _cut(p.grad, cuts.get(name, {})) for name, p in old.items() if p.grad is not None}
    undo = [_undo(each, one.attributes) for each, one in zip(models, done, strict=True)]
    try:
        for each, one in zip(models, done, strict=True):
            become_(each, plan, one, one.model)
    except BaseException:
        for take_back in undo:
            take_back()
        raise
    new = dict(small.named_parameters())
    for name, grad in grads.items():
        new[name].grad = grad
    _replace(optimizer, {id(p): new[name] for name, p in old.items()}, {new[name]: s for name, s in state.items()})
    return model


def _require_alone(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    """Raise PlanError where someone else holds on to the old parameters, or some would go altogether."""
    inner = plain(model)
    if any(isinstance(module, SEVERAL) for module in model.modules()):
        raise PlanError(
            "DistributedDataParallel and DataParallel hold on to the old parameters: take the model out (.module), "
            "call shrink_ on it in every process, and wrap it again; the optimizer stays"
        )
    sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if sharded or any(hasattr(p, "placements") for p in inner.parameters()):
        raise PlanError(
            "processes share this model's parameters: FSDP's shards cannot lose channels; gather the weights into an "
            "unsharded model, use secateur.shrink on it, and shard that with a new optimizer"
        )
    if plan.dropped:
        raise PlanError(f"the plan drops whole blocks ({plan.dropped[0]}, …); use secateur.shrink and a new optimizer")
    if any(
        isinstance(getattr(hook, "__self__", None), Pruner) for hook in optimizer._optimizer_step_pre_hooks.values()
    ):
        raise PlanError("a method still prunes with this optimizer; call its finish(), which gives the plan, first")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learning = {n: p for n, p in inner.named_parameters() if n in plan.cuts and p.requires_grad}
    if learning and trained.isdisjoint(map(id, learning.values())):
        raise PlanError(
            f"the optimizer trains none of the weights that shrink, such as {next(iter(learning))!r}: it was made for "
            "another model; give the one that trains this model"
        )


def _carried_out(model: nn.Module, plan: Plan, inputs: Any) -> Shrunk:
    """A small copy of the model, checked. Raises PlanError where it cannot take the model's place in its training."""
    done = carry_out(model, plan, inputs)
    if done.form != "module":
        raise PlanError(
            f"{type(model).__name__} cannot be shrunk in place, {done.why}; ignore= the axes concerned when pruning, "
            "or end this training, and use secateur.shrink"
        )
    if done.factors:
        raise PlanError(
            f"the attention of {type(model).__name__} works out its scale from a width that changes, so weights like "
            f"{min(done.factors)!r} would have to be multiplied, and the optimizer's steps not fit them any more; "
            "ignore= the widths of heads when pruning, or end this training, and use secateur.shrink"
        )
    return done


def _cuts(model: nn.Module, plan: Plan) -> dict[str, Keep]:
    """What stays of parameters; of tied ones under the first of their names, as ``named_parameters`` gives it."""
    named = dict(model.named_parameters(remove_duplicate=False))
    cuts = {id(named[name]): keep for name, keep in plan.cuts.items() if name in named}
    return {name: cuts[id(p)] for name, p in model.named_parameters() if id(p) in cuts}


def _cut_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, Keep]
) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter, by name, without what goes. Nothing is changed."""
    found = {}
    for name, parameter in parameters.items():
        if parameter not in optimizer.state:
            continue
        keep, kept = cuts.get(name, {}), dict(optimizer.state[parameter])
        for key, value in kept.items() if keep else ():
            if isinstance(value, Tensor) and value.dim():
                kept[key] = _cut(value, _keep_of(value, parameter, keep, f"{key!r} of {name!r}"))
            elif isinstance(value, list | tuple | dict):
                raise PlanError(_unknown(f"{key!r} of {name!r} as a {type(value).__name__}"))
        found[name] = kept
    return found


def _keep_of(value: Tensor, parameter: Tensor, keep: Keep, what: str) -> Keep:
    """What stays of a tensor of the parameter's shape; sums over a dimension, as Adafactor's, have length 1 there."""
    pairs = list(zip(value.shape, parameter.shape, strict=False))
    if value.dim() != parameter.dim() or any(n not in (1, whole) for n, whole in pairs):
        raise PlanError(_unknown(f"{what} in shape {list(value.shape)}, for a weight of {list(parameter.shape)}"))
    return {dim: flags for dim, flags in keep.items() if value.shape[dim] == parameter.shape[dim]}


def _unknown(what: str) -> str:
    return f"the optimizer keeps {what}, which cannot be cut; use secateur.shrink and a new optimizer"


def _cut(tensor: Tensor, keep: Keep) -> Tensor:
    value = tensor.detach()
    for dim, flags in keep.items():
        value = value.index_select(dim, flags.nonzero()[:, 0].to(value.device))
    return value


def _undo(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> Callable[[], None]:
    """A function that gives the model its tensors and attributes of now again; values are not written to meanwhile."""
    tensors = ("_parameters", "_buffers")
    own = [(module, {k: dict(v) if k in tensors else v for k, v in vars(module).items()}) for module in model.modules()]
    old = {path: {name: read(model.get_submodule(path), name) for name in named} for path, named in attributes.items()}

    def take_back() -> None:
        for module, variables in own:
            vars(module).update(variables)
        put_(model, old)

    return take_back


def _replace(
    optimizer: torch.optim.Optimizer, new: Mapping[int, nn.Parameter], state: Mapping[nn.Parameter, dict[str, Any]]
) -> None:
    """Let the optimizer train the new parameters, in the places of the old ones, by their ids."""
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if id(parameter) in new:
                optimizer.state.pop(parameter, None)
                group["params"][i] = new[id(parameter)]
    for parameter, kept in state.items():
        optimizer.state[parameter] = kept
