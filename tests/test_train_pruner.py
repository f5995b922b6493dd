"""What every method does with the model, the optimizer and the schedule, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from train_nets import backward, gradual, mlp, sgd, train, zeros

import secateur as sc
from secateur.errors import BudgetError, PlanError, SpecError
from secateur.patterns import NM
from secateur.tasks import Classification
from secateur.train import ASP, Gradual, Pruner
from secateur.train.stages import Stage, part

# --- steps -----------------------------------------------------------------------------------------


def test_masks_change_after_the_steps_of_the_schedule_and_zeros_hold() -> None:
    model, optimizer, pruner = gradual()

    def check(step):
        assert not pruner.bits if step < 1 else zeros(pruner)

    assert train(model, optimizer, pruner, range(8), check) == [2, 4, 6]
    plan = pruner.finish()
    assert sum(plan.allocation.kept.values()) == 80  # a quarter of 12 x 16 + 16 x 8
    assert pruner.sparsity == 0.75


def test_zeros_hold_between_step_and_step() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(6))
    optimizer.zero_grad()
    backward(model, 7)
    optimizer.step()
    assert zeros(pruner)


def test_several_optimizer_steps_are_several_steps() -> None:
    model, optimizer, pruner = gradual()
    backward(model, 0)
    for _ in range(5):
        optimizer.step()
    assert pruner.step()
    assert (pruner.applied, pruner.done) == (5, 2)
    assert not pruner.step()


def test_no_optimizer_step_is_none() -> None:
    _, _, pruner = gradual()
    assert not any(pruner.step() for _ in range(9))
    assert pruner.applied == 0


def test_the_moments_of_what_goes_are_forgotten() -> None:
    model, optimizer, pruner = gradual(optimizer=None)
    train(model, optimizer, pruner, range(7))
    for name in pruner.bits:
        moment = optimizer.state[pruner.tensor(name)]["momentum_buffer"]
        assert not bool(moment[~pruner.mask(name)].any())
        assert bool(moment[pruner.mask(name)].any())


def test_gradients_are_masked_for_clipping() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(6))
    optimizer.zero_grad()
    backward(model, 6)
    assert bool(model[0].weight.grad[~pruner.mask("0.weight")].any())
    pruner.mask_gradients()
    assert not bool(model[0].weight.grad[~pruner.mask("0.weight")].any())
    assert bool(model[0].weight.grad[pruner.mask("0.weight")].any())


def test_parameters_may_join_the_optimizer_later() -> None:
    model, optimizer, pruner = gradual()
    head = nn.Linear(8, 8)
    optimizer.add_param_group({"params": head.parameters()})
    train(model, optimizer, pruner, range(8))
    pruner.finish()


def test_a_tied_weight_is_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), "sparsity=50%", 2, begin=1, end=1)
    assert list(pruner.weights) == ["0.weight"]
    model(torch.ones(1, 8)).sum().backward()
    pruner.optimizer.step()
    pruner.step()
    assert int((model[2].weight == 0).sum()) == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_are_pruned_exactly(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(1e-4)  # whose squares a half cannot tell from zero
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.0), "sparsity=50%", 1, begin=1, end=1, criterion="l2")
    model(torch.zeros(1, 12, dtype=dtype)).sum().backward()
    pruner.optimizer.step()
    smallest = torch.cat([pruner.value(n).abs().flatten() for n in pruner.weights]).kthvalue(161).values
    assert pruner.step()
    assert pruner.sparsity == 0.5
    assert all(float(pruner.value(n).abs()[pruner.mask(n)].min()) >= float(smallest) for n in pruner.weights)


def test_complex_weights_are_pruned_by_their_size() -> None:
    model = nn.Linear(4, 4, dtype=torch.complex64)
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.0), "sparsity=50%", 1, begin=1, end=1)
    model(torch.ones(1, 4, dtype=torch.complex64)).abs().sum().backward()
    pruner.optimizer.step()
    pruner.step()
    kept = pruner.mask("weight")
    assert int(kept.sum()) == 8
    assert not bool(model.weight[~kept].any())


# --- losses that are not finite ----------------------------------------------------------------------


def test_an_update_waits_for_finite_weights() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(2))
    before, good = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    pruner.step()
    backward(model, 3)
    model[0].weight.grad[pruner.mask("0.weight")] = math.nan  # elsewhere it would be masked
    optimizer.step()
    with pytest.warns(
        UserWarning, match=r"after step 4 masks stay as they are: the scores of '0.weight' are not finite"
    ):
        assert not pruner.step()
    assert pruner.state_dict()["done"] == before["done"]
    assert all(torch.equal(bits, before["masks"][name]) for name, bits in pruner.state_dict()["masks"].items())
    model.load_state_dict(good)
    optimizer.state.clear()
    optimizer.zero_grad()
    backward(model, 4)
    optimizer.step()
    assert pruner.step()
    assert zeros(pruner)


def test_gradients_that_are_not_finite_do_not_count_for_scores() -> None:
    model = mlp()
    pruner = Gradual(
        model, torch.optim.SGD(model.parameters(), 0.0), "sparsity=75%", 8, begin=3, end=3, criterion="taylor"
    )
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        if step:
            model[2].weight.grad[0, 0] = math.inf
        pruner.optimizer.step()
        if not step:
            first = {n: kept["grad_abs"].clone() for n, kept in pruner.state.items()}
    assert all(torch.equal(kept["grad_abs"], first[n]) for n, kept in pruner.state.items())
    assert torch.equal(first["0.weight"], first["0.weight"].abs())


# --- the end -----------------------------------------------------------------------------------------


def test_an_early_end_is_no_end() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(5))
    with pytest.raises(PlanError, match=r"5 steps were applied, and the budget sparsity=75% is reached at step 6"):
        pruner.finish()
    train(model, optimizer, pruner, range(5, 8))
    pruner.finish()


def test_weights_written_to_are_found() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(8))
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.raises(PlanError, match=r"of '0.weight' should be zero and are not"):
        pruner.finish()


def test_after_the_end_there_are_no_steps_but_the_same_plan() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(8))
    first = pruner.finish()
    assert not first.diff(pruner.finish())
    backward(model, 8)
    optimizer.step()
    assert bool(model[0].weight[~first.masks["0.weight"]].any())  # the optimizer is free
    with pytest.raises(PlanError, match="let go of its optimizer"):
        pruner.step()
    with pytest.raises(PlanError, match="should be zero and are not"):
        pruner.finish()


# --- wishes that do not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "more", "error", "says"),
    [
        (None, {}, SpecError, "needs a budget"),
        ("params=100", {}, SpecError, "has no way to it in steps"),
        ("max_drop=1%", {}, SpecError, "has no way to it in steps"),
        ("size=50%", {}, SpecError, "cannot be met by masks here"),
        ("macs=50%", {}, SpecError, "macs with graph="),
        ("params=1%", {}, BudgetError, "nearest possible"),
        ("sparsity=75%", {"pattern": "2:4"}, BudgetError, "leave the budget out"),
        ("sparsity=75%", {"pattern": "layer"}, SpecError, "prunes unstructured weights, blocks, N:M and channels"),
        ("sparsity=75%", {"pattern": "channel"}, SpecError, "needs graph="),
        ("sparsity=75%", {"pattern": "block:99x1"}, SpecError, "applies to none of the 2 weights"),
        ("sparsity=75%", {"ignore": "nothing*"}, SpecError, "matches nothing"),
        ("sparsity=75%", {"ignore": "*"}, SpecError, "applies to none"),
        ("sparsity=75%", {"criterion": "magnitde"}, SpecError, "magnit"),
        ("sparsity=75%", {"allocate": "globl"}, SpecError, "glob"),
        ("sparsity=75%", {"criterion": "activation"}, SpecError, "takes graph="),
        ("sparsity=75%", {"steps": 0}, SpecError, "steps is 0"),
        ("sparsity=75%", {"begin": 7, "end": 6}, SpecError, "runs from step 7 to 6 of 8"),
        ("sparsity=75%", {"end": 9}, SpecError, "runs from step 2 to 9 of 8"),
        ("sparsity=75%", {"schedule": [(3, "sparsity=75%"), (2, "sparsity=75%")]}, SpecError, "ascending order"),
        ("sparsity=75%", {"schedule": [(3, "sparsity=50%")]}, SpecError, "the last one with sparsity=75%"),
        ("sparsity=75%", {"schedule": []}, SpecError, "at least one"),
    ],
)
def test_wishes_are_refused_at_once(budget, more, error, says: str) -> None:
    with pytest.raises(error, match=says):
        gradual(budget=budget, **more)


def test_criteria_of_data_need_data_at_once() -> None:
    model = mlp()
    graph = sc.analyze(model, torch.zeros(2, 12))
    for pattern in ("unstructured", "channel"):
        with pytest.raises(SpecError, match=r"comes from data; give task="):
            gradual(model, pattern=pattern, criterion="activation", graph=graph)
    with pytest.raises(BudgetError, match="nearest possible"):
        gradual(model, budget="params=1%", pattern="channel", graph=graph)


def test_criteria_of_data_score_what_is_trained() -> None:
    model = mlp()
    graph = sc.analyze(model, torch.zeros(2, 12))
    data = (torch.randn(16, 12), torch.randint(8, (16,)))
    task = Classification(data, data, data)
    _, optimizer, pruner = gradual(model, criterion="activation", graph=graph, task=task)
    train(model, optimizer, pruner, range(8))
    assert pruner.finish().meta["criterion"] == "activation"


def test_the_optimizer_has_to_train_the_weights() -> None:
    model = mlp()
    with pytest.raises(PlanError, match=r"does not train '0.weight'.*ignore="):
        gradual(model, torch.optim.SGD(mlp().parameters(), 0.1))
    only = torch.optim.SGD(model[2].parameters(), 0.1)
    with pytest.raises(PlanError, match=r"does not train '0.weight'"):
        gradual(model, only)
    assert list(gradual(model, only, ignore="0.*")[2].weights) == ["2.weight"]


def test_weights_that_stay_or_are_not_there_are_refused() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(PlanError, match=r"'0.weight' is not trained \(requires_grad is False\)"):
        gradual(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(PlanError, match="device meta"):
        gradual(mlp().to("meta"))


def test_an_optimizer_that_asks_for_several_losses_is_refused() -> None:
    model = mlp()

    def closure():
        model.zero_grad()
        loss = model(torch.ones(2, 12)).square().mean()
        loss.backward()
        return loss

    pruner = gradual(model, torch.optim.LBFGS(model.parameters()))[2]
    with pytest.raises(SpecError, match="LBFGS evaluates the loss several times"):
        pruner.optimizer.step(closure)
    once = gradual(model, torch.optim.SGD(model.parameters(), 0.1))[2]
    for _ in range(6):
        once.optimizer.step(closure)
        once.step()
    assert once.applied == 6
    assert zeros(once)


def test_a_model_that_changes_under_way_is_noticed() -> None:
    model, optimizer, pruner = gradual()
    train(model, optimizer, pruner, range(1))
    replaced = nn.Parameter(model[0].weight.detach().clone())
    original, model[0].weight = model[0].weight, replaced
    backward(model, 1)
    with pytest.raises(PlanError, match=r"'0.weight': it was replaced"):
        optimizer.step()
    model[0].weight = original
    model.append(nn.Linear(8, 8))
    backward(model, 1)
    optimizer.step()
    with pytest.raises(PlanError, match=r"new weight, '3.weight'"):
        pruner.step()
    model[2] = nn.Identity()
    with pytest.raises(PlanError, match="no longer in the model"):
        optimizer.step()


def test_an_average_of_another_model_is_refused() -> None:
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8))):
        with pytest.raises(PlanError, match="average= is no average of this model"):
            gradual(average=other)


# --- methods of one's own --------------------------------------------------------------------------------


def test_a_method_says_what_it_prunes() -> None:
    class Only(Pruner):
        allowed = (NM,)
        why_only = "N:M"

    model = mlp()
    with pytest.raises(SpecError, match="Only prunes N:M, not pattern 'unstructured'"):
        Only(model, sgd(model), "sparsity=50%", 2, [Stage(1, part("sparsity=50%"))])


def test_finishing_warns_of_nothing_and_leaves_no_hooks() -> None:
    model = mlp()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = ASP(model, optimizer, steps=2)
        train(model, optimizer, pruner, range(2))
        pruner.finish()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not module._forward_hooks and not module._parameters.keys() - {"weight", "bias"} for module in model)
