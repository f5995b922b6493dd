"""Gradual pruning: how much is gone when, and learning rates that follow."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from train_nets import adam, backward, convnet, mlp, same, sgd, train

import secateur as sc
from secateur import allocate
from secateur.errors import BudgetError, PlanError, SpecError
from secateur.train import ACDC, Gradual, rewinding

STEPS = 40


def test_sparsity_follows_the_cubic_curve_to_the_weight():
    model = mlp()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, "sparsity=75%", STEPS, begin=4, end=20, every=4)
    seen = {}

    def check(step):
        seen[step + 1] = round(pruner.sparsity * 320)

    assert train(model, optimizer, pruner, range(STEPS), check) == [4, 8, 12, 16, 20]
    # 240 of 320 weights, of which after update i of 5 a part of 1 - (1 - i / 5)^3 is gone.
    curve = {4: 240 * 0.488, 8: 240 * 0.784, 12: 240 * 0.936, 16: 240 * 0.992, 20: 240}
    for step, gone in curve.items():
        assert seen[step] == pytest.approx(gone, abs=1)
        assert seen[step + 3] == seen[step]
    assert seen[3] == 0
    assert seen[20] == seen[40] == 240


def test_the_smallest_weights_of_all_go():
    model = mlp()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, "sparsity=75%", STEPS, begin=5, end=5)
    train(model, optimizer, pruner, range(4))
    optimizer.zero_grad()
    backward(model, 4)
    optimizer.step()
    names = list(pruner.weights)
    scores = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in names])
    assert pruner.step()
    kept = torch.cat([pruner.mask(name).flatten() for name in names])
    assert torch.equal(kept, allocate.best(scores, 80))


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(
    ("pattern", "budget"),
    [("unstructured", "sparsity=75%"), ("unstructured", "params=40%"), ("block:4x2", "sparsity=75%"), ("2:4", None)],
)
def test_what_has_gone_stays_zero_and_never_comes_back(pattern, budget, optimizer):
    model = mlp()
    optimizer = optimizer(model)
    pruner = Gradual(model, optimizer, budget, STEPS, every=3, pattern=pattern)
    gone = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in pruner.weights}

    def check(step):
        for name in pruner.bits:
            now = ~pruner.mask(name)
            assert (now | ~gone[name]).all()
            gone[name] = now
            assert (model.get_parameter(name)[now] == 0).all()

    train(model, optimizer, pruner, range(STEPS), check)
    plan = pruner.finish()
    kept = sum(int((model.get_parameter(name) != 0).sum()) for name in pruner.weights)
    if budget == "params=40%":
        assert kept + 24 == int(0.4 * (320 + 24))  # the biases stay
    else:
        assert kept == {"sparsity=75%": 80, None: 160}[budget]
    assert all(torch.equal(plan.keep(name), model.get_parameter(name) != 0) for name in pruner.weights)
    if pattern == "2:4":
        assert all((plan.keep(name).view(-1, 4).sum(1) == 2).all() for name in pruner.weights)


def test_n_of_m_loses_one_of_every_m_at_a_time():
    model = mlp()
    optimizer = sgd(model)
    schedule = [(5, "sparsity=25%"), (10, "sparsity=50%"), (15, "sparsity=75%")]
    pruner = Gradual(model, optimizer, None, STEPS, pattern="1:4", schedule=schedule)
    kept = []
    train(model, optimizer, pruner, range(STEPS), lambda _: kept.append(pruner.sparsity))
    assert [kept[i] for i in (3, 4, 9, 14, 39)] == [0, 0.25, 0.5, 0.75, 0.75]


def test_channels_go_a_few_at_a_time_and_shrink_for_good_at_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 7)
    )
    inputs = torch.randn(2, 3, 6, 6)
    graph = sc.analyze(model, inputs)
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, "params=50%", STEPS, pattern="channel", graph=graph, every=3)
    left = []
    train(model, optimizer, pruner, range(STEPS), lambda _: left.append(int(model[0].weight.flatten(1).any(1).sum())))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2
    plan = pruner.finish()
    small = sc.shrink(model, plan)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters()) / 2
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_schedules_of_ones_own_may_go_down_and_up():
    model = mlp()
    optimizer = sgd(model)
    schedule = ((step, text) for step, text in [(2, "sparsity=50%"), (6, None), (9, "sparsity=80%")])
    pruner = Gradual(model, optimizer, "sparsity=80%", 12, schedule=schedule)
    seen = []
    assert train(model, optimizer, pruner, range(12), lambda _: seen.append(pruner.sparsity)) == [2, 6, 9]
    assert seen == [0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0.8, 0.8, 0.8, 0.8]


@pytest.mark.parametrize(("budget", "end"), [("80%", 780), ("90%", 600), ("95%", 530), ("99%", 530), ("50%", 780)])
def test_by_default_it_begins_late_and_ends_earlier_the_more_goes(budget, end):
    model = mlp()
    pruner = Gradual(model, sgd(model), f"sparsity={budget}", 1000)
    at = [stage.step for stage in pruner.schedule]
    assert 250 <= at[0] < 265
    assert at[-1] == end
    assert {b - a for a, b in pairwise(at)} == {15}


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("stop", [3, 17, 39])
def test_training_resumes_to_the_bit_and_a_copy_trains_on_alike(make, stop):
    model = make()
    optimizer = adam(model)
    pruner = Gradual(model, optimizer, "sparsity=80%", STEPS, every=4)
    train(model, optimizer, pruner, range(stop))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), pruner.state_dict()])
    twin = copy.deepcopy((model, optimizer, pruner))
    train(model, optimizer, pruner, range(stop, STEPS))

    other = make(seed=1)
    again = adam(other)
    resumed = Gradual(other, again, "sparsity=80%", STEPS, every=4)
    for part, state in zip((other, again, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(other, again, resumed, range(stop, STEPS))
    train(*twin, range(stop, STEPS))
    assert same(model, other)
    assert same(model, twin[0])
    assert resumed.finish().allocation == pruner.finish().allocation


def test_training_that_ends_before_its_schedule_is_not_dense_in_silence():
    model = mlp()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, "sparsity=80%", STEPS, begin=0, end=30, every=10)
    train(model, optimizer, pruner, range(29))
    with pytest.raises(PlanError, match="29 steps were applied, and the budget sparsity=80% is reached at step 30"):
        pruner.finish()
    train(model, optimizer, pruner, [29])
    assert sum(pruner.finish().allocation.kept.values()) == 64


WRONG = {
    "steps": ({"steps": 0}, "steps is 0"),
    "ends before it begins": ({"begin": 20, "end": 10}, "from step 20 to 10 of 40"),
    "ends after training": ({"end": 41}, "to 41 of 40"),
    "never": ({"every": 0}, "every 0 steps"),
    "an order of steps": ({"schedule": [(5, "sparsity=80%"), (3, "sparsity=80%")]}, "in ascending order"),
    "another end": ({"schedule": [(5, "sparsity=70%")]}, "the last one with sparsity=80%"),
    "nothing": ({"schedule": []}, "at least one"),
    "no part": ({"schedule": [(5, "latency=5ms"), (6, "sparsity=80%")]}, "no way to it in steps"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_schedules_that_cannot_be_are_said_to_be(wrong):
    given, message = WRONG[wrong]
    model = mlp()
    with pytest.raises(SpecError, match=message):
        Gradual(model, sgd(model), "sparsity=80%", **{"steps": STEPS, **given})


def test_budgets_that_cannot_be_are_said_to_be():
    model = mlp()
    with pytest.raises(SpecError, match="needs a budget"):
        Gradual(model, sgd(model), steps=STEPS)
    with pytest.raises(BudgetError, match="leave the budget out"):
        Gradual(model, sgd(model), "sparsity=80%", STEPS, pattern="2:4")


# --- learning rates --------------------------------------------------------------------------------


def rates(optimizer, schedule, steps):
    """The rate that each step is taken with."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_learning_rate_starts_anew_at_every_change_of_masks():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    pruner = Gradual(
        model, optimizer, "sparsity=80%", 20, schedule=[(4, "sparsity=50%"), (8, "sparsity=70%"), (12, "sparsity=80%")]
    )
    seen = rates(optimizer, rewinding(optimizer, pruner, floor=0.2), 22)
    cycle = [2, 1.6, 1.2, 0.8]
    last = [2, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6]
    assert seen == pytest.approx([*cycle, *cycle, *cycle, *last, 0.4, 0.4])


def test_a_schedule_from_the_first_step_to_the_last_has_no_empty_cycles():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    pruner = Gradual(model, optimizer, "sparsity=80%", 4, schedule=[(0, "sparsity=50%"), (4, "sparsity=80%")])
    assert rates(optimizer, rewinding(optimizer, pruner, floor=0), 5) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_rates_of_dense_and_sparse_phases_resume_where_they_were():
    def run():
        model = mlp()
        optimizer = sgd(model)
        pruner = ACDC(model, optimizer, "sparsity=80%", STEPS)
        return optimizer, rewinding(optimizer, pruner)

    optimizer, schedule = run()
    whole = rates(optimizer, schedule, STEPS)
    optimizer, schedule = run()
    first = rates(optimizer, schedule, 9)
    again, resumed = run()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert first + rates(again, resumed, STEPS - 9) == whole
    assert [i for i, rate in enumerate(whole) if rate == 0.1] == [0, *range(4, 31, 2), 34]


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_floor_above_the_rate_is_none(floor):
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(SpecError, match="expected a part of the learning rate"):
        rewinding(optimizer, Gradual(model, optimizer, "sparsity=80%", STEPS), floor)
