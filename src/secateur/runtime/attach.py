"""Engine layers in place of a model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime.product import Product, of_module


class Absent(Tensor):
    """Stands where a layer's ``weight`` was: it has its shape and dtype, and no values.

    Some modules look at the weights of those below them. Torch's encoder layers call their own layers, instead of one
    fused operator, where one is of a class like this.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        return self


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put an engine layer wherever ``old`` is held; a module may be shared."""
    assert isinstance(old.weight, Tensor)
    weight = torch.empty_like(old.weight, device="meta", requires_grad=False)
    new.weight = weight.as_subclass(Absent)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def product_of(model: nn.Module, name: str) -> Product | None:
    """The layer that has the weight of that name, where the engine can take its place: nothing else may see it."""
    path, _, attribute = name.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(path)
    if module is None or attribute != "weight" or module._forward_hooks or module._forward_pre_hooks:
        return None
    holders = sum(module.weight is p for each in modules.values() for p in each._parameters.values() if p is not None)
    product = of_module(path, module, ())
    return product if holders == 1 and not isinstance(product, str) else None


def attach_(model: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Let layers run on packed weights, by the names of their own; ``product_of`` must have found them all."""
    for name, tensor in packed.items():
        product = product_of(model, name)
        assert product is not None
        replace_(model, model.get_submodule(product.name), product.by_engine(tensor))
