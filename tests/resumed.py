"""A fine-tuning with everything in it, run in processes of its own that are killed (see test_finetune_resume.py)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from secateur.allocate import Allocation
from secateur.plan import Plan
from secateur.recover import recover
from secateur.tasks import Classification

BATCHES, EPOCHS = 10, 3


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.eye(3, 4)[y] * 2 + torch.randn(n, 4, generator=generator), y


def noisy(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class Own:
    """A user's task: a generator that draws from all three global states, between batches too."""

    def batches(self, split):
        x, y = blobs(160, 0) if split == "train" else blobs(60, 1)
        rows = list(range(len(x)))
        if split == "train":
            random.shuffle(rows)
        while rows:
            # What is drawn for one batch decides on what is left for the next ones.
            first = int(torch.randint(len(rows), ())) if split == "train" else 0
            rows = rows[first:] + rows[:first]
            taken, rows = rows[:16], rows[16:]
            noise = np.random.randn(len(taken), 4).astype(np.float32) * (split == "train") * 0.1
            yield x[taken] + torch.from_numpy(noise), y[taken]

    def loss(self, output, target):
        return F.cross_entropy(output, target)

    def scores(self, output, target):
        return (output.argmax(1) == target).float()


class Numbered(Own):
    """Batches by number, each of which draws from the global state when it is asked for."""

    def batches(self, split):
        return Numbers(torch.randperm(160)) if split == "train" else super().batches(split)

    def loss(self, output, target):
        return 300 * super().loss(output, target)  # overflows in fp16 at the scaler's first scales


class Numbers(Sequence):
    def __init__(self, order):
        self.order = order

    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        x, y = blobs(160, 0)
        rows = self.order[16 * i : 16 * i + 16]
        return x[rows] + 0.1 * torch.randn(len(rows), 4), y[rows]


TASKS = {
    "ours": lambda: Classification(blobs(160, 0), blobs(60, 1), blobs(60, 2), batch_size=16, augment=noisy),
    "own": Own,
    "numbered": Numbered,
}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def plan():
    keep = torch.arange(64).view(16, 4) % 3 > 0
    kept, total = {"0.weight": int(keep.sum())}, {"0.weight": 64}
    return Plan("unstructured", "", Allocation(kept, total), {"0.weight": keep}, {}, {}, {"0.weight": (16, 4)}, {})


OPTIONS = {
    "sgd": {"epochs": EPOCHS, "lr": 0.05, "accumulate": 3, "ema": 0.9, "clip": 1.0},
    "adamw": {"epochs": EPOCHS, "lr": 0.01, "optimizer": "torch.optim:AdamW", "schedule": "rewind", "amp": "fp16"},
}


def fine_tune(kind, options, folder=None, every=0.0):
    """The weights and the history, times left out."""
    extra = {} if folder is None else {"checkpoint": folder, "every": every}
    model, history = recover(network(0), TASKS[kind](), plan=plan(), teacher=network(7), **OPTIONS[options], **extra)
    numbers = [[epoch.loss, epoch.validation, epoch.lr] for epoch in history]
    return {**model.state_dict(), "history": torch.tensor(numbers, dtype=torch.float64)}


def die(moment, count):
    """Let this process be killed at the ``count``-th batch, validation or write from now."""
    left = [count]

    def deadly(function):
        def wrapped(*arguments, **keywords):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return wrapped

    from secateur.recover import run

    if moment == "batch":
        run.Run.loss = deadly(run.Run.loss)
    elif moment == "validation":
        run.evaluate = deadly(run.evaluate)
    elif moment == "write":  # the new file is whole, but not yet in its place
        Path.replace = deadly(Path.replace)
    elif moment == "torn":  # half of the new file is on the disk
        _tear(left)


def _tear(left):
    open_ = os.fdopen

    def torn(descriptor, mode):
        file = open_(descriptor, mode)
        left[0] -= 1
        if not left[0]:
            write = file.write

            class Half:
                def write(self, data):
                    write(data[: len(data) // 2])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    pass

            return Half()
        return file

    os.fdopen = torn


def work(kind, options, folder, every, out, moment, count):
    torch.set_num_threads(1)
    die(moment, count)
    save_file(fine_tune(kind, options, folder, every), out)
