"""Criteria and the statistics they ask for."""

import numpy as np
import pytest
import torch
from torch import nn

import secateur.depth
import secateur.planning
from nets import build
from secateur.criteria import BUILT_IN, in_loss_units, needs, resolve, score, units_of
from secateur.errors import DataError, SpecError
from secateur.graph import analyze
from secateur.patterns import parse
from secateur.planning import make
from secateur.tasks import Classification
from secateur.testing import check_criterion


def task(inputs, classes=5, n=12):
    x = inputs[:1].expand(n, *inputs.shape[1:]) + 0.1 * torch.randn(n, *inputs.shape[1:])
    split = (x, torch.arange(n) % classes)
    return Classification(split, split, split, batch_size=4)


@pytest.mark.parametrize("criterion", BUILT_IN)
@pytest.mark.parametrize("net", ["plain", "residual", "grouped"])
def test_every_criterion_works_with_every_pattern(criterion, net):
    model, inputs = build(net)
    check_criterion(criterion, model, inputs, task(inputs))


def test_one_of_your_own_in_six_lines():
    @needs("grad_abs")
    def mine(weight, stats):
        return weight.abs().sqrt() * stats["grad_abs"]

    model, inputs = build("plain")
    check_criterion(mine, model, inputs, task(inputs))


def losses(first, second):
    """A criterion in units of the loss for "plain": what a unit of axis 0, and of axis 3, sums up to."""

    @in_loss_units
    def criterion(weight, stats):
        sums = {"0.weight": first / weight[0].numel(), "5.2.weight": second / len(weight)}
        return torch.full_like(weight, sums.get(stats.name, 0.0))

    return criterion


def test_losses_are_summed_over_what_goes_with_a_unit():
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    units = units_of(model, graph, parse("channel"), losses(2.0, 3.0), None, set(), 0)
    torch.testing.assert_close(units["0"], torch.full((8,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(units["3"], torch.full((12,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("budget", ["macs=70%", "params=70%", "size=70%"])
def test_losses_compete_by_what_their_units_save(budget):
    """Where one axis's units lose less for what they save, all that go are its; as shares of a mean all are equal."""
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    measure = {"m": lambda c: c.macs, "p": lambda c: c.params, "s": lambda c: c.bytes}[budget[0]]
    saves = {
        name: measure(graph.cost()) - measure(graph.cost({name: np.arange(graph.axis(name).units) > 0}))
        for name in ("0", "3")
    }
    assert saves["0"] != saves["3"]
    for cheap, dear in (("0", "3"), ("3", "0")):
        by_axis = {cheap: 0.9 * saves[cheap], dear: 1.1 * saves[dear]}
        kept = make(model, graph, budget=budget, criterion=losses(by_axis["0"], by_axis["3"])).allocation.kept
        assert kept[dear] == graph.axis(dear).units or kept[cheap] == 1
        assert kept[cheap] < graph.axis(cheap).units


def test_blocks_and_channels_together_keep_the_unit_of_their_scores(monkeypatch):
    asked = []
    original = secateur.planning._per_cost
    monkeypatch.setattr(secateur.planning, "_per_cost", lambda *a: asked.append(1) or original(*a))
    model, inputs = build("residual")
    graph, data = analyze(model, inputs), task(inputs, 4)
    secateur.depth.make(model, graph, pattern="channel+layer", budget="macs=70%", criterion="fisher", task=data)
    assert asked
    asked.clear()
    secateur.depth.make(model, graph, pattern="channel+layer", budget="macs=70%", criterion="magnitude", task=data)
    assert not asked


def test_what_was_not_declared_is_not_collected():
    model, inputs = build("plain")
    with pytest.raises(DataError, match=r"'grad_abs' was not collected; declare it: @needs\('grad_abs'\)"):
        score(model, analyze(model, inputs), lambda w, stats: w * stats["grad_abs"])


def test_gradients_need_data():
    model, inputs = build("plain")
    with pytest.raises(DataError, match="give task="):
        score(model, analyze(model, inputs), "taylor")


def test_taylor_is_the_weight_times_the_mean_gradient():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 4)
    y = torch.arange(8) % 3
    t = Classification((x, y), (x, y), (x, y), calibration=(x, y), batch_size=4)
    found = score(model, analyze(model, x), "taylor", t)["0.weight"]
    grads = []
    for i in (0, 4):
        loss = nn.functional.cross_entropy(model(x[i : i + 4]), y[i : i + 4])
        grads.append(torch.autograd.grad(loss, model[0].weight)[0].abs())
    assert torch.allclose(found, model[0].weight.abs() * torch.stack(grads).mean(0))


def test_collecting_leaves_gradients_modes_and_flags_alone():
    model, inputs = build("plain")
    model.train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    score(model, analyze(model, inputs), "taylor", task(inputs))
    assert model.training
    assert not model[0].weight.requires_grad
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[0].weight.grad is None


class Lossy(Classification):
    """A task with the loss given."""

    def loss(self, output, target):
        return self.bad(output)


@pytest.mark.parametrize(
    "bad", [lambda o: o.mean() / 0, lambda o: o.sum(1), lambda o: torch.ones(()), lambda o: o.detach().mean()]
)
def test_a_loss_that_tells_nothing_is_refused(bad, monkeypatch):
    model, inputs = build("plain")
    model.train()
    data = (inputs, torch.zeros(len(inputs), dtype=torch.long))
    monkeypatch.setattr(Lossy, "bad", staticmethod(bad), raising=False)
    with pytest.raises(DataError, match=r"the loss on calibration batch 0 is .*; expected one finite number"):
        score(model, analyze(model, inputs), "taylor", Lossy(data, data, data))
    assert model.training


def test_a_batch_norm_over_another_dimension_is_none_of_the_outputs():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(32, 3)), torch.randn(2, 4, 6)
    found = score(model, analyze(model, x), "bn_scale")["0.weight"]
    assert torch.allclose(found, torch.ones(8, 6), rtol=2e-3)


def test_batch_norm_scale_orders_outputs_by_gamma():
    model, inputs = build("plain")
    found = score(model, analyze(model, inputs), "bn_scale")["0.weight"]
    rows = found.flatten(1).mean(1)
    assert torch.equal(rows.argsort(), model[1].weight.abs().argsort())


def test_random_depends_on_the_seed_and_the_name_only():
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    a, b, c = (score(model, graph, "random", seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    model[3].weight.data[0, 0, 0, :2] = bad
    with pytest.raises(DataError, match=r"2 of 864 values of weight '3.weight' are NaN or infinite; repair or retrain"):
        score(model, graph)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda w, s: w.sum(0), r"gave \[3, 3, 3\] for '0.weight', expected \[8, 3, 3, 3\]"),
        (lambda w, s: 1.0, "gave float for '0.weight'"),
        (lambda w, s: w.log(), "the scores of '0.weight'"),
        (lambda w, s: w > 0, "gave torch.bool for '0.weight', expected floating point"),
    ],
)
def test_bad_scores_are_named(criterion, message):
    model, inputs = build("plain")
    with pytest.raises(DataError, match=message):
        score(model, analyze(model, inputs), criterion)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magnitud", "is unknown; there are magnitude, l2, random, bn_scale, fpgm, lamp, taylor"),
        ("nowhere:f", "nowhere"),
        ("math:pi", "math has no function 'pi'"),
        (3, "found int"),
    ],
)
def test_unknown_criteria(name, message):
    with pytest.raises(SpecError, match=message):
        resolve(name)
