"""Modules that torch.export cannot follow stand in the program as one operator each, so that the rest can be pruned.

Nothing is known about such an operator: what goes in and comes out keeps its shape, and its parameters stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from secateur.graph.failure import frames

_LIBRARY = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]
_NUMBERS = count()
_REASONS: dict[str, str] = {}

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def culprits(error: BaseException, model: nn.Module, known: Sequence[str]) -> list[str]:
    """The modules to hide after a failed capture: the innermost that the error passed through, and all of its class.

    Empty where that is the model itself, or nothing new.
    """
    paths = {id(module): path for path, module in model.named_modules() if path}
    calls = [f for f, _ in frames(error) if f.f_code.co_name == "forward" and f.f_code.co_argcount]
    passed = [f.f_locals.get(f.f_code.co_varnames[0]) for f in calls]
    for owner in reversed(passed):
        path = paths.get(id(owner))
        if path is not None and not any(f"{path}.".startswith(f"{other}.") for other in known):
            return [name for name, module in model.named_modules() if name and type(module) is type(owner)]
    return []


def reason(node: fx.Node) -> str:
    """Why an operator stands for a module; "" where it does not."""
    return _REASONS.get(str(node.target).removesuffix(".default"), "")


@contextmanager
def hidden(model: nn.Module, paths: Sequence[str], why: str, run: Callable[[], Any]) -> Iterator[None]:
    """Inside, the modules at ``paths`` are one operator each. ``run`` calls the model on its example inputs, once."""
    if not paths:
        yield
        return
    modules = {path: model.get_submodule(path) for path in paths}
    stand_ins = {path: _StandIn(module, path, why) for path, module in modules.items()}
    hooks = [m.register_forward_hook(stand_ins[p].record, with_kwargs=True) for p, m in modules.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    try:
        for path, module in modules.items():
            module.forward = stand_ins[path].call
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


class _StandIn:
    """One module as an operator from a list of tensors to a list of tensors, by what was seen of it on the example."""

    def __init__(self, module: nn.Module, path: str, why: str) -> None:
        self.forward = module.forward
        self.seen: dict[Key, tuple[Any, Any]] = {}  # shapes of inputs -> the inputs' and outputs' structure
        name = f"hidden_{next(_NUMBERS)}"
        _LIBRARY.define(f"{name}(Tensor[] inputs) -> Tensor[]")  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, self.compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        # The operators within note their own gradients.
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"secateur::{name}", self.shapes, lib=_LIBRARY)
        self.operator = getattr(torch.ops.secateur, name)
        _REASONS[f"secateur.{name}"] = f"torch.export cannot follow {path} ({type(module).__name__}): {why}"

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen[_key(tree_leaves((args, kwargs)))] = (_described((args, kwargs)), _described(output))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        _, output = self.seen[_key(leaves)]
        found = self.operator([x for x in leaves if isinstance(x, Tensor)])
        return _filled(output, found)

    def compute(self, inputs: list[Tensor]) -> list[Tensor]:
        args, kwargs = _filled(self.seen[_key(inputs)][0], inputs)
        found = tree_leaves(self.forward(*args, **kwargs))
        return [x.clone() for x in found if isinstance(x, Tensor)]  # an operator's outputs are memory of their own

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        _, output = self.seen[_key(inputs)]
        described = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        return [inputs[0].new_empty(x.shape, dtype=x.dtype) for x in described]


def _key(leaves: Sequence[Any]) -> Key:
    return tuple((tuple(x.shape), x.dtype) for x in leaves if isinstance(x, Tensor))


def _described(value: Any) -> Any:
    """The structure of arguments or outputs, tensors without their values."""
    return tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x, value)


def _filled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    leaves, spec = tree_flatten(structure)
    left = iter(tensors)
    return tree_unflatten([next(left) if isinstance(x, Tensor) else x for x in leaves], spec)
