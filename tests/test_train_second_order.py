"""Second-order pruning: scores and updates against the formulas, written out in NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_nets import adam, backward, convnet, mlp, same, sgd, train

from secateur.errors import DataError, SpecError
from secateur.graph.types import Weight
from secateur.train import Gradual, SecondOrder, second_order
from secateur.train.second_order import in_blocks, jump, out_of_blocks
from secateur.train.stages import part

DAMPING = 1e-3


def layer(seed=1):
    """3 outputs of 7 inputs: with blocks of 4, each output has one of 4 and one of 3."""
    torch.manual_seed(seed)
    return nn.Linear(7, 3, bias=False)


def fixed(model):
    """The weights stay where they are, so that only the pruning moves them."""
    return torch.optim.SGD(model.parameters(), 0.0)


def run(model, pruner, optimizer, steps, grads=None, poison=()):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 7, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        weight = model.weight.detach().clone()
        if step in poison:
            model.weight.grad[0, 0] = float("nan")
        if grads is not None:
            grads.append(model.weight.grad.double().numpy().copy())
        optimizer.step()
        if step in poison:  # the optimizer took the NaN over
            with torch.no_grad():
                model.weight.copy_(weight)
        pruner.step()


def fishers(grads):
    """Per output its two blocks: columns, and the damped matrix."""
    for row in range(3):
        for columns in (slice(0, 4), slice(4, 7)):
            g = np.stack([grad[row, columns] for grad in grads])
            yield row, columns, DAMPING * np.eye(g.shape[1]) + g.T @ g / len(g)


def updated(weight, kept, grads):
    """dw = -F^-1[:, P] (F^-1[P, P])^-1 w_P, block by block."""
    new = weight.copy()
    for row, columns, fisher in fishers(grads):
        inverse, w, gone = np.linalg.inv(fisher), weight[row, columns], ~kept[row, columns]
        new[row, columns] -= inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w[gone])
    return new


@pytest.fixture
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(second_order, "BLOCK", 4)


def one_shot(pattern="unstructured", budget="sparsity=50%", **more):
    model = layer()
    before, grads, optimizer = model.weight.detach().double().numpy().copy(), [], fixed(model)
    common = {"schedule": [(9, budget)], "window": 5, "damping": DAMPING, "pattern": pattern, **more}
    pruner = SecondOrder(model, optimizer, budget, 10, **common)
    run(model, pruner, optimizer, range(9), grads)
    return model, pruner, before, grads[4:]


def test_single_weights_go_by_their_saliency_and_what_stays_makes_up_for_them(blocks_of_four):
    model, pruner, before, grads = one_shot()
    rho = np.empty((3, 7))
    for row, columns, fisher in fishers(grads):
        rho[row, columns] = before[row, columns] ** 2 / (2 * np.linalg.inv(fisher).diagonal())
    kept = pruner.mask("weight").numpy()
    assert kept.sum() == 10
    assert rho[kept].min() > rho[~kept].max()
    np.testing.assert_allclose(model.weight.detach(), updated(before, kept, grads), rtol=1e-4, atol=1e-6)
    assert (model.weight.detach().numpy()[~kept] == 0).all()
    assert np.abs(model.weight.detach().numpy() - before * kept).max() > 1e-2  # something was made up for


@pytest.mark.parametrize("pattern", ["block:1x2", "block:1x3", "block:3x1", "block:2x3"])
def test_blocks_go_by_the_loss_of_all_their_weights_together(blocks_of_four, pattern):
    model, pruner, before, grads = one_shot(pattern, "sparsity=40%")
    height, width = map(int, pattern.removeprefix("block:").split("x"))
    kept = pruner.mask("weight").numpy()
    rho = {}
    for row, columns, fisher in fishers(grads):
        inverse = np.linalg.inv(fisher)
        numbers = np.arange(columns.start, columns.stop)
        for block in np.unique(numbers // width):
            inside = numbers // width == block
            w = before[row, numbers[inside]]
            loss = w @ np.linalg.solve(inverse[np.ix_(inside, inside)], w) / 2
            rho[row // height, block] = rho.get((row // height, block), 0) + loss
    size = {key: kept[key[0] * height :, key[1] * width :][:height, :width].size for key in rho}
    stays = {key: bool(kept[key[0] * height, key[1] * width]) for key in rho}
    assert 0 < sum(stays.values()) < len(stays)
    means = {key: rho[key] / size[key] for key in rho}
    assert min(means[k] for k in rho if stays[k]) > max(means[k] for k in rho if not stays[k])
    np.testing.assert_allclose(model.weight.detach(), updated(before, kept, grads), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [1, 3])
def test_what_has_gone_before_stays_away_and_has_no_say(blocks_of_four, seed):
    model, grads = layer(seed), []
    optimizer = fixed(model)
    schedule = [(5, "sparsity=30%"), (9, "sparsity=60%")]
    pruner = SecondOrder(model, optimizer, "sparsity=60%", 9, schedule=schedule, window=4, damping=DAMPING)
    run(model, pruner, optimizer, range(5))
    first, between = pruner.mask("weight").numpy(), model.weight.detach().double().numpy().copy()
    run(model, pruner, optimizer, range(5, 9), grads)
    kept = pruner.mask("weight").numpy()
    assert kept.sum() == 8
    assert (first | ~kept).all()
    rho = np.empty((3, 7))
    for row, columns, fisher in fishers([g * first for g in grads]):
        rho[row, columns] = between[row, columns] ** 2 / (2 * np.linalg.inv(fisher).diagonal())
    assert rho[kept].min() > rho[first & ~kept].max()
    expected = updated(between, kept, [g * first for g in grads])
    np.testing.assert_allclose(model.weight.detach(), expected, rtol=1e-4, atol=1e-6)


def test_only_the_steps_of_the_window_are_gathered_and_only_finite_ones(blocks_of_four):
    def weight(poison, window):
        model = layer()
        optimizer = fixed(model)
        pruner = SecondOrder(model, optimizer, "sparsity=50%", 9, schedule=[(9, "sparsity=50%")], window=window)
        run(model, pruner, optimizer, range(4), poison=poison)
        assert bool(pruner.state["weight"]) == (window > 5 and not poison)
        run(model, pruner, optimizer, range(4, 9), poison=poison)
        assert not pruner.state["weight"]  # nothing is kept between windows
        return model.weight.detach()

    assert torch.equal(weight((), 5), weight((0, 1, 2, 3), 5))
    assert torch.equal(weight((0, 1, 2, 3), 9), weight((), 5))
    assert not torch.equal(weight((), 9), weight((), 5))


def test_an_update_without_any_finite_gradient_is_put_off(blocks_of_four):
    model = layer()
    optimizer = fixed(model)
    pruner = SecondOrder(model, optimizer, "sparsity=50%", 9, schedule=[(3, "sparsity=50%")], window=3)
    with pytest.warns(UserWarning, match="no gradient of 'weight' was seen yet"):
        run(model, pruner, optimizer, range(3), poison=range(3))
    assert not pruner.bits
    run(model, pruner, optimizer, range(3, 4))
    assert pruner.finish().masks["weight"].sum() == 10


def test_infinite_weights_put_the_update_off_and_nothing_has_changed(blocks_of_four):
    model = layer()
    optimizer = fixed(model)
    pruner = SecondOrder(model, optimizer, "sparsity=50%", 9, schedule=[(3, "sparsity=50%")], window=3)
    run(model, pruner, optimizer, range(2))
    with torch.no_grad():
        model.weight[1, 1] = float("inf")
    before = model.weight.detach().clone()
    with pytest.warns(UserWarning, match="scores of 'weight' are not finite"):
        run(model, pruner, optimizer, range(2, 3), poison=[2])
    assert torch.equal(model.weight, before)
    assert not pruner.bits


# --- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2", "2:4"])
def test_budgets_are_met_exactly_and_zeros_hold(pattern, make):
    model = mlp()
    optimizer = make(model)
    budget = None if pattern == "2:4" else "sparsity=75%"
    pruner = SecondOrder(model, optimizer, budget, 30, begin=6, every=5, window=4, pattern=pattern)

    def check(step):
        for name in pruner.bits:
            assert (model.get_parameter(name)[~pruner.mask(name)] == 0).all()

    assert train(model, optimizer, pruner, range(30), check) == [stage.step for stage in pruner.schedule]
    plan = pruner.finish()
    total = sum(m.numel() for m in plan.masks.values())
    assert sum(int(m.sum()) for m in plan.masks.values()) == total * (0.5 if pattern == "2:4" else 0.25)
    assert plan.meta["criterion"] == "second_order"
    assert plan.meta["method"] == "SecondOrder"


@pytest.mark.parametrize("stop", [8, 12, 17])  # in a window, after an update, in the last window
@pytest.mark.parametrize("net", [mlp, convnet])
def test_a_resumed_run_and_a_copy_go_on_bit_by_bit(net, stop):
    def made():
        model = net()
        optimizer = adam(model)
        return model, optimizer, SecondOrder(model, optimizer, "sparsity=70%", 24, begin=10, end=20, every=5, window=4)

    whole = made()
    train(*whole, range(24))
    half = made()
    train(*half, range(stop))
    copied = copy.deepcopy(half)
    saved = copy.deepcopy([part.state_dict() for part in half])
    resumed = made()
    for here, state in zip(resumed, saved, strict=True):
        here.load_state_dict(state)
    for found in (resumed, copied):
        train(*found, range(stop, 24))
        found[2].finish()
        assert same(found[0], whole[0])


# --- blocks, schedules, bad input ------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "out_dim"), [((5, 7), 0), ((6, 120), 0), ((4, 3, 5, 5), 0), ((6, 5, 2, 2), 1)])
def test_blocks_divide_the_inputs_of_each_output_evenly(shape, out_dim):
    tensor = torch.randn(shape)
    weight = Weight("w", shape, "module", out_dim, 1 - out_dim, 0)
    blocks = in_blocks(tensor, weight)
    outputs = shape[out_dim]
    inputs = tensor.numel() // outputs
    assert blocks.shape[0] == outputs
    assert blocks.shape[1] == -(-inputs // 50)
    assert inputs <= blocks.shape[1] * blocks.shape[2] < inputs + blocks.shape[1]
    assert torch.equal(blocks[2].flatten()[:inputs], tensor.movedim(out_dim, 0)[2].flatten())
    assert torch.equal(out_of_blocks(blocks, weight, shape), tensor)
    if out_dim == 0:  # what a process has of a weight split by rows has the same blocks
        rows = in_blocks(tensor[2:4], weight)
        assert torch.equal(rows, blocks[2:4])
        assert torch.equal(out_of_blocks(rows, weight, (2, *shape[1:])), tensor[2:4])


def test_the_first_update_jumps_and_the_rest_is_cubic():
    found = [(s.step, float(s.budget.value)) for s in jump(part("sparsity=90%"), 0.7, range(10, 31, 10))]
    assert found == [(10, 0.63), (20, pytest.approx(0.9 * (1 - 0.3 / 8))), (30, 0.9)]
    assert [float(s.budget.value) for s in jump(part("sparsity=90%"), 0.7, range(5, 6))] == [0.9]


def test_by_default_updates_are_the_papers_but_never_before_a_window():
    model = mlp()
    assert [s.step for s in SecondOrder(model, sgd(model), "sparsity=90%", 3000).schedule] == [*range(200, 2601, 400)]
    model = mlp()
    assert SecondOrder(model, sgd(model), "sparsity=90%", 300).schedule[0].step >= 64


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"criterion": "magnitude"}, "criterion of its own"),
        ({"first": 1.5}, r"found first=1\.5"),
        ({"window": 0}, "window=0"),
        ({"damping": 0.0}, r"damping=0\.0"),
        ({"pattern": "channel"}, "SecondOrder prunes unstructured weights, blocks and N:M"),
        ({"begin": 20, "end": 10}, "expected 0 <= begin <= end"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wish, match):
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(SpecError, match=match):
        SecondOrder(model, optimizer, "sparsity=50%", 30, **wish)
    assert not optimizer._optimizer_step_pre_hooks


def test_blocks_that_take_too_much_are_refused_and_the_optimizer_is_left_alone(monkeypatch):
    monkeypatch.setattr("secateur.stats.gradients.LARGEST", 1000)
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(DataError, match=r"Fisher matrix of 320 weights takes .* use Gradual with criterion='fisher'"):
        SecondOrder(model, optimizer, "sparsity=50%", 30)
    assert not optimizer._optimizer_step_pre_hooks
    backward(model, 0)
    optimizer.step()


def test_it_keeps_the_loss_lower_than_magnitude_where_inputs_depend_on_each_other():
    """Inputs come in pairs that are nearly the same, and in many sizes: what one does, its twin can do as well."""
    generator = torch.Generator().manual_seed(0)
    sizes, right = torch.linspace(0.5, 2, 20), torch.randn(3, 20, generator=generator)

    def data(count):
        x = torch.randn(count, 10, generator=generator).repeat_interleave(2, 1)
        x = (x + 0.1 * torch.randn(count, 20, generator=generator)) * sizes
        return x, x @ right.T

    def loss(make):
        generator.manual_seed(1)
        model = nn.Linear(20, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(right)
        optimizer = fixed(model)
        pruner = make(model, optimizer)
        for _ in range(100):
            x, y = data(32)
            optimizer.zero_grad()
            F.mse_loss(model(x), y + torch.randn(32, 3, generator=generator)).backward()
            optimizer.step()
            pruner.step()
        x, y = data(1000)
        return F.mse_loss(model(x), y).item()

    schedule = [(100, "sparsity=40%")]
    second = loss(lambda m, o: SecondOrder(m, o, "sparsity=40%", 100, schedule=schedule, window=64))
    magnitude = loss(lambda m, o: Gradual(m, o, "sparsity=40%", 100, schedule=schedule))
    assert 0 < second < 0.5 * magnitude
