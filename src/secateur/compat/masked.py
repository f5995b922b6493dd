"""Parameters computed when they are read: ``weight`` is ``weight_orig`` where ``weight_mask``, else zero.

The module's class becomes a subclass with a property; see docs/decisions/0009-compat-prune.md.
"""

from __future__ import annotations

import copyreg
import types
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from secateur.errors import SpecError

_CLASSES: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()
"""One class per dense class and names, so that compiled code is shared and nothing grows."""


def source(module: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """What holds the values of ``module.name``: its Parameter, the same when pruned, or its parametrizations.

    Raises TypeError, AttributeError or SpecError, and says what to do, where that cannot be pruned.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a module and the name of its parameter, found {type(module).__name__}")
    where = type(module).__name__
    if parametrize.is_parametrized(module, name):
        chain: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        return chain
    if is_computed(module, name):
        return _original(module, name)
    parameter = module._parameters.get(name)
    if isinstance(parameter, UninitializedParameter):
        raise SpecError(f"{where}.{name} has no shape yet; run the model once before pruning it")
    if isinstance(parameter, nn.Parameter):
        for taken in (f"{name}_orig", f"{name}_mask"):
            if hasattr(module, taken):
                raise SpecError(f"{where} has an attribute {taken!r} already, which pruning {name!r} needs; rename it")
        return parameter
    names = ", ".join(n for n, p in module._parameters.items() if p is not None) or "none"
    if name in module._parameters:
        raise TypeError(f"{where}.{name} is None; its parameters are: {names}")
    if name in module._buffers or name in module._modules:
        raise TypeError(f"{where}.{name} is no parameter, and only these can be pruned: {names}")
    if hasattr(module, name):
        raise TypeError(
            f"{where}.{name} is no parameter but computed by another tool (torch.nn.utils.prune, weight_norm, …); "
            f"take that off first, or prune what it computes from: {names}"
        )
    raise AttributeError(f"{where} has no parameter {name!r}; its parameters are: {names}")


def as_mask(mask: Tensor, like: Tensor) -> Tensor:
    """``mask`` as bools, laid out in memory as ``like`` is. Raises TypeError or SpecError where it is no mask of it."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a tensor, compute_mask returned {type(mask).__name__}")
    if mask.shape != like.shape:
        raise SpecError(f"a mask of shape {list(mask.shape)} for a tensor of shape {list(like.shape)}")
    keep = mask != 0
    if not (mask.is_meta or bool((keep == mask).all())):
        raise SpecError("a mask holds zeros and ones only; for other factors, multiply the parameter itself")
    return torch.empty_like(like.detach(), dtype=torch.bool).copy_(keep)


def where(mask: Tensor, dense: Tensor) -> Tensor:
    """``dense`` with zeros. Not a product: zero times NaN is NaN."""
    return torch.where(_bools(mask), dense, 0)


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """The bool mask of a pruned tensor; None where there is none."""
    if parametrize.is_parametrized(module, name):
        return next((p.mask for p in module.parametrizations[name] if isinstance(p, Mask)), None)  # type: ignore[index]
    return _bools(module._buffers[f"{name}_mask"]) if is_computed(module, name) else None  # type: ignore[arg-type]


def mask_(module: nn.Module, name: str, mask: Tensor) -> None:
    """Let ``module.name`` be computed with ``mask`` (from ``as_mask``) from now on. ``source`` says where it can be."""
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]  # type: ignore[index]
        found = next((p for p in chain if isinstance(p, Mask)), None)
        if found is None:
            parametrize.register_parametrization(module, name, Mask(mask))
        else:
            found.mask = mask
    elif is_computed(module, name):
        module._buffers[f"{name}_mask"] = mask
    else:
        cls = parametrize.type_before_parametrizations(module)
        computing = _computing(_dense(cls), tuple(dict.fromkeys([*_names(cls), name])))
        module._parameters[f"{name}_orig"] = module._parameters.pop(name)
        module._buffers[f"{name}_mask"] = mask
        if parametrize.is_parametrized(module):  # on top is a class of this module's own, which will be taken off again
            type(module).__bases__ = (computing,)
        else:
            module.__class__ = computing
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)


def unmask_(module: nn.Module, name: str) -> None:
    """Put the zeros into the parameter itself, the same object as ever, and compute nothing any more.

    Raises SpecError, and changes nothing, where a parametrization cannot be given such values.
    """
    if parametrize.is_parametrized(module, name):
        _unmask_parametrized_(module, name)
    elif is_computed(module, name):
        parameter = _original(module, name)
        parameter.data = getattr(module, name).detach()
        del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        module._parameters[name] = parameter
        if not parametrize.is_parametrized(module) and name in _names(type(module)):
            left = tuple(n for n in _names(type(module)) if n != name)
            module.__class__ = _computing(_dense(type(module)), left)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


class Mask(nn.Module):
    """The last step of a tensor that has parametrizations."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, dense: Tensor) -> Tensor:
        return where(self.mask, dense)

    def right_inverse(self, masked: Tensor) -> Tensor:
        return masked


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether ``module.name`` is computed from ``name_orig`` and ``name_mask``."""
    return isinstance(getattr(type(module), name, None), _Computed) and f"{name}_mask" in module._buffers


class _Computed(property):
    """A tensor that is computed when it is read; where a module is not pruned (any more), an ordinary attribute."""

    def __init__(self, name: str) -> None:
        orig, mask = f"{name}_orig", f"{name}_mask"

        def read(module: nn.Module) -> Any:
            if mask not in module._buffers:
                return nn.Module.__getattr__(module, name)
            return where(getattr(module, mask), getattr(module, orig))

        def write(module: nn.Module, value: object) -> None:
            raise AttributeError(
                f"{type(module).__name__}.{name} is computed from {orig} and {mask} while it is pruned; change {orig}, "
                f"or call prune.remove(module, {name!r}) first"
            )

        super().__init__(read, write)


class _Computing:
    """Copied and pickled by its dense class and the names, as it is in no module."""

    _dense: ClassVar[type]
    _names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is copyreg.__newobj__ and "_dense" in vars(reduced[1][0]):  # type: ignore[attr-defined]
            return (_new, (self._dense, self._names), *reduced[2:])
        return reduced


def _new(dense: type, names: tuple[str, ...]) -> Any:
    return object.__new__(_computing(dense, names))


def _computing(dense: type, names: tuple[str, ...]) -> type:
    """The subclass of ``dense`` in which ``names`` are computed; it goes by the same name."""
    if not names:
        return dense
    cls = _CLASSES.get((dense, names))
    if cls is None:
        members: dict[str, Any] = {name: _Computed(name) for name in names}
        members |= {"_dense": dense, "_names": names, "__module__": dense.__module__, "__doc__": dense.__doc__}
        if issubclass(dense, nn.RNNBase):
            members["_flat_weights"] = property(_flat_weights, lambda module, value: None)
        cls = types.new_class(dense.__name__, (_Computing, dense), exec_body=lambda space: space.update(members))
        cls.__qualname__ = dense.__qualname__
        _CLASSES[dense, names] = cls
    return cls


def _dense(cls: type) -> type:
    dense: type = vars(cls).get("_dense", cls)
    return dense


def _names(cls: type) -> tuple[str, ...]:
    names: tuple[str, ...] = vars(cls).get("_names", ())
    return names


def _flat_weights(rnn: nn.RNNBase) -> list[Tensor | None]:
    """What the kernels of recurrent layers are given, in place of a list that goes stale."""
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def _bools(mask: Tensor) -> Tensor:
    """Masks are kept as bools, but ``load_state_dict(assign=True)`` of torch's file puts floats in their place."""
    return mask if mask.dtype is torch.bool else mask != 0


def _original(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters.get(f"{name}_orig")
    if parameter is None:
        raise SpecError(f"{type(module).__name__}.{name}_orig is no parameter any more; undo what was done to it first")
    return parameter


def _unmask_parametrized_(module: nn.Module, name: str) -> None:
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    position = next((i for i, p in enumerate(chain) if isinstance(p, Mask)), None)
    if position is None:  # its user has taken all parametrizations off, and put others on
        return
    mask = chain[position]
    with torch.no_grad():
        value = getattr(module, name).clone()
        before = [(t, t.data) for t in (*chain.parameters(recurse=False), *chain.buffers(recurse=False))]
        del chain[position]
        try:
            setattr(module, name, value)
            exact = torch.equal(getattr(module, name)[~mask.mask], value[~mask.mask])
        except (RuntimeError, ValueError):
            exact = False
        if not exact:
            for tensor, data in before:
                tensor.data = data
            chain.insert(position, mask)
            raise SpecError(
                f"the parametrization of {type(module).__name__}.{name} cannot be given these zeros; call "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) instead, which keeps them"
            )
