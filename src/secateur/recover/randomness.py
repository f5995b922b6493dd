"""Random states. Data and model draw from streams of their own, so that data can be replayed without the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def capture(device: torch.device) -> State:
    """The global random states: torch's on the CPU and on ``device``, NumPy's and Python's."""
    state: State = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Stream:
    """A random state that is in place only while its owner draws; the one in place meanwhile waits."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        with untouched(device):
            seed_all(seed)
            self.state = capture(device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        with untouched(self.device):
            restore(self.state, self.device)
            try:
                yield
            finally:
                self.state = capture(self.device)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the random states are as before afterwards."""
    before = capture(device)
    try:
        yield
    finally:
        restore(before, device)
