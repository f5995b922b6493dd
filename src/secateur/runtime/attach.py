"""Engine layers in place of a model's own."""

from __future__ import annotations

from collections import Counter
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


def products_of(model: nn.Module) -> dict[str, Product]:
    """By the names of their weights, the layers in whose place the engine can be put: nothing else may see a weight."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for path, module in model.named_modules():
        product = of_module(path, module, ())
        hooked = module._forward_hooks or module._forward_pre_hooks
        if path and not hooked and not isinstance(product, str) and holders[id(product.weight)] == 1:
            found[f"{path}.weight"] = product
    return found


def attach_(model: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Let layers run on packed weights, by the names of their own; ``products_of`` must have found them all."""
    products = products_of(model)
    for name, tensor in packed.items():
        replace_(model, model.get_submodule(products[name].name), products[name].by_engine(tensor))
