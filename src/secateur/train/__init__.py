"""Pruning while a network trains: methods for anyone's own loop.

pruner = Gradual(model, optimizer, "sparsity=90%", steps=10_000)
for inputs, targets in batches:
    loss(model(inputs), targets).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
plan = pruner.finish()
"""

from secateur.train.gradual import Gradual
from secateur.train.pruner import Pruner

__all__ = ["Gradual", "Pruner"]
