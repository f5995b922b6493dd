"""The whole road in one call: stages, budgets by measuring, in place, and failures that change nothing."""

import copy

import pytest
import torch
from torch import nn

from nets import build
from secateur import api
from secateur.errors import BudgetError, DataError, PlanError, PruneError, SpecError, TraceError
from secateur.tasks import Classification


def task(n=48, batch=16):
    """Two classes that a small network learns in one pass: bright and dark images."""
    y = torch.arange(n) % 2
    x = torch.randn(n, 3, 8, 8) + 3.0 * (2 * y - 1).view(-1, 1, 1, 1)
    split = (x, y)
    return Classification(split, split, split, batch_size=batch)


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_stage_is_measured():
    model, x = build("plain")
    before = copy.deepcopy(model.state_dict())
    result = api.prune(model, x, budget="macs=50%", task=task(), epochs=1, lr=0.05)
    rows = result.report.rows
    assert [r.stage for r in rows] == ["dense", "pruned", "recalibrated", "recovered"]
    dense, last = rows[0], rows[-1]
    assert last.macs <= dense.macs / 2
    assert last.params == sum(p.numel() for p in result.model.parameters()) < dense.params
    assert last.bytes < dense.bytes
    assert last.memory < dense.memory
    assert last.accuracy.low <= last.accuracy.value <= last.accuracy.high
    assert last.drop is not None
    assert dense.drop is None
    assert result.report.law.error <= result.report.law.tolerance
    assert result.report.meta["form"] == "module"
    assert {f.axis for f in result.report.frozen} == {"0 inputs", "5.2"}
    assert {layer.name: layer.after for layer in result.report.layers}["3.weight"][1] == int(
        result.plan.units["0"].sum()
    )
    assert unchanged(model, before)


def test_masked_weights_stay_zero_through_recovery_and_the_report_says_what_zeros_are_worth():
    model, x = build("plain")
    result = api.prune(model, x, pattern="unstructured", budget="sparsity=80%", task=task(), epochs=1)
    for name, keep in result.plan.masks.items():
        assert bool((result.model.get_parameter(name)[~keep] == 0).all())
    assert result.report.rows[-1].nonzero < 0.4 * result.report.rows[-1].params
    (note,) = [note for note in result.report.notes if "same time and bytes" in note]
    assert "secateur prune --packed" in note
    assert "secateur bench FOLDER --target cpu-sparse" in note
    assert result.report.law is None


def test_what_a_pattern_leaves_dense_is_noted():
    model, x = build("plain")
    result = api.prune(model, x, pattern="2:4", budget=None)
    assert any(note.startswith("0.weight stays dense: it has 3 inputs") for note in result.report.notes)


def test_the_same_seed_gives_the_same_weights():
    model, x = build("plain")
    data = task()
    one, two = (api.prune(model, x, budget="macs=50%", task=data, epochs=1, seed=5).model for _ in range(2))
    assert unchanged(one, two.state_dict())


@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_in_place(pattern):
    model, x = build("plain")
    result = api.prune(model, x, pattern=pattern, budget="sparsity=50%", task=task(), epochs=1, inplace=True)
    assert result.model is model
    assert model(x).shape == (2, 5)
    kept = sum(
        int(p.count_nonzero()) for n, p in model.named_parameters() if n in ("0.weight", "3.weight", "5.2.weight")
    )
    assert kept <= 0.5 * (8 * 27 + 12 * 72 + 60)


def test_in_place_is_refused_where_only_the_program_fits():
    model, x = build("option_a_shortcut")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="use inplace=False"):
        api.prune(model, x, budget="params=60%", inplace=True)
    assert unchanged(model, before)


def wide():
    return nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 8))


def test_latency_is_met_by_measuring(monkeypatch):
    """The clock is replaced by a count of multiply-adds, so that the outcome does not depend on the machine."""

    def fake(models, inputs, seconds=0.0):
        from secateur.graph import analyze
        from secateur.measure import Latency

        return {n: Latency((float(analyze(m, inputs).cost().macs) / 1e6,) * 10, 1) for n, m in models.items()}

    monkeypatch.setattr("secateur.road.latency", fake)
    model, x = wide(), torch.randn(4, 256)
    dense = fake({"m": model}, x)["m"].spread.value
    for budget, limit in (("latency=50%", dense / 2), ("latency=5ms", 5.0)):
        result = api.prune(model, x, budget=budget)
        found = fake({"m": result.model}, x)["m"].spread.value
        assert 0.85 * limit <= found <= limit
        assert result.plan.budget == budget
    with pytest.raises(BudgetError, match=r"latency=0\.00001ms cannot be met on this machine: at the fewest units"):
        api.prune(model, x, budget="latency=0.00001ms")


def test_latency_on_the_real_clock():
    model, x = wide(), torch.randn(32, 256)
    result = api.prune(model, x, budget="latency=70%", allocate="uniform")
    assert result.report.rows[-1].macs < result.report.rows[0].macs


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        ({"pattern": "chanel"}, SpecError, "pattern 'chanel' is unknown"),
        ({"budget": "macs"}, SpecError, "cannot be read"),
        ({"criterion": "best"}, SpecError, "criterion 'best' is unknown"),
        ({"allocate": "best"}, SpecError, "allocation 'best' is unknown"),
        ({"budget": None}, SpecError, "needs a budget"),
        ({"budget": "max_drop=1%"}, SpecError, "needs task="),
        ({"epochs": 2}, SpecError, "needs task="),
        ({"budget": "params=0.1%"}, BudgetError, "nearest possible is"),
        ({"criterion": "taylor"}, DataError, "give task="),
        ({"ignore": ("nothing*",)}, SpecError, "matches nothing"),
    ],
)
def test_a_users_mistake_is_one_clear_error_and_changes_nothing(wishes, error, message):
    model, x = build("plain")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        api.prune(model, x, **wishes)
    assert unchanged(model, before)
    assert not model.training


def test_wrong_types_and_inputs():
    model, x = build("plain")
    with pytest.raises(TraceError, match="expected a torch"):
        api.prune("resnet18", x)
    with pytest.raises(TraceError, match="pass inputs on which"):
        api.prune(model, x[:, :2])
    with pytest.raises(SpecError, match="found int"):
        api.prune(model, x, pattern=4)


def test_nan_weights():
    model, x = build("plain")
    model[3].weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"864 of 864 values of weight '3\.weight' are NaN"):
        api.prune(model, x)


def test_a_failure_in_recovery_leaves_the_model_alone():
    model, x = build("plain")
    before, broken = copy.deepcopy(model.state_dict()), task()
    broken.train[0].fill_(float("nan"))
    with pytest.raises(PruneError, match=r"NaN|nan"):
        api.prune(model, x, task=broken, epochs=1, inplace=True)
    assert unchanged(model, before)


def test_export_refuses_unknown_targets(tmp_path):
    model, x = build("plain")
    with pytest.raises(SpecError, match="target 'coreml' is unknown; expected 'onnx'"):
        api.export(model, x, "coreml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rewritten_program_exports(tmp_path):
    model, x = build("option_a_shortcut")
    result = api.prune(model, x, budget="params=60%")
    assert result.form == "program"
    assert api.export(result.model, x, "onnx", tmp_path).is_file()
