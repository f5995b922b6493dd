"""Methods whose masks move: RigL, SET, AC/DC; and ASP, whose masks do not."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from train_nets import adam, backward, convnet, mlp, same, sgd, train

from secateur import allocate, patterns
from secateur.errors import BudgetError, DataError, SpecError
from secateur.train import ACDC, ASP, SET, RigL
from secateur.train.acdc import phases
from secateur.train.shards import Part
from secateur.train.stages import part

STEPS = 40
METHODS = {
    "rigl": lambda m, o, b="sparsity=80%", **more: RigL(m, o, b, STEPS, **{"every": 4, **more}),
    "set": lambda m, o, b="sparsity=80%", **more: SET(m, o, b, STEPS, **{"every": 4, **more}),
    "acdc": lambda m, o, b="sparsity=80%", **more: ACDC(m, o, b, STEPS, **more),
    "asp": lambda m, o, b="sparsity=80%", **more: ASP(m, o, b, STEPS, **{"pattern": "unstructured", **more}),
}
PATTERNS = {"unstructured": "sparsity=80%", "block:4x2": "sparsity=80%", "2:4": None}


def masks_of(pruner):
    return {name: pruner.mask(name).clone() for name in pruner.bits}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def zeros_hold(model, pruner):
    """A check after every step: what has gone is zero, and what the optimizer remembers of it too."""

    def check(step):
        for name in pruner.bits:
            tensor, gone = model.get_parameter(name), ~pruner.mask(name)
            assert (tensor[gone] == 0).all()
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                moment = pruner.optimizer.state[tensor].get(key)
                assert moment is None or (moment[gone] == 0).all()

    return check


# --- laws of all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_budgets_are_met_exactly_and_zeros_are_zero_after_every_step(method, pattern, optimizer):
    model = mlp()
    optimizer = optimizer(model)
    pruner = METHODS[method](model, optimizer, PATTERNS[pattern], pattern=pattern)
    train(model, optimizer, pruner, range(STEPS), zeros_hold(model, pruner))
    plan = pruner.finish()
    for name in pruner.weights:
        keep = plan.keep(name)
        assert not (model.get_parameter(name)[~keep] != 0).any()
        assert pattern != "2:4" or (keep.view(-1, 4).sum(1) == 2).all()
        # What was grown where a neuron is dead is still zero.
        assert method in ("rigl", "set") or (model.get_parameter(name)[keep] != 0).all()
    elements, units = {"unstructured": (64, 64), "block:4x2": (64, 8), "2:4": (160, 160)}[pattern]
    assert sum(plan.allocation.kept.values()) == units  # of 12 x 16 + 16 x 8 weights
    assert sum(int(plan.keep(name).sum()) for name in pruner.weights) == elements
    assert pruner.sparsity == 1 - elements / 320


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "2:4"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_exchanges_keep_the_elements_of_every_weight_where_blocks_have_edges(method, pattern):
    model = convnet()
    optimizer = sgd(model)
    pruner = METHODS[method](model, optimizer, PATTERNS.get(pattern, "sparsity=60%"), pattern=pattern)
    first = masks_of(pruner)
    changed = train(model, optimizer, pruner, range(STEPS))
    last = masks_of(pruner)
    assert changed == list(range(4, 30, 4))
    assert not equal(first, last)
    assert {n: int(m.sum()) for n, m in first.items()} == {n: int(m.sum()) for n, m in last.items()}
    for name, mask in last.items():
        assert torch.equal(mask, _legal(pattern, mask, pruner.weights[name]))


def _legal(pattern, mask, weight):
    """The mask, spread again from whether its units are there."""
    shape = patterns.parse(pattern)
    if pattern == "2:4":
        return patterns.nm_mask(shape, mask.float(), weight)
    return patterns.spread(shape, patterns.pool(shape, mask.float(), weight) > 0, weight)


@pytest.mark.parametrize("first", ["model", "method"])
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 7, 33])
def test_training_resumes_to_the_bit_whichever_is_made_or_loaded_first(method, optimizer, first, stop, tmp_path):
    model = mlp()
    whole = METHODS[method](model, optimizer := (make := optimizer)(model))
    train(model, optimizer, whole, range(stop))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    train(model, optimizer, whole, range(stop, STEPS))

    other = mlp(seed=1)
    again = make(other)
    if first == "method":
        resumed = METHODS[method](other, again)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    if first == "model":
        resumed = METHODS[method](other, again)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(other, again, resumed, range(stop, STEPS))
    assert same(model, other)
    assert equal(masks_of(whole), masks_of(resumed))


@pytest.mark.parametrize("method", ["rigl", "set", "asp"])
def test_zeros_are_there_once_a_state_is_loaded_before_the_first_step(method):
    model = mlp()
    pruner = METHODS[method](model, sgd(model))
    before = mlp(seed=0)
    assert not same(model, before)
    pruner.load_state_dict(pruner.state_dict())
    for name in pruner.bits:
        assert torch.equal(model.get_parameter(name), before.get_parameter(name) * pruner.mask(name))


@pytest.mark.parametrize("stop", [0, 9])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_trains_on_like_the_original(method, stop):
    model = mlp()
    optimizer = adam(model)
    pruner = METHODS[method](model, optimizer)
    train(model, optimizer, pruner, range(stop))
    other, again, twin = copy.deepcopy((model, optimizer, pruner))
    train(model, optimizer, pruner, range(stop, STEPS))
    assert not same(model, other)
    train(other, again, twin, range(stop, STEPS))
    assert same(model, other)


@pytest.mark.parametrize("method", ["rigl", "set", "asp"])
def test_what_begins_sparse_gives_the_average_its_zeros_with_the_first_step(method):
    model = mlp()
    average = copy.deepcopy(model)
    optimizer = sgd(model)
    pruner = METHODS[method](model, optimizer, average=average)
    train(model, optimizer, pruner, range(1))
    for name in pruner.bits:
        assert torch.equal(average.get_parameter(name) != 0, pruner.mask(name))


def test_what_an_optimizer_remembers_of_weights_that_go_before_the_first_step_goes_with_it():
    model = mlp()
    optimizer = adam(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    pruner = ASP(model, optimizer, steps=STEPS)
    train(model, optimizer, pruner, range(1), zeros_hold(model, pruner))


# --- RigL and SET ----------------------------------------------------------------------------------


def rigl_reference(weight, mask, data, *, rate, momentum, every, end, fraction):
    """RigL with SGD on the mean squared error of one linear layer; gives weight, mask, and regrown elements."""
    weight, mask, buffer, regrown = weight * mask, mask.copy(), np.zeros_like(weight), 0
    for step, (inputs, targets) in enumerate(data, 1):
        dense = 2 / targets.size * (inputs @ weight.T - targets).T @ inputs
        buffer = momentum * buffer + dense * mask
        weight = (weight - rate * buffer) * mask
        if step % every or step >= end:
            continue
        active = np.flatnonzero(mask)
        gone = int(fraction / 2 * (1 + math.cos(math.pi * step / end)) * len(active))
        ascending = active[np.argsort(np.abs(weight.flat[active]))]
        kept, others = ascending[gone:], np.setdiff1d(np.arange(weight.size), ascending[gone:])
        grown = others[np.argsort(-np.abs(dense.flat[others]))][:gone]
        new = np.zeros_like(mask)
        new.flat[kept] = new.flat[grown] = True
        regrown += int(mask.flat[grown].sum())
        for moved in (weight, buffer):
            moved[~new | ~mask] = 0
        mask = new
    return weight, mask, regrown


def test_rigl_does_what_its_equations_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False)).double()
    dense = model[0].weight.detach().numpy().copy()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    pruner = RigL(model, optimizer, "sparsity=70%", 60, every=3, end=50, fraction=0.6)
    mask = pruner.mask("0.weight").numpy().copy()
    assert mask.sum() == 24
    wanted = torch.randn(8, 10, dtype=torch.double)
    data = [(x := torch.randn(4, 10, dtype=torch.double), x @ wanted.T) for _ in range(60)]
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()
    weight, last, regrown = rigl_reference(
        dense, mask, [(x.numpy(), y.numpy()) for x, y in data], rate=0.2, momentum=0.9, every=3, end=50, fraction=0.6
    )
    assert regrown  # some elements were dropped and grown at once
    assert (last != mask).sum() > 10
    assert np.array_equal(pruner.mask("0.weight").numpy(), last)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)


def test_layers_keep_what_erdos_renyi_kernel_says_and_all_the_same_part_where_it_is_uniform():
    model = mlp()
    erk = RigL(model, sgd(model), "sparsity=80%", STEPS, every=4)
    kept = {name: int(mask.sum()) for name, mask in masks_of(erk).items()}
    # Densities in proportion to 28/192 and 24/128: 64 = e (28 + 24).
    assert kept == {"0.weight": pytest.approx(64 * 28 / 52, abs=1), "2.weight": pytest.approx(64 * 24 / 52, abs=1)}
    model = mlp()
    uniform = RigL(model, sgd(model), "sparsity=75%", STEPS, every=4, allocate="uniform")
    assert {name: int(mask.sum()) for name, mask in masks_of(uniform).items()} == {"0.weight": 48, "2.weight": 32}


def test_a_trained_network_starts_from_its_largest_weights_and_others_start_anywhere():
    model = mlp()
    dense = model.get_parameter("0.weight").detach().clone()
    pruner = RigL(model, sgd(model), "sparsity=75%", STEPS, every=4, start="magnitude", allocate="uniform")
    assert torch.equal(pruner.mask("0.weight").flatten(), allocate.best(dense.abs().flatten(), 48))
    other, third = (RigL(m := mlp(seed), sgd(m), "sparsity=75%", STEPS, every=4) for seed in (0, 1))
    assert equal(masks_of(other), masks_of(third))  # whatever the weights are
    m = mlp()
    assert not equal(masks_of(other), masks_of(RigL(m, sgd(m), "sparsity=75%", STEPS, every=4, seed=1)))


def test_exchanges_shrink_along_half_a_cosine():
    model = mlp()
    pruner = RigL(model, sgd(model), "sparsity=75%", 400, every=100)
    assert [stage.step for stage in pruner.schedule] == [0, 100, 200]
    assert [pruner.share(step) for step in (0, 100, 150, 200, 300)] == pytest.approx([0.3, 0.225, 0.15, 0.075, 0])


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_what_grows_is_zero_and_adam_takes_no_leap_with_it(method):
    model = mlp()
    optimizer = adam(model)
    pruner = METHODS[method](model, optimizer, every=20, fraction=0.5)
    train(model, optimizer, pruner, range(19))
    before = masks_of(pruner)
    assert train(model, optimizer, pruner, [19]) == [20]
    seen = 0
    for name, mask in masks_of(pruner).items():
        weight = model.get_parameter(name)
        state, grown, stayed = optimizer.state[weight], mask & ~before[name], mask & before[name]
        seen += int(grown.sum())
        assert (weight[grown] == 0).all()
        assert (state["exp_avg"][grown] == 0).all()
        level = state["exp_avg_sq"][stayed].mean().expand(int(grown.sum()))
        torch.testing.assert_close(state["exp_avg_sq"][grown], level, rtol=1e-5, atol=0)
    assert seen > 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_largest_weights_are_never_dropped(method, pattern):
    """And no more than the part that is to be exchanged."""
    model = mlp()
    optimizer = sgd(model)
    pruner = METHODS[method](model, optimizer, PATTERNS[pattern], pattern=pattern, every=15, fraction=0.9)
    train(model, optimizer, pruner, range(14))
    old = masks_of(pruner)
    optimizer.zero_grad()
    backward(model, 14)
    optimizer.step()
    stepped = {name: model.get_parameter(name).detach().abs() for name in old}
    assert pruner.step()
    moved = 0
    for name, mask in masks_of(pruner).items():
        weight, shape = pruner.weights[name], patterns.parse(pattern)
        scores, was, now = (patterns.pool(shape, x.float(), weight) for x in (stepped[name], old[name], mask))
        gone = (was > 0) & ~(now > 0)
        leave = int(pruner.share(15) * int((was > 0).sum()))
        moved += int(gone.sum())
        assert gone.sum() <= leave
        worst = scores[was > 0].sort().values[:leave]
        assert set(scores[gone].tolist()) <= set(worst.tolist())
    assert moved


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_weights_that_happen_to_be_zero_are_not_taken_for_those_that_have_gone(method):
    model = mlp()
    optimizer = sgd(model)
    pruner = METHODS[method](model, optimizer)
    train(model, optimizer, pruner, range(3))
    old = pruner.mask("0.weight")
    optimizer.zero_grad()
    backward(model, 3)
    optimizer.step()
    with torch.no_grad():
        model[0].weight.zero_()
    assert pruner.step()
    grown = int((pruner.mask("0.weight") & ~old).sum())
    assert 0 < grown <= int(pruner.share(4) * int(old.sum()))


def test_gradients_are_kept_for_growing_before_they_are_masked_for_clipping():
    def run(clip):
        model = mlp()
        optimizer = sgd(model)
        pruner = METHODS["rigl"](model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            if clip:
                pruner.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            if pruner.step():
                assert not any(pruner.state.values())  # and no longer than until then
        return model, masks_of(pruner)

    (plain, without), (clipped, with_it) = run(clip=False), run(clip=True)
    assert same(plain, clipped)
    assert equal(without, with_it)


def test_a_step_that_a_scaler_leaves_out_leaves_no_gradient_to_grow_by():
    def run(skipped):
        model = mlp()
        optimizer = sgd(model)
        pruner = METHODS["rigl"](model, optimizer)
        train(model, optimizer, pruner, range(3))
        for step in [99, 3] if skipped else [3]:
            optimizer.zero_grad()
            backward(model, step)
            if step == 99:
                for parameter in model.parameters():
                    parameter.grad.fill_(math.inf)
            pruner.mask_gradients()
            if step == 99:
                assert not pruner.step()
                continue
            optimizer.step()
            assert pruner.step()
        return masks_of(pruner)

    assert equal(run(skipped=True), run(skipped=False))


def test_accumulated_gradients_grow_what_one_batch_of_them_grows():
    def run(parts):
        model = mlp().double()
        optimizer = sgd(model)
        pruner = METHODS["rigl"](model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(8, 12, generator=generator, dtype=torch.double)
            targets = torch.randint(7, (8,), generator=generator)
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            pruner.step()
        return masks_of(pruner)

    assert equal(run(1), run(4))


def test_an_exchange_waits_for_finite_gradients():
    model = mlp()
    optimizer = sgd(model)
    pruner = METHODS["rigl"](model, optimizer)
    train(model, optimizer, pruner, range(3))
    before = masks_of(pruner)
    optimizer.zero_grad()
    backward(model, 3)
    model[0].weight.grad[~before["0.weight"]] = math.inf
    optimizer.step()
    with pytest.warns(UserWarning, match=r"after step 4 masks stay as they are: gradients of '0.weight'"):
        assert not pruner.step()
    assert equal(before, masks_of(pruner))
    assert train(model, optimizer, pruner, [4]) == [5]
    assert not equal(before, masks_of(pruner))
    train(model, optimizer, pruner, range(5, STEPS))
    assert all(parameter.isfinite().all() for parameter in model.parameters())  # also of what was infinite, and grew


def test_a_weight_without_a_gradient_keeps_its_mask():
    class Unused(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    torch.manual_seed(0)
    model = Unused(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 8))
    optimizer = sgd(model)
    pruner = METHODS["rigl"](model, optimizer)
    before = masks_of(pruner)
    train(model, optimizer, pruner, range(STEPS))
    after = masks_of(pruner)
    assert [torch.equal(before[n], after[n]) for n in before] == [False, False, True]


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
def test_random_places_do_not_depend_on_how_many_processes_draw_them(pattern):
    model = mlp()
    pruner = SET(model, sgd(model), "sparsity=80%", STEPS, every=4, pattern=pattern)
    whole = pruner.random("0.weight", "5")
    assert whole.shape == (16, 12)
    assert len(whole.unique()) == 192 // {"unstructured": 1, "block:4x2": 8}[pattern]
    for first, rows in ((0, 8), (8, 8), (4, 12)):
        pruner.parts["0.weight"] = Part((16, 12), first, rows, group=object())
        drawn = pruner.random("0.weight", "5")
        assert torch.equal(drawn, whole[first : first + rows])
    assert not torch.equal(pruner.random("0.weight", "6"), drawn)
    assert not torch.equal(pruner.random("2.weight", "5").flatten()[:96], whole.flatten()[:96])


def test_random_growth_reaches_every_place():
    model = mlp()
    optimizer = sgd(model)
    pruner = SET(model, optimizer, "sparsity=80%", 400, every=2, fraction=0.6)
    ever = {name: mask.clone() for name, mask in masks_of(pruner).items()}

    def check(step):
        for name in ever:
            ever[name] |= pruner.mask(name)

    train(model, optimizer, pruner, range(400), check)
    assert all(mask.all() for mask in ever.values())


# --- AC/DC -----------------------------------------------------------------------------------------


def test_phases_are_the_papers():
    stages = phases(part("sparsity=90%"), 100, 0.1, 0.05, 0.1, 0.15)
    assert [s.step for s in stages if s.budget is not None] == [10, 20, 30, 40, 50, 60, 70, 85]
    assert [s.step for s in stages if s.budget is None] == [15, 25, 35, 45, 55, 65, 75]


@pytest.mark.parametrize(
    "parts", [(0.1, 0.1, 0.1, 0.15), (0, 0.3, 0.2, 0.2), (0.2, 0.9, 0.3, 0.3), (0.1, 0.07, 0.1, 0)]
)
def test_phases_alternate_and_end_sparse_whatever_their_lengths(parts):
    stages = phases(part("sparsity=90%"), 1000, *parts)
    assert [s.budget is None for s in stages] == [bool(i % 2) for i in range(len(stages))]
    assert stages[-1].budget is not None
    assert stages[0].step == round(parts[0] * 1000)
    assert (1000 - stages[-1].step, stages[-1].step - stages[-2].step) == pytest.approx(
        (parts[3] * 1000, parts[2] * 1000)
    )


def test_what_has_gone_trains_again_in_dense_phases():
    model = mlp()
    optimizer = sgd(model)
    pruner = METHODS["acdc"](model, optimizer)
    assert train(model, optimizer, pruner, range(6)) == [4, 6]
    assert pruner.sparsity == 0
    gone = model[0].weight == 0
    assert gone.sum() > 100
    train(model, optimizer, pruner, [6])
    assert (model[0].weight[gone] != 0).any()
    assert train(model, optimizer, pruner, range(7, STEPS))[-1] == 34
    assert pruner.sparsity == 0.8


@pytest.mark.parametrize(
    "make",
    [
        sgd, adam,
        lambda m: torch.optim.AdamW(m.parameters(), 0.01, amsgrad=True),
        lambda m: torch.optim.RMSprop(m.parameters(), 0.01, momentum=0.9, centered=True),
        lambda m: torch.optim.Adagrad(m.parameters(), 0.01),
        lambda m: torch.optim.Adamax(m.parameters(), 0.01),
        lambda m: torch.optim.Adadelta(m.parameters()),
    ],
)  # fmt: skip
def test_the_optimizer_forgets_all_moments_at_each_decompression(make):
    model = mlp()
    optimizer = make(model)
    pruner = METHODS["acdc"](model, optimizer)
    train(model, optimizer, pruner, range(5))
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert any((v != 0).any() for v in held)
    assert train(model, optimizer, pruner, [5]) == [6]
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert held
    assert not any((v != 0).any() for v in held)


def test_adams_first_step_after_a_decompression_is_no_longer_than_its_rate():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = METHODS["acdc"](model, optimizer)
    train(model, optimizer, pruner, range(6))
    before = model[0].weight.detach().clone()
    train(model, optimizer, pruner, [6])
    assert (model[0].weight - before).abs().max() <= 0.01 * (1 + 1e-5)


def test_acdc_does_what_its_equations_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False)).double()
    weight = model[0].weight.detach().numpy().copy()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    schedule = [(3, "sparsity=70%"), (7, None), (12, "sparsity=70%")]
    pruner = ACDC(model, optimizer, "sparsity=70%", 20, schedule=schedule)
    wanted = torch.randn(8, 10, dtype=torch.double)
    mask, buffer = np.ones_like(weight), np.zeros_like(weight)
    for step in range(1, 21):
        x = torch.randn(4, 10, dtype=torch.double)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x @ wanted.T).backward()
        optimizer.step()
        pruner.step()
        inputs, targets = x.numpy(), (x @ wanted.T).numpy()
        buffer = 0.9 * buffer + 2 / targets.size * (inputs @ weight.T - targets).T @ inputs * mask
        weight = (weight - 0.2 * buffer) * mask
        if step in (3, 12):
            mask = np.abs(weight) >= np.sort(np.abs(weight), axis=None)[-24]
            weight, buffer = weight * mask, buffer * mask
        elif step == 7:
            mask, buffer = np.ones_like(weight), np.zeros_like(weight)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
    assert (weight != 0).sum() == 24


# --- ASP -------------------------------------------------------------------------------------------


def test_asp_keeps_the_two_largest_of_every_four_for_good():
    model = mlp()
    dense = model[0].weight.detach().clone()
    optimizer = sgd(model)
    pruner = ASP(model, optimizer, steps=STEPS)
    best = dense.abs().view(-1, 4).argsort(1, descending=True)[:, :2]
    wanted = torch.zeros(48, 4, dtype=torch.bool).scatter_(1, best, True).view(16, 12)
    assert torch.equal(model[0].weight, dense * wanted)
    assert train(model, optimizer, pruner, range(STEPS)) == []
    assert torch.equal(model[0].weight != 0, wanted)
    assert pruner.finish().allocation.kept == {"0.weight": 96, "2.weight": 64}


def test_asp_prunes_after_the_step_it_is_told():
    model = mlp()
    optimizer = sgd(model)
    pruner = ASP(model, optimizer, steps=STEPS, at=5)
    assert train(model, optimizer, pruner, range(5)) == [5]
    assert pruner.sparsity == 0.5
    assert train(model, optimizer, pruner, range(5, STEPS)) == []


# --- bad input -------------------------------------------------------------------------------------

WRONG = {
    "RigL: fraction": (lambda m, o: RigL(m, o, "sparsity=80%", 400, fraction=1), "fraction is 1"),
    "RigL: start": (lambda m, o: RigL(m, o, "sparsity=80%", 400, start="ones"), "expected random, from scratch"),
    "RigL: never": (lambda m, o: RigL(m, o, "sparsity=80%", 100), "every 100 steps before step 75 of 100, so never"),
    "RigL: late": (lambda m, o: RigL(m, o, "sparsity=80%", 400, end=500), "before step 500 of 400"),
    "RigL: every": (lambda m, o: RigL(m, o, "sparsity=80%", 400, every=0), "every 0 steps"),
    "RigL: budget": (lambda m, o: RigL(m, o, None, 400), "needs a budget"),
    "RigL: channel": (lambda m, o: RigL(m, o, "macs=50%", 400, pattern="channel"), "RigL prunes unstructured"),
    "RigL: steps": (lambda m, o: RigL(m, o, "sparsity=80%"), "steps is 0"),
    "RigL: gradients": (
        lambda m, o: RigL(m, o, "sparsity=80%", 400, start="magnitude", criterion="taylor"),
        "before the first step",
    ),
    "SET: allocate": (lambda m, o: SET(m, o, "sparsity=80%", 400, allocate="best"), "allocation"),
    "ACDC: phase": (lambda m, o: ACDC(m, o, "sparsity=80%", 400, phase=0), "phases do not fit"),
    "ACDC: late": (lambda m, o: ACDC(m, o, "sparsity=80%", 400, warmup=0.8), "a warm-up of 0.8"),
    "ACDC: last": (lambda m, o: ACDC(m, o, "sparsity=80%", 400, last_dense=-0.1), "-0.1 dense and 0.15 sparse"),
    "ACDC: short": (lambda m, o: ACDC(m, o, "sparsity=80%", 10), "shorter than a step"),
    "ACDC: dense": (lambda m, o: ACDC(m, o, "sparsity=80%", 10, schedule=[(1, None)]), "last one with sparsity=80%"),
    "ASP: at": (lambda m, o: ASP(m, o, steps=40, at=41), "after step 41 of 40"),
    "ASP: gradients": (lambda m, o: ASP(m, o, steps=40, criterion="taylor"), "before the first step"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_done_is_said_and_leaves_the_model_alone(wrong):
    make, message = WRONG[wrong]
    model, before = mlp(), mlp()
    optimizer = sgd(model)
    with pytest.raises(SpecError, match=message):
        make(model, optimizer)
    assert same(model, before)


def test_other_budgets_than_its_own_are_none_for_two_of_four():
    model = mlp()
    with pytest.raises(BudgetError, match="leave the budget out"):
        ASP(model, sgd(model), "sparsity=90%", 40)


def test_a_trained_network_with_nan_in_it_is_no_start():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(DataError, match=r"scores of '0.weight' are not finite"):
        ASP(model, sgd(model), steps=40)


def test_the_part_that_is_exchanged_is_rounded_down():
    model = mlp()
    optimizer = sgd(model)
    pruner = SET(model, optimizer, "sparsity=80%", STEPS, every=4, fraction=0.01)
    before = masks_of(pruner)
    train(model, optimizer, pruner, range(STEPS))
    assert equal(before, masks_of(pruner))  # 1 % of 34 and of 30 is none
