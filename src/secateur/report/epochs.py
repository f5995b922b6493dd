"""The epochs of a training that pruned, as curves and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from secateur.recover import Epoch

LINES = {"epoch-loss": "training loss", "epoch-score": "validation score", "epoch-zeros": "zeros"}
"""Charts by the id of their place: what their line is of."""


def charts(history: Sequence[Epoch], color: str) -> dict[str, Any]:
    """One small chart per line, below each other, with the same epochs."""
    import altair as alt

    lines = {
        "epoch-loss": [epoch.loss for epoch in history],
        "epoch-score": [epoch.validation for epoch in history],
        "epoch-zeros": [epoch.sparsity for epoch in history],
    }
    found = {}
    for name, line in lines.items():
        values = [{"epoch": number, "value": value} for number, value in enumerate(line, start=1)]
        zeros = name == "epoch-zeros"
        form = "%" if zeros or (name == "epoch-score" and all(0 <= value <= 1 for value in line)) else ".4~g"
        scale = alt.Scale(domain=[0, 1]) if zeros else alt.Scale(zero=False)
        axis = alt.Axis(title=LINES[name], format=form, tickCount=4, minExtent=44)
        found[name] = (
            alt.Chart(alt.InlineData(values=values))
            .mark_line(color=color, point=alt.OverlayMarkDef(color=color, size=24))
            .encode(
                x=alt.X("epoch:Q", axis=alt.Axis(title="epoch" if zeros else None, tickMinStep=1, format="d")),
                y=alt.Y("value:Q", axis=axis, scale=scale),
                tooltip=["epoch:Q", alt.Tooltip("value:Q", title=LINES[name], format=".1%" if form == "%" else ".4~g")],
            )
        )
    return found


HEAD = ("Epoch", "Training loss", "Validation score", "Zeros", "Last rate", "Seconds")


def rows(history: Iterable[Epoch]) -> Iterator[tuple[str, ...]]:
    """What a table says below ``HEAD``."""
    for i, e in enumerate(history, start=1):
        yield f"{i}", f"{e.loss:.4g}", f"{e.validation:.4g}", f"{e.sparsity:.1%}", f"{e.lr:.3g}", f"{e.seconds:.1f}"
