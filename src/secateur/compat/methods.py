"""Pruning methods as classes: the base for methods of one's own, and those that come with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compat import amounts, masked
from secateur.compat.amounts import Amount, Order
from secateur.errors import SpecError


class BasePruningMethod(ABC):
    """A way to choose what is pruned. Subclasses have ``compute_mask``, and ``PRUNING_TYPE``:

    what a method is shown of a tensor that is pruned already: ``"unstructured"`` the entries left, as one vector;
    ``"structured"`` the channels along ``self.dim`` with any entry left; ``"global"`` everything.
    """

    PRUNING_TYPE: str
    _tensor_name: str | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> None:  # noqa: B027
        """Nothing: it is among the module's forward pre-hooks to be found there; tensors are never stale."""

    @abstractmethod
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The new mask, zeros and ones, of the shape of the scores ``t``; ``default_mask`` is the one so far."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The pruned tensor, as ``module`` computes it."""
        if self._tensor_name is None:
            raise AssertionError(
                f"{type(self).__name__} has not been applied to a tensor of {type(module).__name__} yet"
            )
        tensor: Tensor = getattr(module, self._tensor_name)
        return tensor

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> BasePruningMethod:
        """Prune ``module.name`` by ``cls(*args, **kwargs)``, on top of what is pruned already, and return the method.

        What stays is chosen by ``importance_scores`` (of the tensor's shape), or by the tensor itself. The second time,
        and ever after, what is returned is the tensor's PruningContainer. Where anything raises, nothing has changed.
        """
        if cls.apply_mask is not BasePruningMethod.apply_mask:
            raise TypeError(
                f"{cls.__name__} overrides apply_mask, but a pruned tensor is the original where the mask is one, "
                "and zero elsewhere; override compute_mask"
            )
        method = cls(*args, **kwargs)
        masked.source(module, name)
        return commit_(prepare(module, name, method, importance_scores))

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """``t`` with zeros, where neither ``t`` nor the scores need belong to a module."""
        scores = _scores(importance_scores, t, "tensor t")
        mask = self.compute_mask(scores, default_mask=torch.ones_like(t) if default_mask is None else default_mask)
        return masked.where(masked.as_mask(mask, t), t)

    def remove(self, module: nn.Module) -> None:
        """Make the zeros permanent. ``prune.remove`` does so and takes the hook off as well."""
        if self._tensor_name is None:
            raise AssertionError(f"{type(module).__name__} has to be pruned before pruning can be removed")
        masked.unmask_(module, self._tensor_name)


class PruningContainer(BasePruningMethod):
    """What was done to one tensor, in order; as a method, the last of them on what the earlier ones left."""

    def __init__(self, *methods: BasePruningMethod) -> None:
        self._pruning_methods: tuple[BasePruningMethod, ...] = ()
        for method in methods:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: BasePruningMethod) -> None:
        """Raises TypeError for what is no method, SpecError for a method of another tensor."""
        if not isinstance(method, BasePruningMethod):
            raise TypeError(f"{type(method)} is not a BasePruningMethod subclass")
        if self._tensor_name is None:
            self._tensor_name = method._tensor_name
        if method._tensor_name != self._tensor_name:
            raise SpecError(
                f"this PruningContainer is for methods acting on the parameter {self._tensor_name!r}, "
                f"found one for {method._tensor_name!r}"
            )
        self._pruning_methods += (method,)

    def __len__(self) -> int:
        return len(self._pruning_methods)

    def __iter__(self) -> Iterator[BasePruningMethod]:
        return iter(self._pruning_methods)

    def __getitem__(self, index: int) -> BasePruningMethod:
        return self._pruning_methods[index]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return compose(self._pruning_methods[-1], t, default_mask)


class Identity(BasePruningMethod):
    """Prunes nothing, and makes the tensor one that is pruned."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask


class _Unstructured(BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: Amount) -> None:
        amounts.check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        count = amounts.count(self.amount, t.nelement())
        amounts.check_amount_of(count, t.nelement())
        mask = default_mask.clone(memory_format=torch.contiguous_format)
        if count:
            mask.view(-1)[self._choose(t, count)] = 0
        return mask

    @abstractmethod
    def _choose(self, t: Tensor, count: int) -> Tensor:
        """The flat indices of the ``count`` entries of ``t`` to prune."""


class RandomUnstructured(_Unstructured):
    """Prunes entries at random. amount: how many, or which part, of those left."""

    def _choose(self, t: Tensor, count: int) -> Tensor:
        return torch.topk(torch.rand_like(t).reshape(-1), k=count).indices


class L1Unstructured(_Unstructured):
    """Prunes the entries with the smallest absolute values. amount: how many, or which part, of those left."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: Amount, importance_scores: Tensor | None = None
    ) -> BasePruningMethod:
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)

    def _choose(self, t: Tensor, count: int) -> Tensor:
        return torch.topk(t.abs().reshape(-1), k=count, largest=False).indices


class _Structured(BasePruningMethod):
    PRUNING_TYPE = "structured"

    def __init__(self, amount: Amount, dim: int = -1) -> None:
        amounts.check_amount(amount)
        self.amount = amount
        self.dim = dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        amounts.check_structured(t)
        amounts.check_dim(t, self.dim)
        size = t.shape[self.dim]
        count = amounts.count(self.amount, size)
        amounts.check_amount_of(count, size)
        keep = self._keep(t, count).to(default_mask.device)
        return default_mask * keep.view([size if d == self.dim % t.dim() else 1 for d in range(t.dim())])

    @abstractmethod
    def _keep(self, t: Tensor, count: int) -> Tensor:
        """Flags of the channels of ``t`` along ``self.dim``, ``count`` of them False."""


class RandomStructured(_Structured):
    """Prunes channels along ``dim`` at random. amount: how many, or which part, of those left."""

    def _keep(self, t: Tensor, count: int) -> Tensor:
        keep = torch.ones(t.shape[self.dim], dtype=torch.bool)
        if count:
            keep[torch.topk(torch.rand(len(keep)), k=count, largest=False).indices] = False
        return keep


class LnStructured(_Structured):
    """Prunes the channels along ``dim`` smallest in ``n``-norm. amount: how many, or which part, of those left."""

    def __init__(self, amount: Amount, n: Order, dim: int = -1) -> None:
        super().__init__(amount, dim)
        self.n = n

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: Amount,
        n: Order,
        dim: int,
        importance_scores: Tensor | None = None,
    ) -> BasePruningMethod:
        return super().apply(module, name, amount=amount, n=n, dim=dim, importance_scores=importance_scores)

    def _keep(self, t: Tensor, count: int) -> Tensor:
        norms = amounts.norm(t, self.n, self.dim)
        keep = torch.zeros(len(norms), dtype=torch.bool, device=t.device)
        keep[torch.topk(norms, k=len(norms) - count).indices] = True
        return keep


class CustomFromMask(BasePruningMethod):
    """Prunes where ``mask`` is zero. The mask is not kept once it has been applied to a module."""

    PRUNING_TYPE = "global"

    def __init__(self, mask: Tensor) -> None:
        _require_tensor(mask, "the mask")
        self.mask: Tensor | None = mask

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        if self.mask is None:
            raise AssertionError("this CustomFromMask was applied already; the mask is with the module")
        if self.mask.shape != default_mask.shape:
            raise AssertionError(
                f"the mask has shape {list(self.mask.shape)}, the tensor to prune {list(default_mask.shape)}"
            )
        return default_mask * self.mask.to(default_mask.dtype)


@dataclass(frozen=True, eq=False)
class Step:
    """A tensor's next mask, not applied yet."""

    module: nn.Module
    name: str
    method: BasePruningMethod
    mask: Tensor


def prepare(module: nn.Module, name: str, method: BasePruningMethod, importance_scores: Tensor | None) -> Step:
    """Everything about pruning ``module.name`` that can fail; changes nothing."""
    tensor = getattr(module, name)
    scores = _scores(importance_scores, tensor, f"parameter {name} of {type(module).__name__}")
    method._tensor_name = name
    before = masked.mask_of(module, name)
    if before is None:
        ones = torch.ones_like(tensor, memory_format=torch.contiguous_format)
        mask = method.compute_mask(scores, default_mask=ones)
    else:
        mask = compose(method, scores, before.to(tensor.dtype, memory_format=torch.contiguous_format))
    return Step(module, name, method, masked.as_mask(mask, tensor))


def commit_(step: Step) -> BasePruningMethod:
    """Apply the mask, and put the method among the module's hooks, in the place of the tensor's earlier ones."""
    masked.mask_(step.module, step.name, step.mask)
    if isinstance(step.method, CustomFromMask):  # of many rounds, one mask is enough
        step.method.mask = None
    key = hook_key(step.module, step.name)
    if key is None:
        step.module.register_forward_pre_hook(step.method)
        return step.method
    found = step.module._forward_pre_hooks[key]
    container = found if isinstance(found, PruningContainer) else PruningContainer(found)  # type: ignore[arg-type]
    container.add_pruning_method(step.method)
    step.module._forward_pre_hooks[key] = container
    return container


def hook_key(module: nn.Module, name: str) -> int | None:
    """Where among the module's forward pre-hooks the method is that pruned ``name``; None where there is none."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return key
    return None


def compose(method: BasePruningMethod, t: Tensor, mask: Tensor) -> Tensor:
    """``mask`` and what ``method`` prunes of that which it leaves, in the dtype of the scores ``t``."""
    part = _part(method, t, mask)
    whole = mask.to(t.dtype, copy=True, memory_format=torch.contiguous_format)
    whole[part] = method.compute_mask(t[part], default_mask=mask[part]).to(whole.dtype)
    return whole


def _part(method: BasePruningMethod, t: Tensor, mask: Tensor) -> tuple[Any, ...]:
    """The index of what ``method`` is shown of ``t``."""
    if method.PRUNING_TYPE == "unstructured":
        return (mask == 1,)
    if method.PRUNING_TYPE == "structured":
        if not hasattr(method, "dim"):
            raise AttributeError(
                'Pruning methods of PRUNING_TYPE "structured" need to have the attribute `dim` defined.'
            )
        amounts.check_structured(t)
        amounts.check_dim(t, method.dim)
        dim = method.dim % t.dim()
        left = mask.sum(dim=[d for d in range(t.dim()) if d != dim]) != 0
        return (*[slice(None)] * dim, left)
    if method.PRUNING_TYPE == "global":
        return (...,)
    raise SpecError(
        f"Unrecognized PRUNING_TYPE {method.PRUNING_TYPE!r} of {type(method).__name__}; "
        'it is "unstructured", "structured" or "global"'
    )


def _require_tensor(given: object, what: str) -> None:
    if not isinstance(given, Tensor):  # an AttributeError, as PyTorch's module raises
        raise AttributeError(f"{what} is a {type(given).__name__}, expected a tensor of the parameter's shape")


def _scores(given: Tensor | None, tensor: Tensor, what: str) -> Tensor:
    if given is not None:
        _require_tensor(given, f"importance_scores for {what}")
    if given is not None and given.shape != tensor.shape:
        raise AssertionError(
            f"importance_scores should have the same shape as {what}, got {list(given.shape)} vs {list(tensor.shape)}"
        )
    return tensor if given is None else given
