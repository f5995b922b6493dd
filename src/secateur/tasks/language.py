"""Models that predict the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import DataError
from secateur.tasks.task import CALIBRATION, SPLITS, Pass, check_split, logits_of, passing

IGNORED = -100
"""Target where a sequence has ended; what ``cross_entropy`` leaves out by default."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """Token sequences, each an index tensor of shape (tokens,) with at least two tokens.

    The model is called with one tensor of shape (batch, tokens), shorter sequences filled up with ``pad`` at their end,
    where a causal model does not see it. It gives logits of shape (batch, tokens, vocabulary), or carries them as
    ``.logits``. The loss is the mean cross entropy of the next token, the score of a sequence the share of its tokens
    that were the likeliest, and the summary the perplexity of all tokens.
    Raises DataError, naming the sequence, for other tensors.
    """

    train: Sequence[Tensor]
    validation: Sequence[Tensor]
    test: Sequence[Tensor]
    calibration: Sequence[Tensor] | None = None
    batch_size: int = 8
    pad: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            for i, tokens in enumerate(self._sequences(split)):
                if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype != torch.long:
                    raise DataError(
                        f"sequence {i} of split {split!r} is of type {tokens.dtype} and shape {tuple(tokens.shape)}; "
                        "expected two or more token indices (torch.long) in one dimension"
                    )

    def batches(self, split: str) -> Pass:
        check_split(split)
        sequences = self._sequences(split)

        def batch(rows: list[int]) -> tuple[Tensor, Tensor]:
            chosen = [sequences[i] for i in rows]
            return (
                pad_sequence(chosen, batch_first=True, padding_value=self.pad),
                pad_sequence(chosen, batch_first=True, padding_value=IGNORED),
            )

        return passing(split, len(sequences), self.batch_size, batch)

    def _sequences(self, split: str) -> Sequence[Tensor]:
        if split == "calibration" and self.calibration is None:
            return self.train[:CALIBRATION]
        sequences: Sequence[Tensor] = getattr(self, split)
        return sequences

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(*_flat(output, target))

    def scores(self, output: Any, target: Tensor) -> Tensor:
        real = target[:, 1:] != IGNORED
        right = (logits_of(output)[:, :-1].argmax(dim=-1) == target[:, 1:]) & real
        return right.sum(dim=1) / real.sum(dim=1)

    def summary(self, outputs: Iterable[tuple[Any, Tensor]]) -> dict[str, float]:
        loss, tokens = 0.0, 0
        for output, target in outputs:
            loss += float(F.cross_entropy(*_flat(output, target), reduction="sum"))
            tokens += int((target[:, 1:] != IGNORED).sum())
        return {"perplexity": math.exp(min(loss / tokens, 700.0))}  # more is no float


def _flat(output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of shape (tokens, vocabulary), each with the token that comes next."""
    return logits_of(output)[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten()
