"""The benchmarks of sparse layers: what their clock, their checks and their tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import decoder  # noqa: E402
import rivals  # noqa: E402
import sparse_tables  # noqa: E402
from secateur.measure import Latency  # noqa: E402


def kernel_row(sparsity: float, threads: int, ms: float, **more: Any) -> dict[str, Any]:
    row = {"layer": "Linear", "form": "csr", "sparsity": sparsity, "threads": threads, "ms": [ms, ms, ms]}
    row |= {"vs_torch": [8.04, 8, 9], "vs_best": [4, 3, 5], "best": "openvino"}
    return row | {"dense": {"torch": [10.0, 9, 11], "openvino": [5.0, 4, 6]}} | more


def test_a_line_has_gains_and_the_part_of_the_roofline() -> None:
    rows = {
        "a": kernel_row(0.9, 1, 1.0, macs_per_ms=40),
        "b": kernel_row(0.0, 1, 8.0, macs_per_ms=50),
        "c": kernel_row(0.9, 2, 0.5, of_bytes=0.5),
        "d": {"refused": "no form"},
    }
    head, *lines = sparse_tables.kernels(rows)
    assert {len(line) for line in lines} == {len(head)}
    assert lines[0] == ("Linear", "1", "csr", "-", "-", "-", "8.0 / 4.0 / 80%", "-", "10; 5 (openvino)", "")
    assert lines[1] == ("Linear", "2", "csr", "-", "-", "-", "8.0 / 4.0 / 50%", "-", "10; 5 (openvino)", "2.00")


def test_networks_and_cards_have_their_lines() -> None:
    network = {"net": "bert", "threads": 1, "pattern": "block:4x1", "sparsity": 0.9}
    timed = {"ms": [3.0, 2, 4], "times_as_fast": {"torch": [5.0, 4, 6]}, "forms": {"4x1": 7, "dense": 9}, "error": 1e-6}
    head, *lines = sparse_tables.models({"a": network | timed, "b": network | {"refused": "no engine"}})
    assert {len(line) for line in lines} == {len(head)}
    assert lines[0][:7] == ("bert", "1", "block:4x1", "90%", "3", "-", "5.00")
    assert lines[0][-2:] == ("9 dense, 7 4x1", "1e-06")
    assert "no engine" in lines[1]
    rows = {
        "layers | x, 1 tokens": {"ms": {"dense": [2.0, 2, 2], "CUTLASS": [1.0, 1, 1]}, "times_as_fast": 2, "notes": {}},
        "models | m, eager": {
            "ms": {"dense": [2.0, 2, 2], "2:4": [1.0, 1, 1]}, "times_as_fast": [2, 1, 3], "taken": 3, "layers": 4,
        },
        "layers | y": {"failed": "no kernel"},
        "layers | skipped": {"names": ["z"]},
        "kernels | seconds": {"value": 1},
    }  # fmt: skip
    head, *lines = sparse_tables.gpu(rows)
    assert {len(line) for line in lines} == {len(head)}
    assert lines == [
        ("x, 1 tokens", "2", "1", "-", "-", "2.00", ""),
        ("m, eager", "2", "-", "-", "1", "2.00 (1.00 to 3.00)", "3 of 4 layers"),
        ("layers: y", *["-"] * 5, "no kernel"),
        ("layers: skipped", *["-"] * 5, "z"),
    ]


def test_ratios_are_paired_and_say_how_many_times_faster() -> None:
    assert rivals.ratio(Latency((1.0, 2.0, 4.0), 1), Latency((2.0, 4.0, 8.0), 1)) == [2.0, 2.0, 2.0]


def test_runtimes_that_say_something_else_are_not_timed() -> None:
    wanted = torch.ones(2, 3)
    forms = {
        "right": ("float32", lambda: lambda: [torch.ones(2, 3)]),
        "wrong": ("float32", lambda: lambda: torch.full((2, 3), 1.1)),
        "rounded": ("bfloat16", lambda: lambda: torch.full((2, 3), 1.05).bfloat16()),
        "absent": ("float32", lambda: rivals.several(_absent, 1, cold=False)),
    }
    found, missing = rivals.made(forms, wanted, 24)
    assert set(found) == {"right", "rounded"}
    assert missing == {"wrong": "differs from torch by 0.1 (relative)", "absent": "not here"}


def _absent() -> Any:
    raise rivals.Refused("not here")


def test_cold_weights_are_many_and_take_turns() -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(len(made) + 1)
        mine = made[-1]
        return lambda: mine

    run = rivals.several(make, rivals.BEYOND_CACHES / 3, cold=True)
    assert [run() for _ in range(6)] == [1, 2, 3, 1, 2, 3]


def test_every_form_is_called_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "AWAKE", 0.0)
    calls = {"a": 0, "b": 0}

    def called(name: str) -> Any:
        def run() -> None:
            calls[name] += 1

        return run

    found = rivals.rounds({name: called(name) for name in calls}, 0.0)
    assert {name: latency.runs for name, latency in found.items()} == {"a": rivals.ROUNDS, "b": rivals.ROUNDS}
    assert calls == {"a": 1 + 2 * rivals.ROUNDS, "b": 1 + 2 * rivals.ROUNDS}


def test_the_decoder_continues_what_its_cache_says() -> None:
    """The last token's logits are those of all tokens at once, with the cache of the tokens before."""
    model = decoder.Decoder(2, 32, 48, 4, 2, 50).eval()
    token, keys, values = model.inputs()
    logits, new_keys, _ = model(token, keys, values)
    assert logits.shape == (1, 1, 50)
    assert new_keys.shape == (2, 1, 2, 1, 8)
    layer, x = model.layers[0], model.embed(token)
    q, k, v = (f(layer.norm1(x)).view(-1, 8) for f in (layer.q, layer.k, layer.v))
    q, k = (decoder.rotated(y, model.cos, model.sin) for y in (q, k))
    seen = []
    for head in range(4):
        group = head // 2
        every = torch.cat([keys[0, 0, group], k[group : group + 1]])
        weights = (every @ q[head] / 8**0.5).softmax(0)
        seen.append(weights @ torch.cat([values[0, 0, group], v[group : group + 1]]))
    x = x + layer.o(torch.cat(seen)[None, None])
    y = layer.norm2(x)
    wanted = x + layer.down(nn.functional.silu(layer.gate(y)) * layer.up(y))
    found, *_ = layer(model.embed(token), keys[0], values[0], model.cos, model.sin)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sections", [("kernels", "layers")])
def test_the_script_for_cards_walks_through_on_a_cpu(sections: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), "out.json", "--dry", "--sections"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *sections], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["name"] == "gpu"
    assert found["meta"]["dry"]
    assert not [key for key, row in found["rows"].items() if "failed" in row or key.endswith("failed")]
    assert all(row["error"] < 0.01 for key, row in found["rows"].items() if "error" in row)
    assert {key.split(" | ")[0] for key in found["rows"]} == set(sections)
