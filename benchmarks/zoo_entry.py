"""What a model of the zoo is to those who list it and those who run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Entry:
    """One model: which list it belongs to, its name there, and a function that builds it with its inputs."""

    group: str  # "timm", "hf" or "torchvision"
    name: str
    build: Callable[[], Built]

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"
