from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from secateur.cli import app

NET = """
import torch
from torch import nn
from secateur.tasks import Classification

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def data():
    torch.manual_seed(1)
    x, y = torch.randn(48, 3, 8, 8), torch.randint(4, (48,))
    return Classification(train=(x[:16], y[:16]), validation=(x[16:32], y[16:32]), test=(x[32:], y[32:]))

def reader():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 256))

def wrong():
    return nn.Linear(8, 4)

def crashing():
    raise RuntimeError("weights are gone")
"""
SHAPE = ["--input", "1x3x8x8"]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def secateur(*words: str) -> Result:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result


def mistake(*words: str) -> str:
    """The one line that a user's mistake gets."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("secateur: ")
    return line


def test_inspect_lists_axes_and_why_some_are_frozen() -> None:
    found = json.loads(secateur("inspect", "small.py:net", *SHAPE, "--json").stdout)
    axes = {axis["axis"]: axis for axis in found["axes"]}
    parameters, macs = 8 * 27 + 2 * 8 + 8 * 72, 64 * (8 * 27 + 8 * 72)
    half = {"parameters": parameters // 2, "macs": macs // 2}
    shown = {"axis": "0", "units": 8, "frozen": "", "parameters": parameters, "macs": macs, "half": half}
    assert axes["0"] == shown
    assert "output" in axes["7"]["frozen"]
    assert axes["7"]["half"] is None
    assert found["params"] == 8 * 27 + 16 + 8 * 72 + 8 + 4 * 8 + 4
    table = secateur("inspect", "small.py:net", *SHAPE).stdout
    assert "Frozen: 7: model output 0" in table
    assert "2 of 4 axes are free" in table


def test_a_promise_is_kept_or_refused_on_the_command_line() -> None:
    words = ["secateur.demo:DigitNet", "--data", "digits", "--reconstruct", "least_squares", "--out", "out"]
    report = json.loads(secateur("prune", *words, "--budget", "max_drop=20%", "--json").stdout)
    assert report["meta"]["budget"] == "max_drop=20%"
    assert report["notes"][0].startswith(("With 95 % confidence", "No model could be shown"))
    assert report["tried"]
    assert "would do in both together" in mistake("prune", *words, "--budget", "max_drop=0.1%")


def test_prune_writes_a_directory_that_the_other_verbs_read() -> None:
    words = ["small.py:net", "--data", "small.py:data", "--budget", "macs=50%", "--epochs", "1", "--out", "out"]
    report = json.loads(secateur("prune", *words, "--json").stdout)
    assert [row["stage"] for row in report["rows"]] == ["dense", "pruned", "recalibrated", "recovered"]
    assert report["rows"][-1]["macs"] <= 0.5 * report["rows"][0]["macs"]
    assert report == json.loads(Path("out/report.json").read_text())

    Path("out/report.html").unlink()
    shown = secateur("report", "out").stdout
    assert "recovered" in shown
    assert "Score against dense: " in shown
    assert Path("out/report.html").is_file()

    bench = json.loads(
        secateur(
            "bench", "out", "--against", "small.py:net", "--data", "small.py:data", "--seconds", "0.1", "--json"
        ).stdout
    )
    assert [row["stage"] for row in bench["rows"]] == ["small.py:net", "out"]
    assert [row["params"] for row in bench["rows"]] == [report["rows"][i]["params"] for i in (0, -1)]
    assert bench["rows"][1]["accuracy"] == report["rows"][-1]["accuracy"]
    assert "of the time of small.py:net" in bench["notes"][0]

    path = secateur("export", "out", "--dense", "small.py:net", "--out", "onnx").stdout.strip()
    assert Path(path) == Path("onnx/model.onnx")
    assert Path(path).is_file()


def test_a_fine_tuning_is_kept_and_its_options_are_read_before_anything_is_pruned() -> None:
    words = ["small.py:net", "--data", "small.py:data", "--budget", "macs=50%", "--out", "out"]
    words += ["--epochs", "1", "--checkpoint", "kept"]
    words += ["--schedule", "rewind", "--optimizer", "torch.optim:AdamW", "--accumulate", "2", "--ema", "0.9"]
    first = json.loads(secateur("prune", *words, "--json").stdout)
    written = Path("kept/recover.safetensors").stat().st_mtime_ns
    again = json.loads(secateur("prune", *words, "--json").stdout)
    assert again["rows"][-1]["accuracy"] == first["rows"][-1]["accuracy"]
    assert Path("kept/recover.safetensors").stat().st_mtime_ns == written
    assert "temperature was 4.0, is now 2.0" in mistake("prune", *words, "--temperature", "2")
    assert mistake("prune", *words[:-1], "1.5").startswith("secateur: ema is 1.5, expected a decay between 0 and 1")


def test_a_text_file_gives_a_language_model_its_perplexity() -> None:
    Path("a.txt").write_text("the cat sat on the mat. " * 60)
    words = ["small.py:reader", "--data", "a.txt", "--budget", "params=90%", "--out", "out"]
    words += ["--epochs", "2", "--lr", "0.5"]
    rows = json.loads(secateur("prune", *words, "--json").stdout)["rows"]
    assert [row["stage"] for row in rows] == ["dense", "pruned", "recovered"]
    assert rows[-1]["metrics"]["perplexity"] < rows[0]["metrics"]["perplexity"]
    assert "perplexity" in secateur("report", "out").stdout
    again = json.loads(
        secateur("bench", "out", "--against", "small.py:reader", "--data", "a.txt", "--seconds", "0.1", "--json").stdout
    )
    assert [row["metrics"] for row in again["rows"]] == [rows[0]["metrics"], rows[-1]["metrics"]]


def test_minimum_tie_and_free_output_reach_the_plan() -> None:
    words = ["small.py:net", *SHAPE, "--budget", "threshold=1000", "--out", "out", "--json"]
    limits = ["--minimum", "3", "--minimum", "3=50%", "--free-output", "0"]
    report = json.loads(secateur("prune", *words, *limits).stdout)
    after = {layer["name"]: layer["after"][0] for layer in report["layers"]}
    assert after == {"0.weight": 3, "3.weight": 4, "7.weight": 3}
    axes = json.loads(secateur("inspect", "small.py:net", *SHAPE, "--tie", "0=3.weight:0", "--json").stdout)["axes"]
    assert [axis["units"] for axis in axes if not axis["frozen"]] == [8]


def test_ignore_and_override_reach_the_plan() -> None:
    words = ["small.py:net", *SHAPE, "--pattern", "unstructured", "--budget", "sparsity=50%", "--out", "out", "--json"]
    report = json.loads(secateur("prune", *words, "--ignore", "7.weight", "--override", "0.*=25%").stdout)
    kept = {layer["name"]: layer["kept"] for layer in report["layers"]}
    assert kept["0.weight"] == 0.75
    assert kept["7.weight"] == 1.0
    assert kept["3.weight"] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "small.py:net", *SHAPE, "--tie", "0"], "expected two places, such as left.weight:0=right"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--minimum", "some"], "expected 16, 25% or such as"),
        (["inspect", "nowhere", *SHAPE], "model 'nowhere' is none of timm:NAME"),
        (["inspect", "small.py:net"], "give its shape as --input 1x3x32x32, or --data"),
        (["inspect", "small.py:net", "--input", "1,3"], "input shape '1,3' cannot be read"),
        (["inspect", "small.py:crashing", *SHAPE], "could not be loaded: RuntimeError: weights are gone"),
        (["inspect", "small.py:net", "--data", "no/such/folder"], "no/such/folder"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--budget", "macs=half"], "'macs=half' cannot be read"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--budget", "macs=1%"], "nearest"),
        (["prune", "small.py:net", *SHAPE, "--out", "out"], "needs a budget"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--override", "0.*"], "expected GLOB=PART"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--override", "0.*=nan"], "expected GLOB=PART"),
        (["prune", "small.py:net", *SHAPE, "--out", "out", "--budget", "macs=50%", "--epochs", "1"], "needs task"),
        (["prune", "small.py:net", *SHAPE, "--out", "small.py/out"], "small.py is a file, expected a folder"),
        (["export", "small.py:net", *SHAPE, "--out", "small.py"], "small.py is a file, expected a folder"),
        (["prune", "small.py:net", "--data", "small.py:crashing", "--out", "out"], "could not be loaded: RuntimeError"),
        (["bench", "small.py:net", *SHAPE, "--against", "small.py:reader"], "fails on the example inputs"),
        (["report", "."], "report.json is not there"),
        (["bench", "."], "model.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    assert message in mistake(*words)
    assert not Path("out").exists()


def test_a_directory_of_ones_own_class_asks_for_it() -> None:
    secateur("prune", "small.py:net", *SHAPE, "--budget", "macs=50%", "--out", "out")
    assert "code is not run on a directory's word" in mistake("export", "out", "--out", "onnx")
    assert "--dense MODEL" in mistake("prune", "out", "--budget", "macs=50%", "--out", "smaller")
    words = ("--dense", "small.py:net", "--budget", "macs=50%", "--json", "--out", "smaller")
    rows = json.loads(secateur("prune", "out", *words).stdout)["rows"]
    assert rows[-1]["macs"] <= rows[0]["macs"] / 2


def test_inputs_that_do_not_fit_leave_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # whose handler prints to the terminal
    log.addHandler(caplog.handler)
    try:
        assert "fails on the example inputs" in mistake("inspect", "small.py:wrong", "--input", "1x9")
    finally:
        log.removeHandler(caplog.handler)
    assert log.name not in {record.name for record in caplog.records}


def test_debug_gives_the_traceback() -> None:
    result = CliRunner().invoke(app, ["--debug", "inspect", "nowhere", *SHAPE])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "SpecError"


def test_the_version() -> None:
    assert secateur("--version").stdout == "secateur 0.1.0\n"
