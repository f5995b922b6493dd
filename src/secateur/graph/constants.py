"""Values that are fixed whatever the inputs: integers computed from buffers, constants and sizes alone."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx

LARGEST = 1 << 22
"""Elements of a tensor at most that is worked out."""


class Constants:
    """Works out integer and boolean nodes that depend on nothing but buffers and constants, on demand."""

    def __init__(self, module: fx.GraphModule, written: Set[fx.Node]) -> None:
        self._module, self._written = module, written
        self._known: dict[fx.Node, torch.Tensor | None] = {}

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The node's value on the CPU; None where it is not fixed, not of whole numbers, or has no data."""
        waiting = [node]
        while waiting:  # a stack instead of recursion: programs are deeper than Python's
            here = waiting[-1]
            missing = [n for n in here.all_input_nodes if n not in self._known] if _whole(here) else []
            if here in self._known or missing:
                waiting = waiting[:-1] if here in self._known else [*waiting, *missing]
                continue
            self._known[here] = self._work_out(here) if _whole(here) else None
            waiting.pop()
        return self._known[node]

    def _work_out(self, node: fx.Node) -> torch.Tensor | None:
        if node in self._written:  # what it holds depends on when it is read
            return None
        if node.op == "get_attr":
            found: Any = self._module
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return None if found.is_meta else found.detach().cpu()
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        values = {n: self._known[n] for n in node.all_input_nodes}
        if any(v is None for v in values.values()):
            return None
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg({k: v for k, v in node.kwargs.items() if k != "device"}, lambda n: values[n])
        result = node.target(*args, **kwargs)
        return result if isinstance(result, torch.Tensor) else None


def _whole(node: fx.Node) -> bool:
    """Whether the node is a tensor of whole numbers of a moderate, fixed size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return all(isinstance(n, int) for n in value.shape) and value.numel() <= LARGEST
