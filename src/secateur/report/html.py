"""A report as one HTML page: no network, no files beside it, legible on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from html import escape
from importlib import resources
from math import floor
from string import Template
from typing import Any

from secateur.errors import MissingExtra
from secateur.report import Report, Row
from secateur.tasks import Interval

KEPT, GONE = "#2f8f6b", "#b9c0c6"
"""What stays after pruning, and what was there before; both stand out on light and on dark."""

SIZES: dict[str, tuple[str, Callable[[float], str]]]


def page(report: Report) -> str:
    """The whole page. Raises MissingExtra without altair and vl-convert-python."""
    try:
        import altair  # noqa: F401
        import vl_convert
    except ImportError as error:
        raise MissingExtra(error.name or "altair", "report", "an HTML report") from error
    charts = {"change": _change_chart(report), "accuracy": _accuracy_chart(report), "layers": _layer_chart(report)}
    template = resources.files("secateur.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(report.title),
        summary=escape(_summary(report)),
        body="".join(_sections(report, {name for name, chart in charts.items() if chart})),
        library=vl_convert.javascript_bundle(),
        charts=json.dumps({name: chart for name, chart in charts.items() if chart}).replace("<", "\\u003c"),
    )


# What is compared


def _sizes(report: Report) -> Iterator[tuple[str, float, float, Callable[[float], str]]]:
    """Label, before, after and formatter of every size that the first row and a later one have."""
    sparse = any(row.nonzero < 0.99 * row.params for row in report.rows)
    for label, read, form in (
        ("Multiply-adds", lambda row: row.macs, count),
        ("Parameters", lambda row: row.params, count),
        ("Nonzero parameters", lambda row: row.nonzero if sparse else None, count),
        ("File", lambda row: row.bytes, size),
        ("Latency", lambda row: row.latency and row.latency.value, duration),
        ("Peak memory", lambda row: row.memory, size),
    ):
        known = [value for value in map(read, report.rows) if value]
        if len(known) > 1 and read(report.rows[0]):
            yield label, known[0], known[-1], form


def _latest(report: Report, field: str) -> Any:
    """The last measured value of a field, or None."""
    return next((v for row in reversed(report.rows) if (v := getattr(row, field)) is not None), None)


# Words and numbers


def count(value: float) -> str:
    return _scaled(value, 1000, ("", " k", " M", " G", " T"))


def size(value: float) -> str:
    return _scaled(value, 1000, (" B", " kB", " MB", " GB", " TB"))


def duration(milliseconds: float) -> str:
    return _scaled(milliseconds * 1000, 1000, (" µs", " ms", " s"))


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    """Three digits and a unit."""
    for unit in units[:-1]:
        if value < step - 0.5:
            return f"{value:.3g}{unit}"
        value /= step
    return f"{value:.0f}{units[-1]}" if value >= 100 else f"{value:.3g}{units[-1]}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(drop: Interval) -> str:
    """A drop as the change that it is, in percentage points, with its interval."""
    value, high, low = (f"{-100 * v + 0.0:+.1f}".replace("-", "−") for v in drop)
    return f"{value} points ({low} to {high})"


def _versus(label: str, before: float, after: float) -> str:
    ratio = after / before
    if 0.995 <= ratio <= 1.005:
        return "unchanged"
    if label == "Latency":
        return f"{1 / ratio:.2f}× faster" if ratio < 1 else f"{ratio:.2f}× slower"
    return f"{percent(1 - ratio)} less" if ratio < 1 else f"{percent(ratio - 1)} more"


def _summary(report: Report) -> str:
    changes = [f"{label.lower()} {_versus(label, a, b)}" for label, a, b, _ in _sizes(report)]
    drop = _latest(report, "drop")
    if drop is not None:
        changes.append(f"accuracy {points(drop)}")
    return f"Against the {report.rows[0].stage} model: {', '.join(changes)}." if changes else ""
