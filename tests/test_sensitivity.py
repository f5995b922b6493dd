"""Sensitivity: curves against losses taken by hand, the ladder, what is kept in a folder, and the report."""

import json

import pytest
import torch
from torch import nn

import secateur as sc
from nets import build
from secateur import sensitivity
from secateur.allocate import Allocation, Curve, Sensitivity
from secateur.apply.shrink import carry_out
from secateur.criteria import score, units_of
from secateur.depth import make
from secateur.errors import DataError, SpecError
from secateur.graph import analyze
from secateur.patterns import parse
from secateur.planning import assemble
from secateur.report import Report
from secateur.sensitivity import PARTS, measure
from secateur.tasks import Classification


def task_of(inputs, classes=5, batches=2):
    batch_size = len(inputs)
    n = batches * batch_size
    x = torch.randn(n, *inputs.shape[1:])
    split = (x, torch.arange(n) % classes)
    return Classification(split, split, split, split, batch_size=batch_size)


def loss_of(model, task):
    model.eval()
    with torch.no_grad():
        losses = [float(task.loss(model(x), y)) for x, y in task.batches("calibration")]
    return sum(losses) / len(losses)


def net(name="plain", classes=5):
    model, inputs = build(name)
    return model, analyze(model, inputs), task_of(inputs, classes)


@pytest.fixture
def counted(monkeypatch):
    """How often the loss is taken."""
    calls = []
    loss = sensitivity._Meter.loss
    monkeypatch.setattr(sensitivity._Meter, "loss", lambda self, run: calls.append(1) or loss(self, run))
    return calls


# --- curves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes"), [("plain", 5), ("residual", 4)])
def test_a_curve_is_what_the_loss_rises_by_without_the_lowest_units(name, classes):
    model, graph, task = net(name, classes)
    curves = measure(model, graph, task=task)
    scores = units_of(model, graph, parse("channel"), "magnitude", None, set(), 0)
    whole = loss_of(model, task)
    assert curves.keys() == scores.keys()
    for place, curve in curves.items():
        for part, rise in list(zip(curve.removed, curve.rise, strict=True))[1::2]:
            n = len(scores[place])
            keep = {place: (scores[place].argsort().argsort() >= int(part * n)).numpy()}
            kept = Allocation({place: n - int(part * n)}, {place: n})
            small = carry_out(model, assemble(graph, ("channel", "", {}), kept, keep=keep)).model
            assert rise == pytest.approx(loss_of(small, task) - whole, abs=1e-5)


def test_a_curve_of_weights_zeroes_them_one_tensor_at_a_time():
    model, graph, task = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curves = measure(model, graph, pattern="unstructured", task=task)
    whole = loss_of(model, task)
    assert curves.keys() == graph.weights.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, curve in curves.items():
        weight = model.get_parameter(name)
        for part, rise in zip(curve.removed, curve.rise, strict=True):
            order = weight.detach().abs().flatten().argsort()
            with torch.no_grad():
                weight.view(-1)[order[: int(part * weight.numel())]] = 0
            assert rise == pytest.approx(loss_of(model, task) - whole, abs=1e-5)
            model.load_state_dict(before)


def test_a_norm_over_what_goes_is_taken_over_what_stays():
    model, x = nn.Sequential(nn.Linear(4, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(2, 4)
    graph, task = analyze(model, x), task_of(x, 3)
    (curve,) = measure(model, graph, task=task).values()
    scores = units_of(model, graph, parse("channel"), "magnitude", None, set(), 0)["0"]
    keep = {"0": (scores.argsort().argsort() >= 5).numpy()}
    plan = assemble(graph, ("channel", "", {}), Allocation({"0": 5}, {"0": 10}), keep=keep)
    assert curve.rise[2] == pytest.approx(loss_of(carry_out(model, plan).model, task) - loss_of(model, task), abs=1e-5)


@pytest.mark.parametrize("pattern", ["channel", "block:4x1"])
def test_measuring_leaves_the_model_as_it_was(pattern):
    model, graph, task = net()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, graph, pattern=pattern, task=task)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the fit and the ladder ------------------------------------------------------------------------


def test_the_fit_never_falls_and_keeps_what_does_not():
    assert Curve("a", PARTS, (0.0, 1.0, 2.0, 3.0, 9.0)).fitted() == (0, 1, 2, 3, 9)
    assert Curve("a", PARTS, (-1.0, 3.0, 1.0, 2.0, 9.0)).fitted() == (0, 2, 2, 2, 9)
    assert Curve("a", PARTS, (5.0, 4.0, 3.0, 2.0, 1.0)).fitted() == (3, 3, 3, 3, 3)


def test_places_lose_what_raises_the_loss_alike():
    curves = {"flat": Curve("flat", (0.5, 1.0), (1.0, 2.0)), "steep": Curve("steep", (0.5, 1.0), (4.0, 8.0))}
    ladder = Sensitivity(curves)({"flat": torch.zeros(1000), "steep": torch.zeros(1000)})
    for rung in range(0, ladder.rungs + 1, ladder.rungs // 37):
        kept = ladder.kept(rung)
        gone = {place: 1000 - n for place, n in kept.items()}
        assert gone["steep"] == pytest.approx(gone["flat"] / 4, abs=3) or gone["flat"] == 1000
    assert ladder.kept(0) == {"flat": 1000, "steep": 1000}
    assert ladder.kept(ladder.rungs) == {"flat": 0, "steep": 0}


def test_nothing_beyond_the_largest_part_goes_on_the_strength_of_a_guess():
    """A place whose loss does not rise loses 90 %; the rest of it goes last."""
    curves = {"free": Curve("free", PARTS, (0.0,) * 5), "dear": Curve("dear", PARTS, (1.0, 2.0, 3.0, 4.0, 5.0))}
    ladder = Sensitivity(curves)({"free": torch.zeros(100), "dear": torch.zeros(100)})
    for rung in range(0, ladder.rungs, ladder.rungs // 101):
        kept = ladder.kept(rung)
        assert kept["dear"] == 100 or kept["free"] <= 10
        assert kept["free"] >= kept["dear"] // 10 - 1


def test_curves_without_any_rise_lose_all_the_same_part():
    curves = {name: Curve(name, PARTS, (0.0,) * 5) for name in "ab"}
    ladder = Sensitivity(curves)({"a": torch.zeros(100), "b": torch.zeros(10)})
    halfway = next(rung for rung in range(ladder.rungs) if ladder.kept(rung)["a"] <= 50)
    assert ladder.kept(halfway) == {"a": 50, "b": 5}
    assert sensitivity._finite({"a": (1.0, torch.nan), "b": (torch.inf, 3.0)}) == {"a": (1.0, 6.0), "b": (6.0, 3.0)}


def test_a_place_that_ruins_everything_does_not_make_the_others_alike():
    rises = {"ruin": (1e6,) * 5, "flat": (0.1, 0.2, 0.3, 0.4, 0.5), "steep": (1.0, 2.0, 3.0, 4.0, 5.0)}
    ladder = Sensitivity({name: Curve(name, PARTS, rise) for name, rise in rises.items()})(
        {name: torch.zeros(1000) for name in rises}
    )
    kept = ladder.kept(round(ladder.rungs * 0.5e-6))
    assert kept["ruin"] >= 999
    assert kept["flat"] == pytest.approx(100, abs=5)
    assert kept["steep"] == pytest.approx(950, abs=2)


def test_a_plan_by_sensitivity_meets_its_budget():
    model, graph, task = net("residual", 4)
    for pattern, budget in (("channel", "macs=50%"), ("channel/2", "params=50%"), ("unstructured", "sparsity=70%")):
        plan = make(model, graph, pattern=pattern, budget=budget, allocate="sensitivity", task=task)
        assert plan.meta["allocate"] == "sensitivity"
        if budget == "macs=50%":
            assert graph.cost({n: f.numpy() for n, f in plan.units.items()}).macs <= graph.cost().macs / 2
        if pattern == "unstructured":
            assert sum(plan.allocation.kept.values()) <= 0.3 * sum(plan.allocation.total.values())


def test_n_m_needs_no_curves(counted):
    model, graph, task = net()
    make(model, graph, pattern="2:4", budget=None, allocate="sensitivity", task=task)
    assert not counted


# --- a folder --------------------------------------------------------------------------------------


def test_curves_in_a_folder_are_not_measured_again(tmp_path, counted):
    model, graph, task = net()
    first = measure(model, graph, task=task, folder=tmp_path)
    passes = len(counted)
    assert passes == 1 + len(first) * len(PARTS)
    assert measure(model, graph, task=task, folder=tmp_path) == first
    assert len(counted) == passes
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["weights", "buffers", "criterion", "seed", "pattern", "data", "targets", "loss"])
def test_whatever_curves_depend_on_has_a_file_of_its_own(change, tmp_path, counted):
    class Other(Classification):
        pass

    model, graph, task = net()
    wishes = {"criterion": "random", "task": task, "folder": tmp_path}
    measure(model, graph, **wishes)
    (x, y), passes = task.calibration, len(counted)
    if change == "weights":
        model[0].bias.data += 1
    elif change == "buffers":
        model[1].running_mean += 1
    elif change == "criterion":
        wishes["criterion"] = "magnitude"
    elif change == "seed":
        wishes["seed"] = 1
    elif change == "pattern":
        wishes["pattern"] = "unstructured"
    else:
        other = {"data": (x + 1, y), "targets": (x, y.flip(0)), "loss": (x, y)}[change]
        kind = Other if change == "loss" else Classification
        wishes["task"] = kind(task.train, task.validation, task.test, other, batch_size=task.batch_size)
    measure(model, graph, **wishes)
    assert len(counted) > passes
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", "[1]", '[{"place": "0"}]', '[{"place": "0", "removed": [0.1], "rise": [1]}]']
)
def test_a_damaged_file_is_refused(text, tmp_path):
    model, graph, task = net()
    measure(model, graph, task=task, folder=tmp_path)
    next(tmp_path.iterdir()).write_text(text)
    with pytest.raises(DataError, match=r"damaged|remove it, and they are measured anew"):
        measure(model, graph, task=task, folder=tmp_path)


def test_a_folder_is_given_with_the_strategy(tmp_path, counted):
    model, graph, task = net()
    wishes = {"budget": "params=60%", "allocate": Sensitivity(folder=tmp_path), "task": task}
    one = make(model, graph, **wishes)
    passes = len(counted)
    assert not one.diff(make(model, graph, **wishes))
    assert len(counted) == passes


# --- the report ------------------------------------------------------------------------------------


def test_the_report_shows_the_curves_that_were_measured_once(tmp_path, counted):
    model, graph, task = net()
    result = sc.prune(model, graph, budget="macs=60%", allocate="sensitivity", task=task)
    curves = result.report.sensitivity
    assert {c.place for c in curves} == result.plan.units.keys()
    assert len(counted) == 1 + len(curves) * len(PARTS)
    assert Report.from_json(result.report.to_json()) == result.report
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    result.report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="sensitivity"' in page
    assert json.dumps(curves[0].rise[-1]) in page


def test_reports_of_before_there_were_curves_are_read():
    data = json.loads(Report("old", ()).to_json())
    del data["sensitivity"]
    assert Report.from_json(json.dumps(data)).sensitivity == ()


# --- mistakes --------------------------------------------------------------------------------------


def test_without_a_task_nothing_is_measured():
    model, graph, _ = net()
    with pytest.raises(DataError, match="sensitivity measures the loss, so give task="):
        make(model, graph, allocate="sensitivity")


def test_a_ladder_without_curves_or_of_other_places_is_refused():
    with pytest.raises(SpecError, match=r"'sensitivity' measures the model; use secateur.plan or secateur.prune"):
        Sensitivity()({"a": torch.zeros(3)})
    with pytest.raises(SpecError, match="no sensitivity curve of 'b'; measure it with the same pattern"):
        Sensitivity({"a": Curve("a", PARTS, (0.0,) * 5)})({"a": torch.zeros(3), "b": torch.zeros(3)})


@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_data_of_another_shape_are_refused(pattern):
    model, graph, _ = net()
    with pytest.raises(DataError, match=r"the model fails on calibration batch 0, \(float32\[1, 2, 8, 8\]\)"):
        measure(model, graph, pattern=pattern, task=task_of(torch.randn(1, 2, 8, 8)))


def test_a_loss_that_is_not_finite_is_refused():
    model, graph, task = net()
    task.calibration[0][3] = torch.nan
    with pytest.raises(DataError, match="the loss of the whole model on the calibration data is nan"):
        measure(model, graph, task=task)


def test_what_is_ignored_is_not_measured():
    model, graph, task = net()
    everything = measure(model, graph, task=task).keys()
    assert measure(model, graph, task=task, ignore="0").keys() == everything - {"0"}


def test_scores_say_which_units_go_first():
    """Curves of two criteria differ where their orders do."""
    model, graph, task = net()
    by_size, by_chance = (measure(model, graph, task=task, criterion=c) for c in ("magnitude", "random"))
    assert by_size != by_chance
    assert measure(model, graph, task=task, criterion=lambda w, s: score(model, graph)[s.name]) == by_size
