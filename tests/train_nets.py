"""Small networks in training, for the tests of ``secateur.train``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from secateur.train import Gradual


def mlp(seed=0):
    """Two layers, 12 x 16 and 16 x 8, whose first inputs 2:4 and blocks of 4 x 2 tile."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def convnet(seed=0):
    """Weights of three shapes; blocks of 4 x 4 tile none of them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(125, 7)
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def batch(model, step):
    """The batch of a step: the same one whenever it is asked for."""
    generator = torch.Generator().manual_seed(step)
    shape = (8, 12) if isinstance(model[0], nn.Linear) else (8, 3, 6, 6)
    return torch.randn(shape, generator=generator), torch.randint(7, (8,), generator=generator)


def backward(model, step):
    inputs, targets = batch(model, step)
    F.cross_entropy(model(inputs), targets).backward()


def train(model, optimizer, pruner, steps, check=None):
    """Take the steps numbered so, and give those after which masks changed."""
    changed = []
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if pruner.step():
            changed.append(step + 1)
        if check is not None:
            check(step)
    return changed


def same(a, b):
    """Whether two models hold the same bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradual(model=None, optimizer=None, budget="sparsity=75%", steps=8, **more):
    """A model, its optimizer, and gradual pruning after steps 2, 4 and 6 of 8."""
    model = mlp() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    options = {"begin": 2, "end": 6, "every": 2, **more}
    if "schedule" in more:
        options = more
    return model, optimizer, Gradual(model, optimizer, budget, steps, **options)


def zeros(pruner):
    """Whether there are masks, and what they drop is zero."""
    return all(not bool(pruner.tensor(n)[~pruner.mask(n)].any()) for n in pruner.bits) and bool(pruner.bits)
