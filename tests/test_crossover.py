"""From which sparsity on patterns pay, without asking what this machine's times are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import SpecError, TargetError
from secateur.report.terminal import show_crossover
from secateur.runtime import crossover as module
from secateur.runtime import kernels
from secateur.runtime.crossover import SPARSITIES, Crossover, Curve, crossover, masked, sizes, wins
from secateur.tasks import Interval

ENGINE = pytest.mark.skipif(bool(kernels.why_missing()), reason="the sparse engine was not built")


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({0.5: 0.5, 0.7: 0.9}, None),
        ({0.5: 1.2, 0.7: 2.0}, 0.5),
        ({0.5: 1.0, 0.7: 1.04}, None),
        # dense takes 1: the form takes 1.25 at half and 0.625 at 80 %, so 0.95 at 0.5 + 0.3 * (1.25 - 0.95) / 0.625
        ({0.5: 0.8, 0.8: 1.6}, 0.644),
        ({0.3: 0.4, 0.5: 0.8, 0.8: 1.6}, 0.644),
    ],
)
def test_a_pattern_wins_where_it_would_be_taken(gains: dict[float, float], expected: float | None) -> None:
    assert wins(gains) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:16x1"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_have_whole_units_of_the_part_that_was_asked_for(pattern: str, sparsity: float) -> None:
    weight = torch.ones(32, 20, 3, 3)
    kept = masked(weight, pattern, sparsity)
    assert kept.shape == weight.shape
    height = {"unstructured": 1, "block:4x1": 4, "block:16x1": 16}[pattern]
    blocks = kept.flatten(1).view(32 // height, height, 180)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    units = blocks[:, 0]
    assert int(units.sum()) == units.numel() - round(units.numel() * sparsity)


def test_two_of_four_inputs_are_kept() -> None:
    kept = masked(torch.ones(16, 64), "2:4", 0.5)
    assert bool((kept.view(16, 16, 4).sum(2) == 2).all())


def test_masks_of_heights_that_do_not_fit_keep_their_shape() -> None:
    assert masked(torch.ones(18, 5), "block:16x1", 0.5).shape == (18, 5)


@pytest.mark.parametrize(("text", "number"), [("3072", 2), ("3072x", 2), ("axb", 2), ("3072x768", 3), ("-3x4", 2)])
def test_sizes_that_cannot_be_read_are_named(text: str, number: int) -> None:
    with pytest.raises(SpecError, match=rf"size '{text}' cannot be read; expected {number} numbers such as"):
        sizes(text, number)
    assert sizes("3072X768", 2) == (3072, 768)


def test_without_the_engine_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_missing", lambda: "the sparse engine was not built")
    with pytest.raises(TargetError, match="was not built"):
        crossover((64, 64), (16, 16, 4), 0.01)


@ENGINE
def test_layers_that_are_too_small_are_refused() -> None:
    with pytest.raises(SpecError, match="layers of 8x64 and 16x16x4 are too small"):
        crossover((8, 64), (16, 16, 4), 0.01)


@ENGINE
def test_an_engine_that_says_something_else_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(TargetError, match="csr differs from torch by"):
        crossover((64, 64), (16, 16, 4), 0.01)


@ENGINE
def test_every_pattern_is_timed_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEYOND_CACHES", 2**12)
    result = CliRunner().invoke(app, ["bench", "--linear", "64x32", "--conv", "16x16x6", "--seconds", "0.1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["isa"] == kernels.isa()
    curves = {(curve["layer"], curve["pattern"]): curve for curve in found["curves"]}
    layers = ["Linear 32 to 64, 1 token", "Linear 32 to 64, 128 tokens", "Conv 3x3 16 to 16 on 6x6"]
    patterns = ["unstructured", "block:4x1", "block:16x1", "2:4"]
    assert set(curves) == {(layer, pattern) for layer in layers for pattern in patterns}
    for (_, pattern), curve in curves.items():
        assert set(map(float, curve["gains"])) == ({0.5} if pattern == "2:4" else set(SPARSITIES))
        assert all(low <= gain <= high for gain, low, high in curve["gains"].values())
    assert set(curves[layers[1], "block:4x1"]["forms"].values()) == {"4x1"}
    assert set(curves[layers[0], "unstructured"]["forms"].values()) <= {"csr", "bitmask"}


def test_a_mistake_is_one_line() -> None:
    result = CliRunner().invoke(app, ["bench", "--linear", "3x"])
    assert result.exit_code == 2
    assert result.stderr == "secateur: size '3x' cannot be read; expected 2 numbers such as 3072x768\n"


def curve(pattern: str, start: float | None, **gains: float) -> Curve:
    values = {float(key[1:]) / 100: Interval(gain, gain, gain) for key, gain in gains.items()}
    return Curve("Linear 8 to 8, 1 token", pattern, values, dict.fromkeys(values, "csr"), start)


def test_the_table_says_where_patterns_pay(capsys: Any) -> None:
    curves = (
        curve("block:4x1", 0.3, _30=1.5, _50=2, _70=3, _80=4.04, _90=8, _95=15.96),
        curve("unstructured", 0.614, _30=0.3, _50=0.5, _70=1.2, _80=2, _90=3, _95=4),
        curve("2:4", None, _50=0.7),
    )
    show_crossover(Crossover("Some CPU", "avx2", 1, 0.0, curves))
    quiet = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in quiet.splitlines() if "│" in line]
    rows = {name: values for name, *values in cells}
    assert rows["block:4x1"] == ["at most 30%", "2.0", "3.0", "4.0", "8.0", "16.0"]
    assert rows["unstructured"] == ["62%", "0.5", "1.2", "2.0", "3.0", "4.0"]
    assert rows["2:4"] == ["nowhere", "0.7", "", "", "", ""]
    assert "Some CPU, avx2, 1 thread, float32" in quiet
    assert "busy" not in quiet
    show_crossover(Crossover("Some CPU", "avx2", 2, 1.7, curves))
    assert "The load of the minute before was 1.7" in capsys.readouterr().out
