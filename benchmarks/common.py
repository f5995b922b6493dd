"""Results of benchmarks: one JSON file a benchmark, machine and day, whole at every moment.

{"name": ..., "meta": {commit, cpu, threads, versions, date}, "rows": {key: {...}}}
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import subprocess
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from secateur.files import read_json, write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

_DECLARED: list[torch.library.Library] = []  # declarations last as long as what made them


def cpu() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit checked out, with ``-dirty`` where source or benchmarks differ from it; "" outside git."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return f"{head}-dirty" if head and changed else head


def conditions() -> dict[str, Any]:
    """Everything about this run that its numbers depend on."""
    packages = ("secateur", "torch", "numpy", "onnxruntime")
    return {
        "commit": commit(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "date": datetime.now(UTC).date().isoformat(),
    }


def trace(lines: int) -> list[str]:
    """The last lines of the traceback of the error being handled, without this machine's folders."""
    text = traceback.format_exc().replace(f"{ROOT}/", "").strip()
    return re.sub(r'"[^"\n]*/site-packages/', '"', text).splitlines()[-lines:]


def save(name: str, rows: Mapping[str, Row]) -> Path:
    """Write all rows of benchmark ``name`` and return the file: ``<date>_<cpu>_<name>.json``."""
    meta = conditions()
    path = newest(name, today=True) or RESULTS / f"{meta['date']}_{_slug(meta['cpu'])}_{name}.json"
    write_atomic(path, json.dumps({"name": name, "meta": meta, "rows": dict(rows)}, indent=1) + "\n")
    return path


def rows(name: str, *, today: bool = False) -> dict[str, Row]:
    """The rows of the newest results of benchmark ``name``; none where it has not run."""
    path = newest(name, today=today)
    return read_json(path)["rows"] if path else {}


def newest(name: str, *, today: bool = False) -> Path | None:
    """The newest results file of benchmark ``name``; with ``today``, only one of this machine and day."""
    start = f"{datetime.now(UTC).date().isoformat()}_{_slug(cpu())}_" if today else ""
    found = (p for p in RESULTS.glob(f"{start}*.json") if p.stem.split("_", 2)[2:] == [name])
    return max(found, default=None)


@functools.cache
def torchvision() -> Any:
    """The torchvision package, None where there is none; transformers imports it.

    Its wheel for CUDA fails on a CPU-only torch for want of two operators, which are then declared, not defined.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        return importlib.import_module("torchvision")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
