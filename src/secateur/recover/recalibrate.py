"""Batch norm statistics of the pruned network in place of the dense one's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import DataError
from secateur.progress import track
from secateur.tasks import call, mode


def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every batch norm by their exact average over ``batches``.

    ``batches`` are model inputs on the model's device; each counts the same, whatever its size.
    Only batch norms run in training mode, so dropout stays off; weights do not change. Does nothing
    where the model keeps no running statistics. An error leaves the statistics as they were.
    Raises DataError where there are no batches, or a statistic becomes NaN or infinite.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    before = [({k: v.clone() for k, v in norm.named_buffers()}, norm.momentum) for norm in norms]
    try:
        _collect(model, norms, batches)
    except BaseException:
        for norm, (buffers, _) in zip(norms, before, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(buffers[name])
        raise
    finally:
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum


def _collect(model: nn.Module, norms: list[_BatchNorm], batches: Iterable[Any]) -> None:
    count = 0
    with mode(model, training=False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's spelling of a plain average instead of a decaying one
            norm.training = True
        for inputs in track(batches, "Recalibrating"):
            call(model, inputs)
            count += 1
    if not count:
        raise DataError("there are no batches to recalibrate with; give at least one")
    for name, module in model.named_modules():
        if module in norms and not all(v.isfinite().all() for v in module.buffers(recurse=False)):
            raise DataError(
                f"the statistics of batch norm {name!r} became NaN or infinite; "
                "check the calibration data and the weights before it"
            )
