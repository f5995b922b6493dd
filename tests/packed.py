"""Packed directories to load, and to damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nets import build
from secateur import api, store
from secateur.apply.mask import mask
from secateur.report import Report
from secateur.store import Result


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 256)).eval(), torch.randn(4, 256)


def masked(model: nn.Module, inputs: Any, pattern: str = "unstructured", budget: str | None = "sparsity=90%") -> Result:
    plan = api.plan(model, inputs, pattern=pattern, budget=budget)
    return Result(mask(model, plan), plan, Report("masked", ()), inputs)


def saved(folder: Path, net: str = "", pattern: str = "unstructured", budget: str | None = "sparsity=90%"):
    model, inputs = build(net) if net else mlp()
    result = masked(model, inputs, pattern, budget)
    store.save(result, folder / "out", packed=True)
    return model, inputs, result, folder / "out"


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> None:
    """The weights with one of them changed, as another tool would write them."""
    state = load_file(folder / store.WEIGHTS)
    state = {n: t.clone() for n, t in state.items() if n != name} | ({} if tensor is None else {name: tensor})
    save_file(state, folder / store.WEIGHTS)
