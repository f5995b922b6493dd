"""What fine-tuning refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch
from resumed import blobs
from torch import nn
from torch.nn import functional as F

from secateur.errors import DataError, SpecError
from secateur.recover import Recovery, recover
from secateur.tasks import Classification

PARTS = {"train": blobs(96, 0), "validation": blobs(60, 1), "test": blobs(60, 2), "batch_size": 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1, expected a whole number, 0 or more"),
        ({"epochs": 1.5}, r"epochs is 1\.5"),
        ({"lr": 0}, "lr is 0, expected a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"accumulate": 0}, "accumulate is 0, expected a whole number of batches, 1 or more"),
        ({"accumulate": True}, "accumulate is True"),
        ({"temperature": 0.0}, r"temperature is 0\.0, expected a number above 0"),
        ({"alpha": 1.1}, r"alpha is 1\.1, expected a number from 0 to 1"),
        ({"ema": 1.0}, r"ema is 1\.0, expected a decay between 0 and 1, such as 0\.999, or None"),
        ({"clip": -1}, "clip is -1, expected a number above 0, or None"),
        ({"patience": 0}, "patience is 0, expected a whole number of epochs, 1 or more, or None"),
        ({"amp": "fp8"}, "amp is 'fp8', expected False, True, 'bf16' or 'fp16'"),
        ({"seed": -1}, "seed is -1"),
        ({"every": -1}, "every is -1, expected seconds, 0 or more"),
        ({"schedule": "linear"}, "schedule 'linear' is unknown; there are cosine, rewind, or give module:function"),
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown; there are sgd, or give module:function"),
        ({"optimizer": "torch.optim:AdamX"}, "torch.optim has no function 'AdamX'; it has Adam"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        Recovery(**options)
    with pytest.raises(SpecError, match=message):
        recover(nn.Linear(4, 3), Classification(**PARTS), **options)


class Scoring(Classification):
    def scores(self, output, target):
        return torch.full((len(target),), math.nan)


class Losses(Classification):
    def loss(self, output, target):
        return F.cross_entropy(output, target, reduction="none")


class Constant(Classification):
    def loss(self, output, target):
        return torch.zeros(())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Scoring, {}, "60 of 60 scores on the validation split are NaN"),
        (Losses, {}, r"task\.loss gave shape \(8,\), expected one number that depends on the model's output"),
        (Constant, {}, r"task\.loss gave shape \(\), expected one number that depends"),
        (Classification, {"train": (torch.ones(0, 4), torch.ones(0).long())}, "the train split has no batches"),
        (Classification, {"validation": (torch.ones(0, 4), torch.ones(0).long())}, "the validation split has no"),
    ],
)
def test_unusable_tasks_are_named(kind, changes, message):
    with pytest.raises(DataError, match=message):
        recover(nn.Linear(4, 3), kind(**(PARTS | changes)), epochs=1)


def test_a_teacher_with_other_outputs_is_named():
    with pytest.raises(DataError, match=r"found shape \(8, 3\) from the student and shape \(8, 5\) from the teacher"):
        recover(nn.Linear(4, 3), Classification(**PARTS), teacher=nn.Linear(4, 5))
