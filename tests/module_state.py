"""What a failed call could have changed of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a failed call could have changed."""
    hooks = {k: len(h) if hasattr(h, "__len__") else h for k, h in module._forward_pre_hooks.items()}
    return {name: value.clone() for name, value in module.state_dict().items()} | {"hooks": hooks}


def unchanged(module: nn.Module, before: dict[str, Any]) -> bool:
    after = state(module)
    same = before.keys() == after.keys()
    return same and all(
        torch.equal(before[name], after[name]) if isinstance(before[name], Tensor) else before[name] == after[name]
        for name in before
    )
