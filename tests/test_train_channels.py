"""Channels that go inside a training: penalties against autograd and by hand, laws, and ``shrink_``."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_nets import adam, mlp, same, sgd
from train_nets import train as train_flat

from secateur.errors import DataError, PlanError, SpecError
from secateur.graph import analyze
from secateur.plan import Plan
from secateur.recipe import load_callable
from secateur.train import Gradual, GroupLasso, GrowingReg, Proximal, Slimming, shrink_, shrinking

STEPS = 16
INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = {
    "lasso": lambda *given, **more: GroupLasso(*given, "macs=30%", STEPS, **more),
    "growing": lambda *given, **more: GrowingReg(*given, "macs=30%", STEPS, **{"begin": 2, "every": 1, **more}),
    "slimming": lambda *given, **more: Slimming(*given, "macs=30%", STEPS, **more),
    "proximal": lambda *given, **more: Proximal(*given, "macs=30%", STEPS, pattern="channel", **more),
}


class Residual(nn.Module):
    """Two axes: that of the sum, 6 units, whose maps of 4 x 4 a linear layer reads; and one inside, 10 units."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.norm1 = nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.b, self.norm2 = nn.Conv2d(10, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        x = x + self.norm2(self.b(F.relu(self.norm1(self.a(x)))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def units(net):
    """All weights of each unit, by axis, written down by hand."""
    outer = (net.stem.weight, net.stem.bias, net.norm0.weight, net.norm0.bias, net.b.weight, net.norm2.weight)
    outer = [*outer, net.norm2.bias, net.a.weight.transpose(0, 1), net.head.weight.view(5, 6, 16).transpose(0, 1)]
    inner = (net.a.weight, net.norm1.weight, net.norm1.bias, net.b.weight.transpose(0, 1))
    return [torch.cat([t.reshape(len(t), -1) for t in axis], 1) for axis in (outer, inner)]


def residual(seed=0):
    torch.manual_seed(seed)
    net = Residual()
    for norm in (net.norm0, net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return F.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))


def train(model, optimizer, pruner, steps, check=None, average=None):
    changed = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        if pruner is not None and pruner.step():
            changed.append(step + 1)
        if check is not None:
            check()
    return changed


def train_by_hand(model, optimizer, steps, penalty=lambda net, step: 0.0, after=lambda net: None):
    """Ordinary training of the loss plus a penalty."""
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) + penalty(model, step)).backward()
        optimizer.step()
        with torch.no_grad():
            after(model)


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05)


@functools.cache
def graph_of(kind):
    """What analysis finds; it does not depend on values."""
    return analyze(kind(), INPUTS)


def made(method, optimizer=sgd, **more):
    model = residual()
    trainer = optimizer(model)
    return model, trainer, METHODS[method](model, trainer, graph=graph_of(residual), **more)


def close(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- penalties -------------------------------------------------------------------------------------


def test_group_lasso_adds_the_gradient_of_its_penalty():
    model, optimizer, pruner = made("lasso", plain_sgd, strength=0.01)
    other = residual()
    train(model, optimizer, pruner, range(6))

    def penalty(net, step):
        return 0.01 * sum(w.shape[1] ** 0.5 * w.norm(dim=1).sum() for w in units(net))

    train_by_hand(other, plain_sgd(other), range(6), penalty)
    close(model, other)


def test_group_lasso_leaves_a_unit_that_is_zero_alone():
    model, optimizer, pruner = made("lasso", plain_sgd, strength=0.01)
    with torch.no_grad():
        for tensor in (model.a.weight[3], model.norm1.weight[3], model.norm1.bias[3], model.b.weight[:, 3]):
            tensor.zero_()
    train(model, optimizer, pruner, range(3))
    assert all(p.isfinite().all() for p in model.parameters())
    assert (units(model)[1][3] == 0).all()


def test_penalties_end_where_units_go():
    model, optimizer, pruner = made("lasso", plain_sgd, strength=0.01, end=4)
    train(model, optimizer, pruner, range(4))
    assert pruner.bits
    other, masks = copy.deepcopy(model), {name: pruner.mask(name) for name in pruner.bits}
    train(model, optimizer, pruner, range(4, 8))

    def hold(net):
        for name, tensor in net.state_dict().items():
            if name in masks:
                tensor.masked_fill_(~masks[name], 0)

    train_by_hand(other, plain_sgd(other), range(4, 8), after=hold)
    close(model, other)


def test_growing_regularization_draws_the_chosen_units_ever_more():
    model, optimizer, pruner = made("growing", plain_sgd, begin=2, end=10, every=2, delta=0.1, ceiling=0.25)
    assert train(model, optimizer, pruner, range(2)) == [2]
    assert not pruner.bits  # chosen, and not masked
    kept = sorted(pruner.wish.kept.units.values(), key=len)
    going = [~flags for flags in kept]
    assert all(flags.any() for flags in going)
    other, seen = copy.deepcopy(model), []
    for step in range(2, 9):
        seen.append(round(pruner.penalty(), 6))
        train(model, optimizer, pruner, [step])
    assert seen == [0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25]

    def penalty(net, step):
        return seen[step - 2] / 2 * sum(w[gone].square().sum() for w, gone in zip(units(net), going, strict=True))

    train_by_hand(other, plain_sgd(other), range(2, 9), penalty)
    close(model, other)
    train(model, optimizer, pruner, range(9, 10))
    assert sorted(map(len, pruner.wish.kept.units.values())) == [6, 10]
    for now, gone in zip(units(model), going, strict=True):
        assert torch.equal((now == 0).all(1), gone)


def test_growing_regularization_reaches_its_ceiling_after_five_ninths():
    model, optimizer, pruner = made("growing", begin=0, end=9, every=1, ceiling=1.0)
    found = []
    for step in range(9):
        train(model, optimizer, pruner, [step])
        found.append(round(pruner.penalty(), 6))
    assert found[:5] == [0.4, 0.6, 0.8, 1.0, 1.0]  # chosen after the first step, which step 0 comes down to


def test_growing_regularization_may_grow_on_everything_before_the_choice():
    model, optimizer, pruner = made("growing", plain_sgd, begin=4, end=8, every=2, everything=0.2)
    other, seen = residual(), []
    for step in range(3):
        seen.append(round(pruner.penalty(), 6))
        train(model, optimizer, pruner, [step])
    assert seen == [0.1, 0.1, 0.2]
    train_by_hand(other, plain_sgd(other), range(3), lambda n, s: seen[s] / 2 * sum(w.square().sum() for w in units(n)))
    close(model, other)


def test_slimming_draws_batch_norm_scales_and_nothing_else():
    model, optimizer, pruner = made("slimming", plain_sgd, strength=0.01)
    other = residual()
    train(model, optimizer, pruner, range(6))
    train_by_hand(
        other,
        plain_sgd(other),
        range(6),
        lambda n, step: 0.01 * sum(norm.weight.abs().sum() for norm in (n.norm0, n.norm1, n.norm2)),
    )
    close(model, other)


def test_slimming_removes_the_smallest_scales():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = Slimming(model, optimizer, "params=50%", 2, graph=analyze(model, INPUTS))
    order = model[1].weight.detach().argsort()
    train(model, optimizer, pruner, range(2))
    gone = (model[1].weight == 0).nonzero()[:, 0]
    assert set(gone.tolist()) == set(order[: len(gone)].tolist())
    assert 0 < len(gone) < 8
    assert pruner.finish().meta["criterion"] == "bn_scale"


def test_the_proximal_map_of_channels_is_taken_after_the_step_with_each_groups_rate():
    model = residual()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "norm" not in n], "lr": 0.1},
        {"params": [p for n, p in model.named_parameters() if "norm" in n], "lr": 0.02},
    ]
    optimizer, other = torch.optim.SGD(groups), residual()
    wish = {"pattern": "channel", "graph": graph_of(residual)}
    pruner = Proximal(model, optimizer, "macs=50%", STEPS, strength=0.3, **wish)
    train(model, optimizer, pruner, [0])
    again = torch.optim.SGD(
        [
            {"params": [p for n, p in other.named_parameters() if "norm" not in n], "lr": 0.1},
            {"params": [p for n, p in other.named_parameters() if "norm" in n], "lr": 0.02},
        ]
    )
    train_by_hand(other, again, [0])
    with torch.no_grad():
        pulls = [w.shape[1] ** 0.5 / w.norm(dim=1) for w in units(other)]
        for name, p in other.named_parameters():
            rate = 0.3 * (0.02 if "norm" in name else 0.1)
            outer, inner = ((1 - rate * pull).clamp_min(0) for pull in pulls)
            if name in ("stem.weight", "b.weight"):
                p.mul_(outer.view(-1, 1, 1, 1))
            if name == "a.weight":
                p.mul_(outer.view(1, -1, 1, 1)).mul_(inner.view(-1, 1, 1, 1))
            if name == "b.weight":
                p.mul_(inner.view(1, -1, 1, 1))
            if name == "head.weight":
                p.mul_(outer.repeat_interleave(16))
            if name == "stem.bias" or name.startswith(("norm0", "norm2")):
                p.mul_(outer)
            if name.startswith("norm1"):
                p.mul_(inner)
    close(model, other)


def test_the_proximal_map_of_single_weights_is_soft_thresholding():
    model, other = residual(), residual()
    optimizer = plain_sgd(model)
    pruner = Proximal(model, optimizer, "sparsity=90%", STEPS, strength=0.4)
    train(model, optimizer, pruner, range(2))

    def after(net):
        for module in (net.stem, net.a, net.b, net.head):
            w = module.weight
            w.copy_(w.sign() * (w.abs() - 0.05 * 0.4).clamp_min(0))

    train_by_hand(other, plain_sgd(other), range(2), after=after)
    close(model, other)
    assert (model.head.weight == 0).any()
    assert not (model.head.weight == 0).all()


def test_the_proximal_map_of_blocks_shrinks_their_norms():
    model, other = residual(), residual()
    optimizer = plain_sgd(model)
    pruner = Proximal(model, optimizer, "sparsity=50%", STEPS, strength=0.4, pattern="block:2x3")
    train(model, optimizer, pruner, range(1))

    def after(net):
        for module in (net.stem, net.a, net.b, net.head):
            rows = module.weight.view(len(module.weight), -1)
            for r in range(0, rows.shape[0], 2):
                for c in range(0, rows.shape[1], 3):
                    block = rows[r : r + 2, c : c + 3]  # the head's last row is alone
                    block.mul_((1 - 0.05 * 0.4 * block.numel() ** 0.5 / block.norm()).clamp_min(0))

    train_by_hand(other, plain_sgd(other), range(1), after=after)
    close(model, other)


def test_a_step_that_a_gradient_scaler_leaves_out_shrinks_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    pruner = Proximal(model, optimizer, "sparsity=50%", STEPS, strength=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = model[0].weight.detach().clone()
    scaler.scale(model(torch.randn(4, 12)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    pruner.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
def test_proximal_masks_meet_their_budget_exactly(pattern):
    model = mlp()
    optimizer = sgd(model)
    pruner = Proximal(model, optimizer, "sparsity=75%", STEPS, pattern=pattern, strength=0.01)
    assert train_flat(model, optimizer, pruner, range(STEPS)) == [STEPS // 2]
    plan = pruner.finish()
    assert sum(int(m.sum()) for m in plan.masks.values()) == 320 // 4
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in plan.masks.items())


# --- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("method", METHODS)
def test_units_go_everywhere_the_budget_is_met_and_zeros_hold(method, optimizer):
    model, trainer, pruner = made(method, optimizer)
    dense = pruner.wish.graph.cost().macs

    def check():
        for name in pruner.bits:
            assert (model.state_dict()[name][~pruner.mask(name)] == 0).all()

    assert train(model, trainer, pruner, range(STEPS), check)[-1] == STEPS // 2
    plan = pruner.finish()
    assert plan.graph.cost({n: f.numpy() for n, f in plan.units.items()}).macs <= 0.3 * dense
    gone = {len(f): ~f for f in plan.units.values()}
    for now in units(model):
        assert torch.equal((now == 0).all(1), gone[len(now)])


@pytest.mark.parametrize("stop", [1, 5, 12])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_and_a_copy_go_on_bit_by_bit(method, stop):
    whole = made(method, adam)
    train(*whole, range(STEPS))
    half = made(method, adam)
    train(*half, range(stop))
    copied = copy.deepcopy(half)
    saved = copy.deepcopy([part.state_dict() for part in half])
    resumed = made(method, adam)
    for here, state in zip(resumed, saved, strict=True):
        here.load_state_dict(state)
    for found in (resumed, copied):
        train(*found, range(stop, STEPS))
        assert not whole[2].plan().diff(found[2].finish())
        assert same(found[0], whole[0])


def test_a_state_of_other_units_changes_nothing():
    model, optimizer, pruner = made("growing")
    train(model, optimizer, pruner, range(5))
    state = pruner.state_dict()
    state["units"].popitem()
    fresh = made("growing")[2]
    with pytest.raises(DataError):
        fresh.load_state_dict(state)
    assert fresh.applied == 0
    assert fresh.wish.kept is None


def inner_lasso(net):
    inner = units(net)[1]
    return inner.shape[1] ** 0.5 * inner.norm(dim=1).sum()


def test_units_of_ignored_axes_are_left_alone():
    model, optimizer, pruner = made("lasso", plain_sgd, strength=0.1, ignore="stem.weight")
    other = residual()
    assert list(map(len, (p[0].indices for p in pruner.groups.axes.values()))) == [10]
    train(model, optimizer, pruner, range(2))
    train_by_hand(other, plain_sgd(other), range(2), lambda n, s: 0.1 * inner_lasso(n))
    close(model, other)


@pytest.mark.parametrize("method", [GroupLasso, GrowingReg, Slimming])
def test_channel_methods_need_the_graph_and_channels(method):
    model = residual()
    with pytest.raises(SpecError, match="pattern channel needs graph="):
        method(model, sgd(model), "macs=50%", STEPS)
    with pytest.raises(SpecError, match="prunes channels, not pattern '2:4'"):
        method(model, sgd(model), None, STEPS, pattern="2:4", graph=graph_of(residual))


@pytest.mark.parametrize(
    ("method", "wish", "match"),
    [
        (GroupLasso, {"strength": -1.0}, r"strength is -1\.0; expected the factor of a penalty"),
        (Slimming, {"strength": "much"}, "strength is 'much'"),
        (GroupLasso, {"end": 99}, "expected 0 <= begin <= end <= steps"),
        (GrowingReg, {"begin": 5, "end": 5}, "expected begin < end"),
        (GrowingReg, {"every": 0}, "every 0 steps"),
        (GrowingReg, {"ceiling": float("inf")}, "ceiling is inf"),
        (Proximal, {"pattern": "2:4"}, "Proximal prunes unstructured weights, blocks and channels"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(method, wish, match):
    model = residual()
    optimizer = sgd(model)
    budget = None if "pattern" in wish else "macs=50%"
    with pytest.raises(SpecError, match=match):
        method(model, optimizer, budget, STEPS, graph=graph_of(residual), **wish)
    assert not optimizer._optimizer_step_pre_hooks


def test_slimming_refuses_a_model_without_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(SpecError, match="no free axis of this Sequential has a batch norm with a scale"):
        Slimming(model, sgd(model), "macs=50%", STEPS, graph=analyze(model, INPUTS))


# --- shrink_ ---------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": sgd,
    "adamw": adam,
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), 0.01, amsgrad=True, foreach=False),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01, momentum=0.9, centered=True),
    "two groups": lambda m: torch.optim.SGD(
        [{"params": [p for p in m.parameters() if p.ndim > 1]}, {"params": [p for p in m.parameters() if p.ndim == 1]}],
        0.05,
        momentum=0.9,
    ),
}


def ema_of(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))


def pruned(optimizer):
    """A model after its end, with its optimizer and its method still at work."""
    model, trainer, pruner = made("lasso", optimizer)
    pruner.average = ema = ema_of(model)
    train(model, trainer, pruner, range(STEPS - 4), average=ema)
    return model, trainer, pruner, ema


def cut(tensors, plan):
    """Tensors by name, without what the plan removes."""
    found = dict(tensors)
    for name, keep in ((n, keep) for n, keep in plan.slices.items() if n in found):
        for dim, flags in keep.items():
            found[name] = found[name].index_select(dim, flags.nonzero()[:, 0])
    return found


def assert_cut(small, big, plan, **how):
    expected = cut(big.state_dict(), plan)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **how)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_shrunk_training_goes_on_as_the_masked_one(optimizer):
    model, trainer, pruner, ema = pruned(OPTIMIZERS[optimizer])
    big, big_trainer, big_pruner, big_ema = copy.deepcopy((model, trainer, pruner, ema))
    plan = pruner.finish()
    shrink_(model, plan, trainer, ema)
    assert all(len(f) > f.sum() for f in plan.units.values())
    outer, inner = (int(flags.sum()) for flags in sorted(plan.units.values(), key=len))
    assert model.a.weight.shape == (inner, outer, 3, 3)
    x = torch.randn(4, 3, 8, 8)
    for small, large in ((model, big), (ema.module, big_ema.module)):
        torch.testing.assert_close(copy.deepcopy(small).eval()(x), copy.deepcopy(large).eval()(x))
        assert_cut(small, large, plan, rtol=0, atol=0)
    for parameter, state in trainer.state.items():
        assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    for step in range(STEPS - 4, STEPS):
        train(model, trainer, None, [step], average=ema)
        train(big, big_trainer, big_pruner, [step], average=big_ema)
        assert_cut(model, big, plan, rtol=1e-4, atol=1e-5)
        assert_cut(ema.module, big_ema.module, plan, rtol=1e-4, atol=1e-5)


def test_groups_and_schedulers_stay():
    model, trainer, pruner, _ = pruned(sgd)
    scheduler = torch.optim.lr_scheduler.StepLR(trainer, 1, gamma=0.5)
    groups, rate = list(trainer.param_groups), trainer.param_groups[0]["lr"]
    order = {id(p): i for i, p in enumerate(groups[0]["params"])}
    places = {name: order[id(p)] for name, p in model.named_parameters()}
    shrink_(model, pruner.finish(), trainer)
    assert all(a is b for a, b in zip(trainer.param_groups, groups, strict=True))
    assert [id(p) for p in groups[0]["params"]] == [
        id(model.get_parameter(n)) for n in sorted(places, key=places.__getitem__)
    ]
    assert set(trainer.state) == set(model.parameters())
    before = model.head.weight.detach().clone()
    train(model, trainer, None, [0])
    scheduler.step()
    assert groups[0]["lr"] == rate / 2
    assert not torch.equal(model.head.weight, before)
    fresh = sgd(model)  # its state can be saved and loaded
    fresh.load_state_dict(trainer.state_dict())


def test_gradients_at_hand_are_cut_too():
    model, trainer, pruner, _ = pruned(sgd)
    loss_of(model, 99).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    plan = pruner.finish()
    shrink_(model, plan, trainer)
    expected = cut(grads, plan)
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_a_copy_as_average_and_a_plan_from_a_file(tmp_path):
    model, trainer, pruner, _ = pruned(sgd)
    average = copy.deepcopy(model)
    pruner.finish().save(tmp_path)
    plan = Plan.load(tmp_path)
    with pytest.raises(PlanError, match="loaded from a file; give example inputs"):
        shrink_(model, plan, trainer, average)
    assert model.a.weight.shape == (10, 6, 3, 3)
    assert shrink_(model, plan, trainer, average, inputs=INPUTS) is model
    assert same(model, average)
    assert model.a.weight.shape[0] < 10


def state_of(model, trainer, ema):
    return copy.deepcopy((model.state_dict(), trainer.state_dict(), ema.state_dict(), str(model), str(ema)))


def unchanged(before, model, trainer, ema):
    for old, new in zip(before, state_of(model, trainer, ema), strict=True):
        assert str(old) == str(new)
    train(model, trainer, None, [0], average=ema)


@pytest.mark.parametrize("number", [0, 1])
def test_a_failure_on_the_way_leaves_all_three_as_they_were(number, monkeypatch):
    model, trainer, pruner, ema = pruned(adam)
    plan, before, calls = pruner.finish(), state_of(model, trainer, ema), []
    parameters = list(map(id, model.parameters()))

    def breaks(*given):
        become(*given)
        calls.append(1)
        if len(calls) == number + 1:
            raise MemoryError

    become = shrinking.become_
    monkeypatch.setattr(shrinking, "become_", breaks)
    with pytest.raises(MemoryError):
        shrink_(model, plan, trainer, ema)
    assert list(map(id, model.parameters())) == parameters
    unchanged(before, model, trainer, ema)


def test_what_holds_on_to_old_parameters_is_refused():
    model, trainer, pruner, ema = pruned(sgd)
    before = state_of(model, trainer, ema)
    with pytest.raises(PlanError, match="a method still prunes with this optimizer; call its finish"):
        shrink_(model, pruner.plan(), trainer, ema)
    plan = pruner.finish()
    with pytest.raises(PlanError, match="hold on to the old parameters: take the model out"):
        shrink_(nn.DataParallel(model), plan, trainer, ema)
    model.a.weight.placements = ()
    with pytest.raises(PlanError, match="FSDP's shards cannot lose channels"):
        shrink_(model, plan, trainer, ema)
    del model.a.weight.placements
    with pytest.raises(PlanError, match="the optimizer trains none of the weights that shrink"):
        shrink_(model, plan, sgd(residual()), ema)
    with pytest.raises(PlanError, match="average= is no average of this model"):
        shrink_(model, plan, trainer, mlp())
    masks = Gradual(mlp_ := mlp(), o := sgd(mlp_), "sparsity=50%", 4).plan()
    with pytest.raises(PlanError, match="removes no units, so nothing can shrink"):
        shrink_(mlp_, masks, sgd(mlp_))
    assert o.state == {}
    unchanged(before, model, trainer, ema)


def test_an_optimizer_whose_memory_cannot_be_cut_is_refused():
    model, trainer, pruner, ema = pruned(sgd)
    plan, before = pruner.finish(), state_of(model, trainer, ema)
    trainer.state[model.a.weight]["rows"] = torch.zeros(7)
    with pytest.raises(PlanError, match=r"'rows' of 'a.weight' in shape \[7\].*cannot be cut"):
        shrink_(model, plan, trainer, ema)
    trainer.state[model.a.weight]["rows"] = [torch.zeros(10)]
    with pytest.raises(PlanError, match=r"'rows' of 'a.weight' as a list, which cannot be cut"):
        shrink_(model, plan, trainer, ema)
    del trainer.state[model.a.weight]["rows"]
    unchanged(before, model, trainer, ema)


class Attention(nn.Module):
    """Its configuration remembers heads and their width, which torch takes the scale from."""

    def __init__(self, heads=4, width=6):
        super().__init__()
        self.config = SimpleNamespace(heads=heads, width=width)
        self.q, self.k, self.v = (nn.Linear(8, heads * width) for _ in range(3))
        self.o = nn.Linear(heads * width, 8)

    def forward(self, x):
        b, n, _ = x.shape
        heads, width = self.config.heads, self.config.width
        q, k, v = (p(x).view(b, n, heads, width).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(b, n, heads * width))


def attending(ignore):
    """A pruned attention, its optimizer, an average that is a copy, and the plan."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    trainer = adam(model)
    wish = {"graph": analyze(model, x), "ignore": ignore, "allocate": "uniform"}  # values stay as wide as keys
    pruner = GroupLasso(model, trainer, "params=60%", 4, end=2, **wish)
    for _ in range(4):
        trainer.zero_grad()
        model(x).square().mean().backward()
        trainer.step()
        pruner.step()
    average = copy.deepcopy(model)
    return model, trainer, average, pruner.finish()


def test_heads_go_with_the_numbers_that_the_class_remembers(monkeypatch):
    model, trainer, average, plan = attending(("*head width", "*value width"))
    become, calls = shrinking.become_, []

    def breaks(*given):
        become(*given)
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(shrinking, "become_", breaks)
    with pytest.raises(MemoryError):
        shrink_(model, plan, trainer, average)
    assert model.config.heads == average.config.heads == 4
    assert model.q.weight.shape == average.q.weight.shape == (24, 8)
    x = torch.randn(3, 5, 8)
    before = model(x)
    shrink_(model, plan, trainer, average)
    assert model.config.heads == average.config.heads < 4
    torch.testing.assert_close(model(x), before)
    assert same(model, average)


def test_a_scale_that_would_have_to_move_into_weights_is_refused():
    model, trainer, average, plan = attending("*heads")
    with pytest.raises(PlanError, match=r"the attention of Attention works out its scale .*ignore= the widths"):
        shrink_(model, plan, trainer, average)
    assert model.config.width == 6


# --- a real network --------------------------------------------------------------------------------


@pytest.fixture
def resnet(data):
    """The pretrained ResNet-20, in training mode, and its graph."""
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.append(str(benchmarks))
    model = load_callable(f"{benchmarks / 'nets.py'}:resnet20")()
    return model, analyze(model, torch.randn(2, 3, 32, 32))


def steps_on(model, trainer, pruner, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
        trainer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        trainer.step()
        if pruner is not None:
            pruner.step()


def test_a_resnet_is_slimmed_shrunk_and_trained_on(resnet):
    model, graph = resnet
    model.train()
    trainer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    sums = ("bn1.weight", "bn2.weight")  # behind the stem, and behind each block's last convolution
    shared = [a.name for a in graph.free if any(m.tensor == sums[0] or m.tensor.endswith(sums[1]) for m in a.members)]
    pruner = Slimming(model, trainer, "macs=70%", 6, graph=graph, end=3, ignore=shared)
    steps_on(model, trainer, pruner, range(5))
    big, big_trainer, big_pruner = copy.deepcopy((model, trainer, pruner))
    plan = pruner.finish()
    shrink_(model, plan, trainer)
    assert analyze(model, graph.inputs).cost().macs <= 0.7 * graph.cost().macs
    steps_on(model, trainer, None, [5])
    steps_on(big, big_trainer, big_pruner, [5])
    assert_cut(model, big, plan, rtol=1e-4, atol=1e-5)


def test_a_resnet_whose_code_holds_on_to_its_width_is_refused(resnet):
    model, graph = resnet
    trainer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = GroupLasso(model, trainer, "macs=50%", 2, graph=graph, end=1)
    steps_on(model, trainer, pruner, range(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"ResNet cannot be shrunk in place, .*ignore= the axes concerned"):
        shrink_(model, pruner.finish(), trainer)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
