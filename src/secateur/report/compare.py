"""Models side by side: what each costs, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.measure import measure
from secateur.report import Row
from secateur.tasks import Task, judge, paired_difference, proportion


def compared(
    models: Mapping[str, nn.Module], inputs: Any, task: Task | None, seconds: float
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """A row for each model, timed in turns for about ``seconds`` in all, and how times compare with the first one's."""
    judged = {name: judge(net, task, "test") for name, net in models.items()} if task else {}
    scores = {name: found for name, (found, _) in judged.items()}
    first, rows, notes = next(iter(models)), [], []
    for name, net in models.items():
        found = measure(net, inputs, {n: m for n, m in models.items() if n != name}, seconds / len(models))
        rows.append(
            Row(
                stage=name,
                params=found.params,
                nonzero=found.nonzero,
                macs=found.macs,
                bytes=found.bytes,
                accuracy=proportion(scores[name]) if task else None,
                drop=paired_difference(scores[first], scores[name]) if task and name != first else None,
                latency=found.latency.spread,
                memory=found.memory,
                metrics=judged[name][1] if task else {},
            )
        )
        if name != first:
            ratio = found.latency.ratio(found.against[first])
            notes.append(f"{name} takes {ratio.value:.2f} of the time of {first} ({ratio.low:.2f} to {ratio.high:.2f})")
    return tuple(rows), tuple(notes)
