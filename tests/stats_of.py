"""Statistics of small models, for the tests of where and how they are taken."""

import torch

from secateur.graph import analyze
from secateur.stats import collect
from secateur.tasks import Classification


def task_of(x, classes=3, batch_size=4, calibration=None):
    split = (x, torch.arange(len(x)) % classes)
    if calibration is not None:
        calibration = (calibration, torch.arange(len(calibration)) % classes)
    return Classification(split, split, split, calibration or split, batch_size=batch_size)


def outputs_of(model, x, names=None, data=None):
    found = collect(model, analyze(model, x), ["activation", "active"], task_of(x if data is None else data), 0, names)
    return {name: (stats["activation"], stats["active"]) for name, stats in found.items()}


def share(y, dim, on=lambda v: v != 0):
    return on(y).movedim(dim, 0).flatten(1).float().mean(1)


def size(y, dim):
    return y.abs().movedim(dim, 0).flatten(1).mean(1)
