"""Knowledge distillation: the dense model teaches the pruned one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError


def distillation_loss(student: Any, teacher: Any, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the distributions softened by temperature T (Hinton et al. 2015).

    Both are logits with classes in the last dimension, or outputs that carry them as ``.logits``;
    the mean is over everything else. T² keeps the gradient's size independent of T.
    Raises DataError for outputs that are no tensors of one shape.
    """
    taught, told = getattr(student, "logits", student), getattr(teacher, "logits", teacher)
    if not isinstance(taught, Tensor) or not isinstance(told, Tensor) or taught.shape != told.shape:
        raise DataError(
            f"distillation compares logits, found {_describe(taught)} from the student and {_describe(told)} "
            "from the teacher; expected two tensors of one shape"
        )
    log_student = F.log_softmax(taught.flatten(0, -2).float() / temperature, dim=-1)
    log_teacher = F.log_softmax(told.flatten(0, -2).float() / temperature, dim=-1)
    # Classes that are masked out (-inf) in both say nothing.
    gap = (log_teacher - log_student).masked_fill(log_teacher == -torch.inf, 0)
    kl = (log_teacher.exp() * gap).sum() / len(gap)
    return kl * temperature**2


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
