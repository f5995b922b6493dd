"""Drop-in for ``torch.nn.utils.prune``: the same names, masks and results, without its defects.

    from secateur.compat import prune

    prune.l1_unstructured(model.fc, "weight", amount=0.5)
    prune.remove(model.fc, "weight")

While ``weight`` is pruned, the parameter is ``weight_orig``, the mask the bool buffer ``weight_mask``, and ``weight``
is computed when it is read. docs/compat-prune.md says what differs. A call that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.compat import masked
from secateur.compat.amounts import Amount, Order
from secateur.compat.amounts import check_amount as _validate_pruning_amount_init
from secateur.compat.amounts import check_amount_of as _validate_pruning_amount
from secateur.compat.amounts import check_dim as _validate_pruning_dim
from secateur.compat.amounts import check_structured as _validate_structured_pruning
from secateur.compat.amounts import count as _compute_nparams_toprune
from secateur.compat.amounts import norm as _compute_norm
from secateur.compat.methods import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    commit_,
    compose,
    hook_key,
    prepare,
)
from secateur.errors import SpecError

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "_compute_norm",
    "_compute_nparams_toprune",
    "_validate_pruning_amount",
    "_validate_pruning_amount_init",
    "_validate_pruning_dim",
    "_validate_structured_pruning",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]

M = TypeVar("M", bound=nn.Module)
Place = tuple[nn.Module, str]


def identity(module: M, name: str) -> M:
    """Make ``module.name`` a pruned tensor of which everything is left. Returns the module, as all of these do."""
    Identity.apply(module, name)
    return module


def random_unstructured(module: M, name: str, amount: Amount) -> M:
    """Prune entries at random: ``amount`` of them, or that part of those left."""
    RandomUnstructured.apply(module, name, amount=amount)
    return module


def l1_unstructured(module: M, name: str, amount: Amount, importance_scores: Tensor | None = None) -> M:
    """Prune the entries smallest in absolute value, or by ``importance_scores`` of the tensor's shape."""
    L1Unstructured.apply(module, name, amount=amount, importance_scores=importance_scores)
    return module


def random_structured(module: M, name: str, amount: Amount, dim: int) -> M:
    """Prune channels along ``dim`` at random: ``amount`` of them, or that part of those left."""
    RandomStructured.apply(module, name, amount=amount, dim=dim)
    return module


def ln_structured(
    module: M, name: str, amount: Amount, n: Order, dim: int, importance_scores: Tensor | None = None
) -> M:
    """Prune the channels along ``dim`` with the smallest ``n``-norms, of the tensor or of ``importance_scores``."""
    LnStructured.apply(module, name, amount=amount, n=n, dim=dim, importance_scores=importance_scores)
    return module


def custom_from_mask(module: M, name: str, mask: Tensor) -> M:
    """Prune where ``mask``, zeros and ones of the tensor's shape, is zero."""
    CustomFromMask.apply(module, name, mask=mask)
    return module


def global_unstructured(
    parameters: Iterable[Place],
    pruning_method: Callable[..., BasePruningMethod],
    importance_scores: Mapping[Place, Tensor] | None = None,
    **kwargs: object,
) -> None:
    """Prune the entries of all ``parameters``, (module, name) each, as if they were one tensor.

    ``pruning_method(**kwargs)`` makes an unstructured method. Parameters that ``importance_scores`` does not have are
    judged by their own values. A Parameter in several places counts once, and all of its places get one mask.

    Raises TypeError for arguments of other kinds and methods that are not unstructured, SpecError for no parameters,
    AssertionError for scores of another shape, and what the method raises; then nothing has changed.
    """
    if not isinstance(parameters, Iterable):
        raise TypeError("global_unstructured(): parameters is not an Iterable of (module, name)")
    if not isinstance(importance_scores, dict | None):
        raise TypeError("global_unstructured(): importance_scores must be of type dict")
    groups: dict[object, list[Place]] = {}
    for module, name in dict.fromkeys((module, name) for module, name in parameters):
        groups.setdefault(masked.source(module, name), []).append((module, name))
    if not groups:
        raise SpecError("global_unstructured(): parameters is empty; give the (module, name) of what is to be pruned")
    method = pruning_method(**kwargs)
    if method.PRUNING_TYPE != "unstructured":
        raise TypeError(
            'Only "unstructured" PRUNING_TYPE supported for the `pruning_method`. '
            f"Found method {pruning_method} of type {method.PRUNING_TYPE}"
        )
    tensors = [getattr(*places[0]) for places in groups.values()]
    given = importance_scores or {}
    scores = [_scores_of(places, given, tensor) for places, tensor in zip(groups.values(), tensors, strict=True)]
    before = [_mask_so_far(places, tensor) for places, tensor in zip(groups.values(), tensors, strict=True)]
    after = torch.split(compose(method, _flat(scores), _flat(before)), [tensor.numel() for tensor in tensors])
    steps = [
        prepare(module, name, CustomFromMask(mask.view(tensor.shape).to(tensor.device)), None)
        for places, tensor, mask in zip(groups.values(), tensors, after, strict=True)
        for module, name in places
    ]
    for step in steps:
        commit_(step)


def remove(module: M, name: str) -> M:
    """Make the zeros of ``module.name`` permanent: an ordinary parameter again, the same object. Nothing is undone.

    Raises SpecError where ``name`` is not pruned.
    """
    key = hook_key(module, name)
    if key is None:
        raise SpecError(
            f"Parameter {name!r} of module {type(module).__name__} has to be pruned before pruning can be removed"
        )
    module._forward_pre_hooks[key].remove(module)  # type: ignore[attr-defined]
    del module._forward_pre_hooks[key]
    return module


def is_pruned(module: nn.Module) -> bool:
    """Whether any tensor of ``module``, or of a module inside it, is pruned."""
    return any(
        isinstance(hook, BasePruningMethod) for inner in module.modules() for hook in inner._forward_pre_hooks.values()
    )


def _scores_of(places: list[Place], given: Mapping[Place, Tensor], tensor: Tensor) -> Tensor:
    scores = next((given[place] for place in places if place in given), tensor)
    if scores.shape != tensor.shape:
        module, name = places[0]
        raise AssertionError(
            f"importance_scores of {name} of {type(module).__name__} have shape {list(scores.shape)}, "
            f"the parameter has {list(tensor.shape)}"
        )
    return scores


def _mask_so_far(places: list[Place], tensor: Tensor) -> Tensor:
    mask = torch.ones_like(tensor)
    for place in places:
        found = masked.mask_of(*place)
        if found is not None:
            mask *= found
    return mask


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])
