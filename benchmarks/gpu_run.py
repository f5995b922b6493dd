"""What gpu.py has measured so far, where it goes, and how much time is left."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from secateur.files import write_atomic

BUDGET = {"kernels": 40, "layers": 180, "models": 130, "road": 60}
"""Seconds that each section may take; together less than 8 minutes with starting up."""


class Run:
    """The results so far, where they go, and the clock."""

    def __init__(self, path: Path, dry: bool) -> None:
        self.path, self.dry = path, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.rows: dict[str, dict[str, Any]] = {}
        self.saved, self.end, self.section = time.monotonic(), 0.0, ""

    def begin(self, section: str) -> None:
        self.section, self.end = section, time.monotonic() + (120 if self.dry else BUDGET[section])

    def keep(self, name: str, **row: Any) -> None:
        key = f"{self.section} | {name}"
        self.rows[key] = row
        print(key, row, flush=True)
        if time.monotonic() - self.saved > 20:
            self.save()

    def fits(self, name: str) -> bool:
        """Whether there is time for another row; says so in the file where there is not."""
        if time.monotonic() < self.end:
            return True
        self.rows.setdefault(f"{self.section} | skipped", {"names": []})["names"].append(name)
        return False

    def save(self) -> None:
        self.saved = time.monotonic()
        text = {"name": "gpu", "meta": conditions(self.dry), "rows": self.rows}
        write_atomic(self.path, json.dumps(text, indent=1) + "\n")


def conditions(dry: bool) -> dict[str, Any]:
    """Everything about this run that its numbers depend on. Where there is no git, COMMIT in the environment is it."""
    found: dict[str, Any] = {"commit": os.environ.get("COMMIT", "") or _commit(), "dry": dry}
    found |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("transformers", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "-"
    if not dry:
        card = torch.cuda.get_device_properties(0)
        found |= {"cpu": card.name, "memory": card.total_memory, "capability": [card.major, card.minor]}
        versions["cusparselt"] = str(torch.backends.cusparselt.version())
    else:
        found["cpu"] = "no card (dry run)"
    return found | {"versions": versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _commit() -> str:
    try:
        import common

        return common.commit()
    except Exception:  # no git, no packages of the other benchmarks
        return ""


def quantiles(samples: list[float]) -> list[float]:
    found = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    return [round(float(v), 5) for v in found]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
