"""How much each weight matters: ``criterion(weight, stats) -> scores`` of the weight's shape, larger stays.

Patterns pool these scores into units, so every criterion works with every pattern. A criterion of your own:

    @needs("grad_abs")
    def mine(weight, stats):
        return weight.abs() ** 0.5 * stats["grad_abs"]
"""

from __future__ import annotations

from secateur.criteria.by_data import activation, apoz, block_fisher, fisher, obd, taylor
from secateur.criteria.by_weights import bn_scale, fpgm, l2, lamp, magnitude, random
from secateur.criteria.form import Criterion, in_loss_units, needs
from secateur.criteria.pooling import pool_units
from secateur.criteria.scoring import BUILT_IN, each_score, gives_losses, resolve, score
from secateur.criteria.units import maskable, units_of

__all__ = [
    "BUILT_IN",
    "Criterion",
    "activation",
    "apoz",
    "block_fisher",
    "bn_scale",
    "each_score",
    "fisher",
    "fpgm",
    "gives_losses",
    "in_loss_units",
    "l2",
    "lamp",
    "magnitude",
    "maskable",
    "needs",
    "obd",
    "pool_units",
    "pooling",
    "random",
    "relative",
    "resolve",
    "score",
    "taylor",
    "units_of",
]
