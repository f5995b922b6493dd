"""What each ATen operator does to channels, one small file per family.

A *rule* receives an ``Op`` and returns the labels of its output: one ``Dim`` per dimension, or a tuple of such
lists for an operator with several outputs. It unites what must live and die together and freezes what must stay.
A *rewrite* receives the same ``Op`` and a ``Cut`` and returns the arguments that change when units are removed.
An operator without a rule freezes everything that reaches it.
"""

from __future__ import annotations

from secateur.graph.rules import (
    attention,
    cell,
    contraction,
    gate,
    generate,
    index,
    join,
    norm,
    pointwise,
    pool,
    quantize,
    recurrent,
    reduce,
    shape,
    vision,
)
from secateur.graph.rules.base import Cut, Op, Rewrite, Rule, operator_name

_FAMILIES = (
    pointwise, contraction, norm, pool, reduce, shape, join, attention, generate, index, recurrent, cell, gate,
    quantize, vision,
)  # fmt: skip

RULES: dict[str, Rule] = {name: rule for family in _FAMILIES for name, rule in family.RULES.items()}
REWRITES: dict[str, Rewrite] = {name: rw for family in _FAMILIES for name, rw in family.REWRITES.items()}

__all__ = ["REWRITES", "RULES", "Cut", "Op", "operator_name"]
