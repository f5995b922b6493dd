from __future__ import annotations

from pathlib import Path

import torch

from secateur.demo import run
from secateur.report import Report


def test_the_demo_halves_the_macs_within_a_point_of_the_dense_accuracy(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    report = run(tmp_path / "out")
    dense, final = report.rows[0], report.rows[-1]
    assert (dense.stage, final.stage) == ("dense", "recovered")
    assert final.macs <= 0.5 * dense.macs
    assert dense.accuracy.value > 0.95
    assert final.drop.value <= 0.01
    assert report.law.error < report.law.tolerance
    assert torch.get_num_threads() == threads
    for name in ("model.safetensors", "plan.json", "report.html", "model.onnx"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == report
