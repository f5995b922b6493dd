"""Real networks: pretrained weights where they are at hand, torchvision's architectures where it is installed."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur import api
from secateur.graph import analyze
from secateur.recipe import load_callable
from secateur.tasks import evaluate
from secateur.tasks.detection import mean_ap
from secateur.testing import check_groups, check_removing_is_zeroing

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))


def load(name, file="nets"):
    """What a factory of the benchmarks gives, as the command line names it."""
    return load_callable(f"{BENCHMARKS / file}.py:{name}")()


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_pretrained_resnets_keep_the_law_at_half_the_macs(data, name):
    model, x = load(name), torch.randn(2, 3, 32, 32)
    result = api.prune(model, x, pattern="channel/8", budget="macs=50%")
    assert result.form == "program"  # its shortcut pads by a number written into the code
    assert result.report.rows[-1].macs <= result.report.rows[0].macs / 2
    assert result.report.law.oracle == "zeroed original"
    assert result.report.law.error < 1e-5
    assert result.model(torch.randn(5, 3, 32, 32)).shape == (5, 10)


def test_the_dense_resnet_scores_what_its_authors_published(data):
    assert evaluate(load("resnet20"), load("cifar10"), "test").mean() > 0.9


@pytest.mark.parametrize("pattern", ["2:4", "block:4x1", "unstructured"])
def test_mobilenet_takes_every_mask(data, pattern):
    model, x = load("mobilenetv2"), torch.randn(1, 3, 128, 128)
    budget = None if pattern == "2:4" else "sparsity=70%"
    result = api.prune(model, x, pattern=pattern, budget=budget)
    if pattern == "2:4":
        for name, mask in result.plan.masks.items():
            check_groups(mask, "2:4", in_dim=1)
            assert "depthwise" not in name
    else:
        total = sum(m.numel() for m in result.plan.masks.values())
        assert sum(int(m.sum()) for m in result.plan.masks.values()) <= 0.3 * total


@pytest.mark.parametrize("name", ["fastestdet", "encoder", "llama", "mobilenetv2"])
def test_real_weights_lose_a_third_of_them_and_keep_the_law(data, name):
    if name == "llama":
        pytest.importorskip("transformers")
    net = load(name, "real_nets")
    before = sum(p.numel() for p in net.model.parameters())
    result = check_removing_is_zeroing(net.model, net.inputs, "params=70%")
    assert sum(p.numel() for p in result.model.parameters()) <= 0.7 * before
    assert result.law.error < 1e-5


def test_the_dense_detector_finds_what_its_authors_published(data):
    detector = import_module("detector")
    found = detector.examples(detector.fastestdet(), *detector.coco())
    assert round(100 * mean_ap(found), 1) == 31.8


def test_a_better_box_of_the_same_class_swallows_those_it_covers():
    detector = import_module("detector")
    box, other = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]
    boxes = np.array([[0, *box, 0.9], [0, *box, 0.8], [1, *box, 0.7], [0, *other, 0.6]])
    assert detector.suppress(boxes)[:, 5].tolist() == [0.9, 0.7, 0.6]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("resnet18", "module"),
        ("mobilenet_v3_small", "module"),
        ("densenet121", "module"),
        ("regnet_y_400mf", "module"),
        ("efficientnet_b0", "module"),
        ("squeezenet1_1", "module"),
        ("shufflenet_v2_x0_5", None),
        ("googlenet", "module"),
    ],
)
def test_torchvision_architectures_keep_the_law(torchvision, name, form):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    x = torch.randn(2, 3, 96, 96)
    free = sum(a.units for a in analyze(model, x).free)
    assert free > 100
    result = check_removing_is_zeroing(model, x, "params=60%")
    assert form in (result.form, None)
