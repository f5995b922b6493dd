"""A report as one HTML page: no network, no files beside it, legible on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib import resources
from string import Template
from typing import Any

from secateur.allocate import Curve
from secateur.errors import MissingExtra
from secateur.report import Point, Report, Row, epochs
from secateur.tasks import Interval

KEPT, GONE = "#2f8f6b", "#aab2b8"
"""What stays after pruning, and what was there before; both stand out on light and on dark."""


def page(report: Report) -> str:
    """The whole page. Raises MissingExtra without altair and vl-convert-python."""
    try:
        import altair  # noqa: F401
        import vl_convert
    except ImportError as error:
        raise MissingExtra(error.name or "altair", "report", "an HTML report") from error
    charts = _charts(report)
    template = resources.files("secateur.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(report.title),
        summary=escape(_summary(report)),
        body="".join(_sections(report, charts)),
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        charts=json.dumps(charts).replace("<", "\\u003c"),
    )


# What is compared


@dataclass(frozen=True)
class _Change:
    """One quantity of the first row and of the last row that has it."""

    label: str
    before: float
    after: float
    form: Callable[[float], str]
    noise: bool = False

    @property
    def words(self) -> str:
        ratio = self.after / self.before
        if self.noise:
            return "no difference beyond the spread"
        if 0.995 <= ratio <= 1.005:
            return "unchanged"
        if self.label == "Latency":
            return f"{1 / ratio:.2f}x faster" if ratio < 1 else f"{ratio:.2f}x slower"
        return f"{1 - ratio:.1%} less" if ratio < 1 else f"{ratio - 1:.1%} more"


def _changes(report: Report) -> Iterator[_Change]:
    # Another runtime is faster by itself, which is not the pruning's merit.
    rows = [row for row in report.rows if row.stage != "onnx"]
    sparse = any(row.nonzero < 0.99 * row.params for row in rows)
    quantities: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
        ("Multiply-adds", lambda row: row.macs, count),
        ("Parameters", lambda row: row.params, count),
        ("Nonzero parameters", lambda row: row.nonzero if sparse else None, count),
        ("File", lambda row: row.bytes, size),
        ("Latency", lambda row: row.latency and row.latency.value, duration),
        ("Peak memory", lambda row: row.memory, size),
    )
    for label, read, form in quantities:
        before, *after = [read(row) for row in rows] or [None]
        measured = [value for value in after if value]
        if before and measured:
            noise = label == "Latency" and _overlap([row.latency for row in rows if row.latency])
            yield _Change(label, before, measured[-1], form, noise)


def _overlap(times: list[Interval]) -> bool:
    """Whether the first and the last median each lie within the other's spread."""
    a, b = times[0], times[-1]
    return a.low <= b.value <= a.high and b.low <= a.value <= b.high


def _last(report: Report, field: str) -> Any:
    return next((v for row in reversed(report.rows) if (v := getattr(row, field)) is not None), None)


# Numbers in words


def count(value: float) -> str:
    return _scaled(value, ("", " k", " M", " G", " T"))


def size(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def duration(milliseconds: float) -> str:
    return _scaled(1000 * milliseconds, (" µs", " ms", " s"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits, and the first unit that leaves less than a thousand of it."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g}{units[-1]}" if value < 999.5 else f"{value:,.0f}{units[-1]}"


def _score(value: float) -> str:
    """A score: a share where it can be one."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"


def told(drop: Interval, form: str = "{} points ({} to {})") -> str:
    """A drop, said as the change that it is, with its interval."""
    value, low, high = (
        f"{round(100 * v, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}") for v in (-drop.value, -drop.high, -drop.low)
    )
    return form.format(value, low, high)


def _summary(report: Report) -> str:
    said = [f"{change.label.lower()} {change.words}" for change in _changes(report)]
    if (drop := _last(report, "drop")) is not None:
        said.append(f"score {told(drop)}")
    return f"Against the {report.rows[0].stage} model: {', '.join(said)}." if said else ""


# Sections


def _sections(report: Report, charts: Mapping[str, Any]) -> Iterator[str]:
    width = "half" if {"change", "accuracy"} <= set(charts) else ""
    yield f'<div class="tiles">{"".join(_tiles(report))}</div>'
    for name, heading, caption in (
        ("change", "Before and after", "What is left, as a share of the first row."),
        ("accuracy", "Score at every stage", "Mean score with its 95 % confidence interval."),
    ):
        if name in charts:
            yield _section(heading, caption, f'<div class="chart" id="{name}"></div>', width)
    caption = "Latency: median, with the 10th and 90th percentile." if _last(report, "latency") else ""
    yield _section("Stage by stage", caption, _stages(report))
    if "layers" in charts:
        before = f'<div class="scroll"><div class="chart" id="layers"></div></div>{_layers(report)}'
        yield _section("Layer by layer", "The share of every weight that was removed.", before)
    if report.history:
        caption = "Training loss, validation score and part of zeros after every epoch of the training that pruned."
        places = "".join(f'<div class="chart" id="{name}"></div>' for name in epochs.LINES)
        table = _folded(f"{len(report.history)} epochs", epochs.HEAD, epochs.rows(report.history))
        yield _section("Epoch by epoch", caption, places + table)
    if "sensitivity" in charts:
        caption = "What the loss rises by when one place alone loses this share of its units, before any recovery."
        yield _section("Place by place", caption, '<div class="chart" id="sensitivity"></div>')
    if "tried" in charts:
        caption = "The mean score, with its 95 % interval, of models of other sizes."
        yield _section("Size by size", caption, '<div class="chart" id="tried"></div>')
    if report.law is not None:
        law = report.law
        text = f"Relative error {law.error:.1e} of at most {law.tolerance:.1e}, held against {law.oracle}."
        yield _section("Removing equals zeroing", text, "")
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        yield _section("Notes", "", f"<ul>{notes}</ul>")
    if report.frozen:
        rows = ((a.axis, f"{a.units}", a.reason) for a in report.frozen)
        table = _folded(f"{len(report.frozen)} axes and their reasons", ("Axis", "Units", "Reason"), rows)
        yield _section("What could not be pruned", "", table)
    if report.meta:
        terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report.meta.items())
        yield _section("How it was measured", "", f"<dl>{terms}</dl>")


def _section(heading: str, caption: str, body: str, width: str = "") -> str:
    said = f"<p>{escape(caption)}</p>" if caption else ""
    return f'<section class="{width}"><h2>{escape(heading)}</h2>{said}{body}</section>'


def _tiles(report: Report) -> Iterator[str]:
    score, drop = _last(report, "accuracy"), _last(report, "drop")
    if score is not None:
        yield _tile("Score", _score(score.value), told(drop) if drop is not None else "")
    for name in metrics(report):
        values = [_metric(name, row) for row in report.rows if name in row.metrics]
        yield _tile(escape(name), values[-1], f"was {values[0]}")
    for change in _changes(report):
        yield _tile(change.label, change.form(change.after), f"was {change.form(change.before)}, {change.words}")


def _tile(label: str, value: str, note: str) -> str:
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong><small>{note}</small></div>'


def metrics(report: Report) -> list[str]:
    """Names of the task's own numbers, in the order of their first row."""
    return list(dict.fromkeys(name for row in report.rows for name in row.metrics))


def _metric(name: str, row: Row) -> str:
    return f"{row.metrics[name]:.4g}" if name in row.metrics else ""


def _stages(report: Report) -> str:
    def spread(interval: Interval | None, form: Callable[[float], str]) -> str:
        if interval is None:
            return ""
        return f"{form(interval.value)}<small>{form(interval.low)} to {form(interval.high)}</small>"

    columns: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("Stage", lambda row: escape(row.stage)),
        ("Score", lambda row: spread(row.accuracy, _score)),
        (
            "Change",
            lambda row: told(row.drop, "{} points<small>{} to {}</small>") if row.drop else "",
        ),
        *((escape(name), partial(_metric, name)) for name in metrics(report)),
        ("Multiply-adds", lambda row: "" if row.macs is None else count(row.macs)),
        ("Parameters", lambda row: count(row.params)),
        ("Nonzero", lambda row: count(row.nonzero)),
        ("File", lambda row: size(row.bytes)),
        ("Latency", lambda row: spread(row.latency, duration)),
        ("Memory", lambda row: "" if row.memory is None else size(row.memory)),
    )
    shown = [(label, read) for label, read in columns if any(read(row) for row in report.rows)]
    head = "".join(f"<th>{label}</th>" for label, _ in shown)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{label}"><div>{read(row) or "&ndash;"}</div></td>' for label, read in shown)
        + "</tr>"
        for row in report.rows
    )
    return f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _layers(report: Report) -> str:
    rows = (
        (layer.name, str(layer.before), str(layer.after), f"{layer.kept:.1%}", count(layer.macs))
        for layer in report.layers
    )
    return _folded("Shapes", ("Weight", "Before", "After", "Kept", "Multiply-adds before"), rows)


def _folded(summary: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{escape(summary)}</summary>{table}</details>"


# Charts


def _charts(report: Report) -> dict[str, Any]:
    """Vega-Lite specifications by the id of their place, of those that have something to show."""
    import altair as alt

    changes = [{"what": c.label, "left": c.after / c.before, "all": 1, "text": c.words} for c in _changes(report)]
    rows = [(row.stage, row.accuracy) for row in report.rows if row.accuracy is not None]
    scores = [{"stage": stage, "score": a.value, "low": a.low, "high": a.high} for stage, a in rows]
    score_form = "%" if all(a.low >= 0 and a.high <= 1 for _, a in rows) else ""
    layers = [{"weight": a.name, "removed": 1 - a.kept, "shapes": f"{a.before} → {a.after}"} for a in report.layers]
    share = alt.Axis(format="%", title=None, tickCount=5)
    names = alt.Axis(title=None, labelExpr="replace(datum.label, /[.]weight$/, '')")
    charts: dict[str, Any] = {}
    if changes:
        base = alt.Chart(alt.InlineData(values=changes)).encode(y=alt.Y("what:N", sort=None, title=None))
        charts["change"] = base.mark_bar(color=GONE, opacity=0.35).encode(x="all:Q") + base.mark_bar(
            color=KEPT, cornerRadiusEnd=3, size=14
        ).encode(x=alt.X("left:Q", axis=share), tooltip=["what:N", "text:N"])
    if scores:
        base = alt.Chart(alt.InlineData(values=scores)).encode(y=alt.Y("stage:N", sort=None, title=None))
        scale, axis = alt.Scale(zero=False), alt.Axis(format=score_form, title=None, tickCount=5)
        charts["accuracy"] = base.mark_rule(color=KEPT, strokeWidth=2).encode(
            x=alt.X("low:Q", scale=scale, axis=axis), x2="high:Q"
        ) + base.mark_point(color=KEPT, filled=True, size=90, opacity=1).encode(
            x="score:Q", tooltip=["stage:N", "score:Q", "low:Q", "high:Q"]
        )
    if layers:
        charts["layers"] = (
            alt.Chart(alt.InlineData(values=layers))
            .mark_bar(color=GONE, cornerRadiusEnd=3)
            .encode(
                x=alt.X(
                    "removed:Q",
                    axis=alt.Axis(format="%", title=None, tickCount=5, orient="top"),
                    scale=alt.Scale(domain=[0, 1]),
                ),
                y=alt.Y("weight:N", sort=None, axis=names),
                tooltip=["weight:N", alt.Tooltip("removed:Q", format=".1%"), "shapes:N"],
            )
        )
    if report.sensitivity:
        charts["sensitivity"] = _curves(report.sensitivity)
    if report.tried:
        charts["tried"] = _sizes(report.tried)
    if report.history:
        charts |= epochs.charts(report.history, KEPT)
    return {name: chart.properties(**_room(name)).to_dict() for name, chart in charts.items()}


def _sizes(points: Iterable[Point]) -> Any:
    """A line per series, and the interval of every score."""
    import altair as alt

    values = [{"series": p.series, "left": p.left, **p.score._asdict()} for p in points]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X("left:Q", axis=alt.Axis(format="%", title="left"), scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("series:N", title=None, legend=alt.Legend(orient="bottom", columns=4)),
        tooltip=["series:N", alt.Tooltip("left:Q", format=".1%"), alt.Tooltip("value:Q", format=".4g", title="score")],
    )
    spread = base.mark_rule(opacity=0.5).encode(
        y=alt.Y("low:Q", title="score", scale=alt.Scale(zero=False)), y2="high:Q"
    )
    return spread + base.mark_line(point=True).encode(y="value:Q")


def _curves(curves: Iterable[Curve]) -> Any:
    """A line per place; the pointer names it."""
    import altair as alt

    points = [
        {"place": c.place, "removed": part, "rise": rise}
        for c in curves
        for part, rise in ((0.0, 0.0), *zip(c.removed, c.rise, strict=True))
    ]
    return (
        alt.Chart(alt.InlineData(values=points))
        .mark_line(color=KEPT, opacity=0.6, point=alt.OverlayMarkDef(color=KEPT, size=24))
        .encode(
            x=alt.X("removed:Q", axis=alt.Axis(format="%", title="units removed"), scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("rise:Q", axis=alt.Axis(title="rise of the loss")),
            detail="place:N",
            tooltip=["place:N", alt.Tooltip("removed:Q", format="%"), alt.Tooltip("rise:Q", format=".3g")],
        )
    )


def _room(name: str) -> dict[str, Any]:
    if name in ("sensitivity", "tried"):
        return {"width": "container", "height": 320}
    if name in epochs.LINES:
        return {"width": "container", "height": 140}
    return {"width": "container", "height": {"step": 20 if name == "layers" else 34}}
