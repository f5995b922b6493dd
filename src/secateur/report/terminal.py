"""A report, or a graph, as tables in a terminal."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.graph import Graph
from secateur.graph.savings import worths
from secateur.report import Report
from secateur.report.html import count, duration, metrics, size, told
from secateur.runtime.crossover import SPARSITIES, Crossover, Curve

SHOWN = 5
"""Frozen axes that a summary lists; the report has all."""


def show(report: Report, folder: Path | None) -> None:
    """Print what was measured, and where the rest was written."""
    sparse = any(row.nonzero != row.params for row in report.rows)
    table = Table(title=escape(report.title), title_justify="left")
    table.add_column("", no_wrap=True)
    names = metrics(report)
    size_of = "nonzero" if sparse else "parameters"
    last = () if names else ("memory",)  # a line has room for one of the two
    for heading in ("accuracy", *map(escape, names), size_of, "MACs", "file", "latency", *last):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            escape(row.stage),
            f"{row.accuracy.value:.1%}" if row.accuracy else "",
            *(f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in names),
            count(row.nonzero if sparse else row.params),
            "" if row.macs is None else count(row.macs),
            size(row.bytes),
            duration(row.latency.value) if row.latency else "",
            *("" if row.memory is None else size(row.memory) for _ in last),
        )
    Console().print(table)
    if report.rows and (drop := report.rows[-1].drop) is not None:
        typer.echo(f"Score against {report.rows[0].stage}: {told(drop)}, paired, with 95 % confidence")
    if report.law:
        typer.echo(f"Removing is zeroing: relative error {report.law.error:.1e} against {report.law.oracle}")
    for frozen in report.frozen[:SHOWN]:
        typer.echo(f"Frozen: {frozen.axis} ({frozen.units} units): {frozen.reason}")
    if len(report.frozen) > SHOWN:
        typer.echo(f"Frozen: {len(report.frozen) - SHOWN} more; the report lists them")
    for note in report.notes:
        typer.echo(note)
    if folder is not None:
        typer.echo(f"Written to {folder}")


def show_crossover(found: Crossover) -> None:
    """Print from which sparsity on every pattern pays, and how much."""
    shown = [sparsity for sparsity in SPARSITIES if sparsity >= 0.5]
    table = Table(title="How many times as fast as dense", title_justify="left")
    for heading in ("", "pays from", *(f"{sparsity:.0%}" for sparsity in shown)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for layer, curves in itertools.groupby(found.curves, lambda curve: curve.layer):
        table.add_section()
        table.add_row(layer, style="bold")
        for curve in curves:
            gains = (f"{curve.gains[s].value:.1f}" if s in curve.gains else "" for s in shown)
            table.add_row(f"  {curve.pattern}", _start(curve), *gains)
    Console().print(table)
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    typer.echo(f"{found.processor}, {found.isa}, {threads}, float32, against torch's fastest dense form.")
    if found.load > 0.5:
        typer.echo(f"The load of the minute before was {found.load:.1f}; measure again when the machine is quiet.")


def _start(curve: Curve) -> str:
    if curve.wins is None:
        return "nowhere"
    below = curve.wins == min(curve.gains) and len(curve.gains) > 1
    return f"{'at most ' * below}{math.ceil(100 * curve.wins - 1e-9)}%"


def axes_of(graph: Graph) -> list[dict[str, Any]]:
    """Every axis in program order, as JSON: parameters and MACs it has a part in, and what half of it would save."""
    rows = []
    for axis, worth in zip(graph.axes, worths(graph).values(), strict=True):
        half = {"parameters": worth.half_params, "macs": worth.half_macs}
        row = {"axis": axis.name, "units": axis.units, "frozen": axis.frozen}
        rows.append(row | {"parameters": worth.params, "macs": worth.macs, "half": None if axis.frozen else half})
    return rows


def blocks_of(graph: Graph) -> list[dict[str, Any]]:
    """Every residual block in program order, as JSON: what the model loses with it."""
    rows, dense = [], graph.cost()
    for block in graph.blocks:
        without = graph.cost({block.name: np.zeros(1, bool)})
        lost = {"parameters": dense.params - without.params, "macs": dense.macs - without.macs}
        rows.append({"block": block.name, "frozen": block.frozen, **lost})
    return rows


def show_blocks(graph: Graph) -> None:
    """Print every block, where there are any."""
    cost, rows = graph.cost(), blocks_of(graph)
    if not rows:
        return
    table = Table()
    for heading in ("block", "parameters", "MACs", ""):
        table.add_column(heading, justify="left" if heading in ("block", "") else "right")
    for row in rows:
        table.add_row(
            escape(row["block"]),
            f"{count(row['parameters'])} ({row['parameters'] / cost.params:.0%})",
            f"{count(row['macs'])} ({row['macs'] / max(cost.macs, 1):.0%})",
            f"frozen: {escape(row['frozen'])}" if row["frozen"] else "free",
        )
    Console().print(table)


def show_axes(graph: Graph) -> None:
    """Print every axis, why some are frozen, and what the whole model costs."""
    cost, rows = graph.cost(), axes_of(graph)
    table = Table()
    for heading in ("axis", "units", "parameters", "MACs", "half saves"):
        left = heading == "axis"
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        half = row["half"]
        if row["frozen"]:
            reasons.setdefault(row["frozen"], []).append(row["axis"])
        table.add_row(
            escape(row["axis"]),
            str(row["units"]),
            f"{count(row['parameters'])} ({row['parameters'] / cost.params:.0%})",
            f"{count(row['macs'])} ({row['macs'] / max(cost.macs, 1):.0%})",
            f"{count(half['parameters'])}, {count(half['macs'])} MACs" if half else "frozen",
        )
    Console().print(table)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"Frozen: {names[0]}{others}: {reason}")
    typer.echo(
        f"{len(graph.weights)} weights, {count(cost.params)} parameters, {count(cost.macs)} MACs; "
        f"{len(graph.free)} of {len(rows)} axes are free"
    )
