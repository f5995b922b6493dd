"""What was measured, before and after: frozen data, JSON, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from secateur.allocate import Curve
from secateur.apply.shrink import Law
from secateur.errors import DataError
from secateur.files import write_atomic
from secateur.recover import Epoch
from secateur.tasks import Interval

VERSION = 1
"""Of the JSON form; older versions are read forever."""


@dataclass(frozen=True)
class Row:
    """One stage of the way ("dense", "pruned", "recalibrated", "recovered", "onnx"); None was not measured.

    ``accuracy`` is the mean score with its 95 % interval, ``drop`` how much lower than the first
    row's it is (paired, so positive is worse), ``latency`` the median with the 10th and 90th
    percentile in milliseconds, ``bytes`` the size on disk, ``memory`` the peak in bytes, ``metrics`` what the
    task's ``summary`` says of the whole split.
    """

    stage: str
    params: int
    nonzero: int
    macs: int | None
    bytes: int
    accuracy: Interval | None = None
    drop: Interval | None = None
    latency: Interval | None = None
    memory: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One weight: its shape before and after, the fraction of it that stays, its MACs before."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: float
    macs: int


@dataclass(frozen=True)
class Frozen:
    """An axis that pruning could not touch, and why."""

    axis: str
    units: int
    reason: str


@dataclass(frozen=True)
class Point:
    """The score of a model of which a part is ``left``; points of one ``series`` make a curve."""

    series: str
    left: float
    score: Interval


@dataclass(frozen=True)
class Report:
    """Everything that was measured; the first of ``rows`` is what the others are compared with.

    ``meta`` says how: pattern, budget, criterion, seeds, versions, processor, threads, and the form
    of the result with its reason. ``sensitivity`` has the curves that the allocation went by, ``tried`` the scores of
    other sizes, ``history`` the epochs of a training that pruned, if any.
    """

    title: str
    rows: tuple[Row, ...]
    layers: tuple[Layer, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    law: Law | None = None
    meta: Mapping[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sensitivity: tuple[Curve, ...] = ()
    tried: tuple[Point, ...] = ()
    history: tuple[Epoch, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote. Raises DataError, naming the place, for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the report is damaged, or no JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise DataError(f"the report is not of version {VERSION}; it needs a newer secateur, or is no report")
        for later in ("sensitivity", "tried", "history"):  # reports of before there were curves
            data.setdefault(later, [])
        report: Report = _read(cls, data, "report")
        return report

    def save_html(self, path: Path | str) -> None:
        """Write one self-contained page. Raises MissingExtra without altair and vl-convert-python."""
        from secateur.report.html import page

        write_atomic(Path(path), page(self))


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value``, as JSON gives it, as an instance of the type ``kind``; DataError where it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        return None if value is None else _read(arguments[0], value, where)
    if is_dataclass(kind) and isinstance(value, dict):
        hints, build = get_type_hints(kind), cast(Any, kind)
        if kind is Row:
            value = {"metrics": {}, **value}  # rows of before there were any
        if odd := set(value) ^ set(hints):
            raise DataError(f"{where} lacks, or does not know: {', '.join(sorted(odd))}")
        return build(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if kind is Interval and isinstance(value, list) and len(value) == len(Interval._fields):
        return Interval(*(_read(float, v, where) for v in value))
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, dict) and all(type(v) in (str, int, float) for v in value.values()):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise DataError(f"{where} is {str(value)[:40]!r}, expected {getattr(kind, '__name__', kind)}")
