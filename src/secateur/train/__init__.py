"""Pruning while a network trains: methods for anyone's own loop.

pruner = Gradual(model, optimizer, "sparsity=90%", steps=10_000)
for inputs, targets in batches:
    loss(model(inputs), targets).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
plan = pruner.finish()
"""

from secateur.train.acdc import ACDC
from secateur.train.asp import ASP
from secateur.train.distill import Distill
from secateur.train.gates import L0
from secateur.train.gradual import Gradual
from secateur.train.group_lasso import GroupLasso
from secateur.train.growing import GrowingReg
from secateur.train.movement import Movement, SoftMovement
from secateur.train.proximal import Proximal
from secateur.train.pruner import Pruner
from secateur.train.rates import rewinding
from secateur.train.rigl import RigL
from secateur.train.second_order import SecondOrder
from secateur.train.set_ import SET
from secateur.train.shrinking import shrink_
from secateur.train.slimming import Slimming
from secateur.train.srste import SRSTE
from secateur.train.thresholds import STR

__all__ = [
    "ACDC",
    "ASP",
    "L0",
    "SET",
    "SRSTE",
    "STR",
    "Distill",
    "Gradual",
    "GroupLasso",
    "GrowingReg",
    "Movement",
    "Proximal",
    "Pruner",
    "RigL",
    "SecondOrder",
    "Slimming",
    "SoftMovement",
    "rewinding",
    "shrink_",
]
