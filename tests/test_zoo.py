"""Thirty models of the zoo: known architectures, tiny or small, under the law at 40 % fewer parameters.

``make zoo`` runs all of them. How much is reachable at least is what a model's structure allows: an encoder whose
states are an output of the whole model, for one, keeps its residual stream.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import zoo
import zoo_models
from zoo_law import law_row

# What other packages warn about while they build and export their models is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

SWIN = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 3), "num_classes": 10}
TIMM = {  # variant -> side of the image, and arguments that make it small
    "test_vit": (160, {}),
    "test_resnet": (96, {}),
    "test_efficientnet": (96, {}),
    "test_convnext": (96, {}),
    "test_nfnet": (96, {}),
    "test_mambaout": (96, {}),
    "test_coatnet": (160, {}),
    "ghostnet_050": (96, {}),
    "swin_tiny_patch4_window7_224": (56, SWIN),
}
HF = {
    "llama": 0.99, "qwen3": 0.99, "gemma3_text": 0.99, "mixtral": 0.99, "gpt_oss": 0.99, "deepseek_v3": 0.99,
    "gpt2": 0.99, "phi3": 0.99, "falcon": 0.99, "mamba": 0.99, "bert": 0.99, "deberta-v2": 0.99, "t5": 0.93,
    "whisper": 0.85, "wav2vec2": 0.99, "beit": 0.99, "segformer": 0.99, "clip": 0.7, "detr": 0.9,
}  # fmt: skip
TORCHVISION = ("shufflenet_v2_x0_5",)


@pytest.fixture(scope="module")
def entries() -> dict[str, zoo_models.Entry]:
    if common.torchvision() is None:
        pytest.skip("torchvision is not installed")
    for package in ("timm", "transformers"):
        pytest.importorskip(package)
    return {entry.key: entry for entry in zoo_models.entries()}


def holds(entry: zoo_models.Entry, reachable: float) -> None:
    row = law_row(entry)
    assert row["outcome"] == "law", row
    assert row["reachable"] >= reachable, row["frozen"]
    assert row["changed"] > 1e-2, "nothing of what was removed showed in the output"


@pytest.mark.parametrize("variant", TIMM)
def test_timm(variant: str, entries: dict[str, zoo_models.Entry]) -> None:
    import timm

    side, arguments = TIMM[variant]
    entry = zoo_models.Entry("timm", variant, lambda: (timm.create_model(variant, **arguments), images(side)))
    holds(entry, 0.99)


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", HF)
def test_hugging_face(name: str, entries: dict[str, zoo_models.Entry]) -> None:
    holds(entries[f"hf/{name}"], HF[name])


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, entries: dict[str, zoo_models.Entry]) -> None:
    holds(entries[f"torchvision/{name}"], 0.99)


def test_every_model_gives_one_row_whatever_its_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {
        "answers": lambda: {"outcome": "law"},
        "computes for ever": lambda: max(iter(int, 1)),
        "waits for ever": lambda: time.sleep(1000),
        "dies": lambda: os._exit(3),
    }
    monkeypatch.setattr(zoo, "tool", lambda _: lambda entry: ends[entry.name]())
    monkeypatch.setattr(zoo, "limit", lambda *_: 1)
    rows: dict[str, dict] = {}
    entries = [zoo_models.Entry("timm", name, lambda: (torch.nn.Identity(), None)) for name in ends]
    zoo.run_all(entries, "secateur", 2, lambda entry, row: rows.update({entry.name: row}))
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"answers": "law", "computes for ever": "hang", "waits for ever": "hang", "dies": "crash"}
    assert "exit code 3" in rows["dies"]["message"]


def test_rows_are_kept_in_the_order_of_the_lists(tmp_path: Path) -> None:
    results = zoo.Results("secateur", tmp_path / "rows.json")
    results.add("hf/llama", {"outcome": "law"})
    results.add("timm/beit", {"outcome": "hang"})
    again = zoo.Results("secateur", tmp_path / "rows.json")
    assert list(again.rows) == ["timm/beit", "hf/llama"]
    assert zoo.summary(again.rows).splitlines()[0].startswith("timm: 1 models: 1 hang; 0 with")
