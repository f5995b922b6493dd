"""The pages' numbers are those of the newest results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402
import tables  # noqa: E402

ROW = {
    "net": "resnet20",
    "pattern": "channel",
    "budget": "macs=50%",
    "criterion": "magnitude",
    "accuracy": {"dense": [0.9125, 0.88, 0.94], "pruned": [0.2, 0.1, 0.3], "recovered": [0.9, 0.88, 0.92]},
    "drop": {"dense": None, "pruned": [0.7, 0.6, 0.8], "recovered": [0.0125, -0.001, 0.026]},
    "params": [100, 60],
    "nonzero": [100, 60],
    "macs": [1000, 499],
    "bytes": [4000, 2400],
    "latency_ratio": "0.8 (0.7 to 0.9)",
    "law": {"error": 1.2e-7},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(common, "commit", lambda: "abc1234")
    return tmp_path


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_pages_show_the_newest_results(page: Path) -> None:
    assert tables.filled(page) == page.read_text(encoding="utf-8"), "run: python benchmarks/tables.py"


def test_a_table_is_written_between_its_markers(results: Path) -> None:
    common.save("first_road", {"a": ROW})
    text = "before\n<!-- table:first_road -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    filled = tables.fill(text)
    assert "old" not in filled
    assert filled.startswith("before\n<!-- table:first_road -->\n")
    assert filled.endswith("<!-- end -->\nafter <!-- end -->\n")
    cells = next(line for line in filled.splitlines() if "resnet20" in line).strip("| ").split(" | ")
    assert cells[4:] == [
        *("91.2", "20.0", "-", "90.0", "1.2 (-0.1 to 2.6)"),
        *("60%", "49.9%", "2.4 kB", "0.8 (0.7 to 0.9)", "1e-07"),
    ]
    assert "commit abc1234" in filled
    assert tables.fill(filled) == filled


def test_the_zoo_is_counted_per_list_and_tool(results: Path) -> None:
    law = {"outcome": "law", "left": 0.6, "reachable": 1.0}
    stuck, less = {"outcome": "frozen", "reachable": 0.2}, {"outcome": "frozen", "left": 0.8, "reachable": 0.9}
    common.save("zoo", {"timm/a": law, "timm/b": stuck, "timm/c": less, "hf/a": law | {"outcome": "wrong"}})
    common.save("zoo_torch-pruning", {"timm/a": {"outcome": "forward", "left": 0.9}, "timm/b": {"outcome": "hang"}})
    lines = tables.fill("<!-- table:zoo -->\n<!-- end -->").splitlines()
    cells = {
        tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[2:] for line in lines if "|" in line
    }
    assert cells["timm", "Secateur"] == ["3", "1", "0", "1", "1", "0", "0", "0", "0", "1"]
    assert cells["hf", "Secateur"] == ["1", "0", "0", "0", "0", "0", "1", "0", "0", "1"]
    assert cells["timm", "torch-pruning"] == ["2", "0", "0", "1", "0", "0", "0", "0", "1", "-"]


def test_missing_results_are_said(results: Path) -> None:
    assert "No results yet." in tables.fill("<!-- table:first_road -->\n<!-- end -->")


def test_the_newest_file_counts(results: Path) -> None:
    folder = results / "benchmarks" / "results"
    path = common.save("first_road", {"a": ROW})
    older = json.loads(path.read_text()) | {"rows": {}}
    (folder / "2020-01-01_other-cpu_first_road.json").write_text(json.dumps(older))
    assert common.newest("first_road") == path
    assert set(common.rows("first_road")) == {"a"}
    assert common.rows("road") == {}


def test_results_of_one_day_and_machine_are_one_file(results: Path) -> None:
    assert common.save("first_road", {"a": ROW}) == common.save("first_road", {"a": ROW, "b": ROW})
    assert set(common.rows("first_road", today=True)) == {"a", "b"}
