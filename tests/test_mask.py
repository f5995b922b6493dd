"""Zeros: put in place, kept through any optimizer, and nothing else left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nets import build
from secateur.apply.mask import keep_zeros, mask, mask_
from secateur.errors import PlanError
from secateur.graph import analyze
from secateur.planning import make

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def planned(net="residual", pattern="unstructured", budget="sparsity=70%"):
    model, inputs = build(net)
    return model, inputs, make(model, analyze(model, inputs), pattern=pattern, budget=budget)


def zeros_hold(model, plan):
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return all(bool((named[n][~plan.keep(n)] == 0).all()) for n in plan.tensors)


def train(model, x, optimizer, steps=3):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    model.train()
    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x1", "channel"])
def test_a_mask_zeroes_what_goes_and_nothing_else(pattern):
    model, _, plan = planned(pattern=pattern, budget=None if pattern == "2:4" else "sparsity=50%")
    before = copy.deepcopy(model.state_dict())
    masked = mask(model, plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(masked.state_dict()) == set(before)
    for name, value in masked.state_dict().items():
        keep = plan.keep(name) if name in plan.tensors else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[keep], before[name][keep])
        assert bool((value[~keep] == 0).all())


def test_a_mask_hides_what_is_not_finite():
    model, _, plan = planned()
    name = next(iter(plan.masks))
    gone = ~plan.masks[name]
    model.get_parameter(name).data[gone] = float("nan")
    assert mask(model, plan).get_parameter(name).isfinite().all()


def test_ties_stay_tied():
    model, _, plan = planned("tied_linear", "channel", "params=60%")
    masked = mask(model, plan)
    assert masked.head.weight is masked.emb.weight


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_zeros_stay_zero_after_any_step(name, pattern):
    model, x, plan = planned(pattern=pattern, budget="sparsity=50%")
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, x, optimizer)
    before = copy.deepcopy(model.state_dict())
    with keep_zeros(model, plan, optimizer) as same:
        assert same is model
        for _ in range(3):
            train(model, x, optimizer, 1)
            assert zeros_hold(model, plan)
    assert zeros_hold(model, plan)
    assert any(not torch.equal(v[plan.keep(k)], before[k][plan.keep(k)]) for k, v in model.named_parameters()
               if k in plan.tensors)  # fmt: skip


def test_moments_of_removed_weights_are_gone_afterwards():
    model, x, plan = planned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, x, optimizer)
    with keep_zeros(model, plan, optimizer):
        train(model, x, optimizer)
    for name, keep in plan.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        for what in ("exp_avg", "exp_avg_sq"):
            assert bool((state[what][~keep] == 0).all())
            assert bool((state[what][keep] != 0).any())


def test_a_plan_that_removes_nothing_asks_for_nothing():
    model, x, plan = planned(pattern="channel", budget="params=100%")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not plan.tensors
    with keep_zeros(model, plan, optimizer):
        train(model, x, optimizer)


def test_what_a_step_blows_up_is_wiped():
    model, x, plan = planned()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    with keep_zeros(model, plan, optimizer):
        train(model, x, optimizer, 1)
        assert zeros_hold(model, plan)


def test_skipped_steps_are_fine():
    """As a GradScaler does when gradients overflow."""
    model, _, plan = planned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with keep_zeros(model, plan, optimizer):
        pass
    assert zeros_hold(model, plan)


def test_nothing_stays_behind_and_the_model_is_ordinary_meanwhile():
    model, x, plan = planned(net="plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = set(model.state_dict())
    hooks = len(optimizer._optimizer_step_post_hooks)
    with keep_zeros(model, plan, optimizer):
        train(model, x, optimizer, 1)
        assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        assert set(model.state_dict()) == keys
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    train(model, x, optimizer, 1)
    assert not zeros_hold(model, plan)


def test_hooks_go_after_an_error_too():
    model, _, plan = planned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="mine"), keep_zeros(model, plan, optimizer):
        raise RuntimeError("mine")
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_of_another_model_is_refused():
    model, _, plan = planned()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(PlanError, match="trains none of the parameters"), keep_zeros(model, plan, other):
        pass


def test_a_replaced_parameter_is_noticed():
    model, x, plan = planned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with keep_zeros(model, plan, optimizer):
        model.a.weight = nn.Parameter(model.a.weight.detach().clone())
        with pytest.raises(PlanError, match=r"'a\.weight' was replaced"):
            train(model, x, optimizer, 1)


def test_a_plan_of_another_model_changes_nothing():
    _, _, plan = planned()
    other, _ = build("plain")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match="use the dense model"):
        mask_(other, plan)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
