"""Secateur prunes any PyTorch model to a budget you name, and proves what you got.

    import secateur as sc

    result = sc.prune(model, inputs, pattern="channel", budget="macs=50%", task=task)
    sc.save(result, "pruned")

The names below are all there is at the top. They are imported when first used, so that
``import secateur`` and ``secateur --help`` do not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import export, lower, plan, prune
    from secateur.apply.mask import keep_zeros, mask, mask_
    from secateur.apply.shrink import shrink, shrink_
    from secateur.errors import PruneError
    from secateur.graph import analyze
    from secateur.measure import measure
    from secateur.plan import Plan
    from secateur.recover import recalibrate_, recover
    from secateur.report import Report
    from secateur.store import load, save
    from secateur.tasks import Classification

__all__ = [
    "Classification",
    "Plan",
    "PruneError",
    "Report",
    "analyze",
    "export",
    "keep_zeros",
    "load",
    "lower",
    "mask",
    "mask_",
    "measure",
    "plan",
    "prune",
    "recalibrate_",
    "recover",
    "save",
    "shrink",
    "shrink_",
]

_HOMES = {
    "secateur.api": ("export", "lower", "plan", "prune"),
    "secateur.apply.mask": ("keep_zeros", "mask", "mask_"),
    "secateur.apply.shrink": ("shrink", "shrink_"),
    "secateur.errors": ("PruneError",),
    "secateur.graph": ("analyze",),
    "secateur.measure": ("measure",),
    "secateur.plan": ("Plan",),
    "secateur.recover": ("recalibrate_", "recover"),
    "secateur.report": ("Report",),
    "secateur.store": ("load", "save"),
    "secateur.tasks": ("Classification",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("secateur")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """Keeps ``secateur.measure`` the function.

    Importing a submodule sets it as an attribute here, and three of them (measure, plan, recover)
    share their name with a public function. ``from secateur.measure import …`` finds either.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
