"""Methods whose network computes with other weights than those that are trained: SR-STE, STR, movement, L0.

Trajectories are those of the same forward pass written for autograd, with torch's own optimizers.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_nets import adam, backward, batch, convnet, mlp, same, sgd, train

from secateur.errors import DataError, PlanError, SpecError
from secateur.patterns import nm_mask, parse, pool, spread
from secateur.train import L0, SRSTE, STR, Movement, SoftMovement
from secateur.train.latent import LATENT, adam_, risen
from secateur.train.places import weights_of
from secateur.train.shards import noise

STEPS = 40
BUDGET = "sparsity=80%"
METHODS = {"srste": SRSTE, "str": STR, "movement": Movement, "soft": SoftMovement, "l0": L0}
FITS = [(m, p) for m in METHODS for p in ("unstructured", "block:4x2", "2:4")]
FITS = [(m, p) for m, p in FITS if p == "unstructured" or (m != "str" and (m, p) != ("l0", "2:4"))]


def made(method, model, optimizer, pattern="unstructured", **more):
    budget = None if ":" in pattern and pattern[0].isdigit() else BUDGET
    return METHODS[method](model, optimizer, budget, STEPS, pattern=pattern, **more)


# --- update equations, against autograd -------------------------------------------------------------


class Reference:
    """``mlp`` with the weights that a method trains, whose forward pass computes with what ``effective`` makes."""

    def __init__(self, effective):
        self.model, self.effective, self.given = mlp(), effective, {}
        self.optimizer = sgd(self.model)

    @property
    def weights(self):
        return {name: p for name, p in self.model.named_parameters() if p.ndim > 1}

    def backward(self, step, dense):
        """Gradients of the step's loss, also of what the effective weights are; the first step is dense."""
        self.given = {n: w if dense else self.effective(n, w, step) for n, w in self.weights.items()}
        for value in self.given.values():
            if value.requires_grad and not value.is_leaf:
                value.retain_grad()
        inputs, targets = batch(self.model, step)
        F.cross_entropy(torch.func.functional_call(self.model, self.given, (inputs,)), targets).backward()


def follow(pruner, model, optimizer, reference, steps, between=None, beside=()):
    """Walk both for as many steps, and hold what is trained, and what is computed with, against each other."""
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        pruner.step()
        for other in (reference.optimizer, *beside):
            other.zero_grad()
        reference.backward(step, dense=step == 0)
        if between is not None:
            between(step)
        for other in (reference.optimizer, *beside):
            other.step()
        for name, weight in reference.weights.items():
            torch.testing.assert_close(pruner.value(name), weight.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [2e-4, 0.3])
def test_srste_is_the_paper_s_autograd_function(decay):
    class Sparse(torch.autograd.Function):  # as in the authors' code
        @staticmethod
        def forward(context, weight, mask):
            context.save_for_backward(weight, mask)
            return weight * mask

        @staticmethod
        def backward(context, grad):
            weight, mask = context.saved_tensors
            return grad + decay * (1 - mask) * weight, None

    known = weights_of(mlp())
    reference = Reference(
        lambda n, w, _: Sparse.apply(w, nm_mask(parse("2:4"), w.detach().abs(), known[n]).to(w.dtype))
    )
    model = mlp()
    optimizer = sgd(model)
    pruner = SRSTE(model, optimizer, None, STEPS, pattern="2:4", decay=decay)
    first = {n: pruner.value(n).clone() for n in known}
    follow(pruner, model, optimizer, reference, 6)
    for name, weight in reference.weights.items():
        mask = nm_mask(parse("2:4"), weight.detach().abs(), known[name])
        assert torch.equal(pruner.mask(name), mask)
        assert torch.equal(model.get_parameter(name) != 0, mask)
        assert (pruner.value(name) != first[name])[~mask].any()  # what is masked is trained


def test_str_learns_weights_and_thresholds_as_autograd_does():
    thresholds = {n: nn.Parameter(torch.tensor(-4.0)) for n in weights_of(mlp())}
    reference = Reference(lambda n, w, _: w.sign() * torch.relu(w.abs() - thresholds[n].sigmoid()))
    beside = torch.optim.SGD(thresholds.values(), lr=0.5, weight_decay=0.02)
    model = mlp()
    optimizer = sgd(model)
    pruner = STR(model, optimizer, BUDGET, STEPS, initial=-4.0, rate=0.5, decay=0.02)
    follow(pruner, model, optimizer, reference, 6, beside=[beside])
    for name, threshold in thresholds.items():
        assert abs(float(threshold.detach()) + 4 * 0.99**5) > 1e-3  # more than decay alone
        torch.testing.assert_close(pruner.state[name]["threshold"], threshold.detach(), rtol=1e-5, atol=1e-6)
        effective = reference.effective(name, reference.weights[name], 6)
        torch.testing.assert_close(model.get_parameter(name), effective, rtol=1e-5, atol=1e-7)


def test_thresholds_follow_the_optimizer_s_learning_rate_and_arrive_where_the_budget_cuts():
    model = mlp()
    optimizer = sgd(model)
    pruner = STR(model, optimizer, BUDGET, STEPS)
    train(model, optimizer, pruner, [0])
    cut = torch.cat([pruner.value(n).abs().flatten() for n in pruner.weights]).sort().values[255]  # of 320
    for name in pruner.weights:
        start, shrink = (pruner.state[name][key] for key in ("threshold", "shrink"))
        below = pruner.value(name).abs()
        goal = torch.logit(below[below <= cut].max())
        torch.testing.assert_close(start, goal - 5)
        torch.testing.assert_close(start * shrink ** (30 - 1), goal)
    before = {n: s["threshold"].clone() for n, s in pruner.state.items()}
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, pruner, [1])
    for name, kept in pruner.state.items():  # no rate, no gradient
        assert torch.equal(kept["threshold"], before[name] * kept["shrink"])


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2", "2:4"])
def test_movement_scores_are_those_of_autograd_and_choose_the_masks(pattern):
    known, shape = weights_of(mlp()), parse(pattern)
    scores = {n: nn.Parameter(torch.zeros(w.shape)) for n, w in known.items()}
    kept = {}

    class Top(torch.autograd.Function):
        @staticmethod
        def forward(context, scores, mask):
            return mask.to(scores.dtype)

        @staticmethod
        def backward(context, grad):
            return grad, None

    def chosen():
        """Masks of the best scores for what the schedule wants now."""
        if pattern == "2:4":  # three of four on the way
            removed = pruner.schedule[pruner.done - 1].budget.value
            now = parse(f"{max(2, math.ceil(4 * (1 - removed)))}:4") if removed >= 0.25 else None
            ones = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
            return {n: nm_mask(now, s.detach(), known[n]) for n, s in scores.items()} if now else ones
        units = {n: pool(shape, s.detach(), known[n]) for n, s in scores.items()}
        count = sum(u.numel() for u in units.values())
        left = int((1 - pruner.schedule[pruner.done - 1].budget.value) * count)
        least = torch.cat(list(units.values())).sort(descending=True).values[left - 1]
        return {n: spread(shape, u >= least, known[n]) for n, u in units.items()}

    def effective(name, weight, step):
        return weight * Top.apply(scores[name], kept[name])

    reference = Reference(effective)
    beside = torch.optim.SGD(scores.values(), lr=1e-2)
    model = mlp()
    optimizer = sgd(model)
    pruner = Movement(
        model, optimizer, None if pattern == "2:4" else BUDGET, STEPS, pattern=pattern, begin=0, end=8, every=1
    )

    class Beside:  # scores are stepped before masks are chosen, both before the method's are read
        @staticmethod
        def zero_grad():
            beside.zero_grad()

        @staticmethod
        def step():
            beside.step()
            kept.update(chosen())

    def between(step):
        if step == 0:  # the forward pass was dense: dL/dS is w dL/dw all the same
            for name, weight in reference.weights.items():
                scores[name].grad = weight.detach() * weight.grad

    follow(pruner, model, optimizer, reference, 7, between, [Beside])
    for name in known:
        torch.testing.assert_close(pruner.state[name]["scores"], scores[name].detach(), rtol=1e-5, atol=1e-9)
        assert torch.equal(pruner.mask(name), kept[name])
        torch.testing.assert_close(
            model.get_parameter(name), reference.weights[name].detach() * kept[name], rtol=1e-5, atol=1e-7
        )
    assert pruner.sparsity > (0.2 if pattern == "2:4" else 0.7)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
def test_soft_movement_is_adam_on_loss_and_penalty(pattern):
    known, shape = weights_of(mlp()), parse(pattern)
    units = {n: nn.Parameter(torch.zeros_like(pool(shape, torch.zeros(w.shape), w))) for n, w in known.items()}
    begin, end, threshold, penalty = 1, 10, 0.4, 3.0

    class Over(torch.autograd.Function):
        @staticmethod
        def forward(context, scores, level):
            return (scores.sigmoid() > level).to(scores.dtype)

        @staticmethod
        def backward(context, grad):
            return grad, None

    def effective(name, weight, step):
        gates = Over.apply(units[name], threshold * risen(step, begin, end))
        return weight * spread(shape, gates, known[name])

    reference = Reference(effective)
    beside = torch.optim.Adam(units.values(), lr=0.2)

    def between(step):
        if step == 0:
            for name, weight in reference.weights.items():
                product = weight.detach() * weight.grad
                sums = pool(shape, product, known[name]) * (product.numel() // units[name].numel())
                units[name].grad = sums
        (penalty * risen(step, begin, end) * sum(u.sigmoid().mean() for u in units.values()) / len(units)).backward()

    model = mlp()
    optimizer = sgd(model)
    pruner = SoftMovement(
        model, optimizer, BUDGET, STEPS, pattern=pattern, begin=begin, end=end, threshold=threshold, penalty=penalty,
        rate=0.2,
    )  # fmt: skip
    follow(pruner, model, optimizer, reference, 7, between, [beside])
    for name, own in units.items():
        torch.testing.assert_close(
            pruner.state[name]["scores"], spread(shape, own.detach(), known[name]), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(model.get_parameter(name) != 0, effective(name, reference.weights[name], 7) != 0)
    assert 0.05 < pruner.sparsity < 0.95


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
def test_gates_learn_as_autograd_says_through_the_noise_and_the_budget(pattern):
    known, shape = weights_of(mlp()), parse(pattern)
    units = {n: nn.Parameter(torch.full_like(pool(shape, torch.zeros(w.shape), w), 1.0)) for n, w in known.items()}
    multipliers = [torch.zeros(()), torch.zeros(())]
    model = mlp()
    optimizer = sgd(model)
    pruner = L0(
        model, optimizer, BUDGET, STEPS, pattern=pattern, initial=1.0, rate=0.1, multiplier_rate=5.0, begin=0, end=20
    )

    def effective(name, weight, step):
        drawn = noise(f"0 {step} {name}", shape_of(units[name], known[name], shape), torch.device("cpu")).flatten()
        u = drawn.clamp(1e-6, 1 - 1e-6)
        s = ((u.log() - (1 - u).log() + units[name]) / (2 / 3)).sigmoid()
        return weight * spread(shape, (s * 1.2 - 0.1).clamp(0, 1), known[name])

    def expected():
        shut = [(1 - (u - 2 / 3 * math.log(0.1 / 1.1)).sigmoid()) for u in units.values()]
        return sum(p.sum() for p in shut) * (320 // sum(p.numel() for p in shut)) / 320

    def between(step):
        if step:
            beyond = expected() - 0.8 * min(1, step / 10)
            (multipliers[0] * beyond + multipliers[1] * beyond**2).backward()
            multipliers[0] += 5.0 * beyond.detach()
            multipliers[1] += 5.0 * beyond.detach() ** 2

    reference = Reference(effective)
    beside = torch.optim.Adam(units.values(), lr=0.1)
    follow(pruner, model, optimizer, reference, 8, between, [beside])
    for name, own in units.items():
        torch.testing.assert_close(
            pruner.state[name]["log_alpha"], spread(shape, own.detach(), known[name]), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            model.get_parameter(name), effective(name, reference.weights[name], 8), rtol=1e-4, atol=1e-6
        )
    first = pruner.state[next(iter(known))]
    torch.testing.assert_close([first["first"], first["second"]], multipliers, rtol=1e-4, atol=1e-5)
    assert pruner.expected == pytest.approx(float(expected().detach()), abs=1e-5)


def shape_of(units, weight, shape):
    from secateur.train.shards import Part

    whole = weight.shape if str(shape) == "unstructured" else (units.numel(),)
    return Part(whole, 0, whole[0])


def test_adam_is_torch_s():
    torch.manual_seed(0)
    value = torch.randn(5)
    theirs, state = nn.Parameter(value.clone()), {}
    optimizer = torch.optim.Adam([theirs], lr=0.03)
    for step in range(1, 6):
        theirs.grad = torch.randn(5)
        adam_(value, theirs.grad, state, 0.03, step)
        optimizer.step()
    torch.testing.assert_close(value, theirs.detach())


# --- laws of all of them ----------------------------------------------------------------------------


def zeros_are_masks(model, pruner):
    def check(step):
        for name in pruner.bits:
            assert not model.get_parameter(name)[~pruner.mask(name)].any()

    return check


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(("method", "pattern"), FITS)
def test_budgets_are_met_exactly_and_zeros_are_zero(method, pattern, make):
    model = mlp()
    optimizer = make(model)
    pruner = made(method, model, optimizer, pattern)
    train(model, optimizer, pruner, range(STEPS), zeros_are_masks(model, pruner))
    latent = [name for name, kept in pruner.state.items() if kept]
    assert not latent  # let go of
    plan = pruner.finish()
    kept = {"unstructured": 64, "block:4x2": 64, "2:4": 160}[pattern]  # of 12 x 16 + 16 x 8
    assert sum(int(plan.keep(name).sum()) for name in pruner.weights) == kept
    assert pruner.sparsity == 1 - kept / 320
    for name in pruner.weights:
        weight, keep = model.get_parameter(name), plan.keep(name)
        assert not weight[~keep].any()
        assert pattern != "2:4" or (keep.view(-1, 4).sum(1) == 2).all()
        for moment in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[weight]:
                assert not optimizer.state[weight][moment][~keep].any()
    model[0].weight.grad = torch.ones(16, 12)
    optimizer.step()  # it is the optimizer's own again
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_of_all_kinds(method, pattern):
    if method == "str" and pattern != "unstructured":
        pytest.skip("unstructured only")
    model = convnet()
    optimizer = adam(model)
    pruner = made(method, model, optimizer, pattern, allocate="uniform")
    train(model, optimizer, pruner, range(STEPS), zeros_are_masks(model, pruner))
    plan = pruner.finish()
    total, kept = sum(w.numel for w in pruner.weights.values()), 0
    for name in pruner.weights:
        kept += int(plan.keep(name).sum())
        assert not model.get_parameter(name)[~plan.keep(name)].any()
        assert plan.allocation.kept[name] == pytest.approx(0.2 * plan.allocation.total[name], abs=2)
    assert 0.2 * total - 3 * 16 < kept <= 0.2 * total  # at most a block of each weight too few, nothing too many


@pytest.mark.parametrize(("method", "pattern"), FITS)
@pytest.mark.parametrize("at", [3, 17, 35])
def test_a_training_goes_on_to_the_bit(method, pattern, at, tmp_path):
    def start():
        model = mlp()
        optimizer = adam(model)
        return model, optimizer, made(method, model, optimizer, pattern, seed=3)

    model, optimizer, pruner = start()
    train(model, optimizer, pruner, range(at))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    torch.save(saved, tmp_path / "state")
    train(model, optimizer, pruner, range(at, STEPS))
    state = torch.load(tmp_path / "state")  # tensors, numbers and texts only
    again, other, goes_on = start()
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    goes_on.load_state_dict(state["pruner"])
    assert all(torch.equal(again.state_dict()[k], v) for k, v in state["model"].items())
    train(again, other, goes_on, range(at, STEPS))
    assert same(model, again)
    a, b = pruner.finish(), goes_on.finish()
    assert all(torch.equal(a.keep(n), b.keep(n)) for n in pruner.weights)


@pytest.mark.parametrize("at", [5, 38])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_equally_and_by_itself(method, at):
    model = mlp()
    optimizer = sgd(model)
    pruner = made(method, model, optimizer)
    train(model, optimizer, pruner, range(at))
    again, other, goes_on = copy.deepcopy((model, optimizer, pruner))
    train(model, optimizer, pruner, range(at, STEPS))
    train(again, other, goes_on, range(at, STEPS))
    assert same(model, again)
    assert all(torch.equal(pruner.mask(n), goes_on.mask(n)) for n in pruner.weights)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_finite_teach_nothing(method):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = made(method, model, optimizer)
    train(model, optimizer, pruner, range(8))
    learned = {
        (n, k): v.clone() for n, kept in pruner.state.items() for k, v in kept.items() if k not in (LATENT, "shrink")
    }
    assert bool(learned) == (method != "srste")
    optimizer.zero_grad()
    backward(model, 8)
    model[2].weight.grad[0, 0] = math.inf  # of one weight; no other one learns either
    optimizer.step()
    assert pruner.applied == 9
    assert all(torch.equal(pruner.state[n][k], v) for (n, k), v in learned.items())
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.detach().nan_to_num_(0.0)
    for kept in pruner.state.values():
        if LATENT in kept:
            kept[LATENT].nan_to_num_(0.0)
    backward(model, 9)
    optimizer.step()
    assert all(not torch.equal(pruner.state[n][k], v) for (n, k), v in learned.items())


@pytest.mark.parametrize("method", ["srste", "movement", "soft", "l0"])
def test_scores_that_are_not_finite_leave_masks_as_they_are(method):
    model = mlp()
    optimizer = sgd(model)
    pruner = made(method, model, optimizer, **({} if method == "srste" else {"begin": 2, "end": 20}))
    train(model, optimizer, pruner, range(19))
    masks = {n: bits.clone() for n, bits in pruner.bits.items()}
    key = {"srste": LATENT, "l0": "log_alpha"}.get(method, "scores")
    pruner.state["0.weight"][key][0, 0] = math.nan
    with pytest.warns(UserWarning, match="after step 20 masks stay as they are: the scores of '0.weight' are not fin"):
        train(model, optimizer, pruner, [19])
    assert pruner.bits.keys() == masks.keys()
    assert all(torch.equal(pruner.bits[n], masks[n]) for n in masks)
    assert pruner.done < len(pruner.schedule)  # it is put off, not left out


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_a_scaler_leaves_out_are_none_and_scales_change_nothing(method):
    def run(scaled):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
        pruner = made(method, model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for step in range(STEPS):
            if scaled and step in (4, 20):
                model(torch.full((1, 12), math.inf)).sum().backward()
                was = {n: p.clone() for n, p in model.named_parameters()}
                scaler.step(optimizer)
                scaler.update()
                assert not pruner.step()
                assert all(torch.equal(was[n], p) for n, p in model.named_parameters())
            optimizer.zero_grad()
            inputs, targets = batch(model, step)
            loss = F.cross_entropy(model(inputs), targets)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            pruner.step()
        assert pruner.applied == STEPS
        return model, pruner

    (plain, one), (scaled, other) = run(False), run(True)
    assert same(plain, scaled)  # powers of two
    assert all(torch.equal(one.mask(n), other.mask(n)) for n in one.weights)


@pytest.mark.parametrize("method", METHODS)
def test_closures_see_what_the_network_computes_with(method):
    model, again = mlp(), mlp()
    optimizer, other = sgd(model), sgd(again)
    pruner, goes_on = made(method, model, optimizer), made(method, again, other)
    train(model, optimizer, pruner, range(20))
    for step in range(20):

        def closure(step=step):
            other.zero_grad()
            backward(again, step)

        other.step(closure)
        goes_on.step()
    assert same(model, again)


@pytest.mark.parametrize("method", METHODS)
def test_an_average_sees_effective_weights_and_has_the_zeros_in_the_end(method):
    model = mlp()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner = made(method, model, optimizer, average=average)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(12):
        train(model, optimizer, pruner, [step])
        average.update_parameters(model)
        own = {n: p.detach().clone() if not step else own[n].lerp(p.detach(), 0.1) for n, p in model.named_parameters()}
    if method not in ("srste", "movement"):  # nothing was masked yet
        for name, parameter in average.module.named_parameters():
            torch.testing.assert_close(parameter.detach(), own[name], rtol=1e-5, atol=1e-6)
    for step in range(12, STEPS):
        train(model, optimizer, pruner, [step])
        average.update_parameters(model)
    plan = pruner.finish()
    for name in pruner.weights:
        assert not average.module.get_parameter(name)[~plan.keep(name)].any()


def test_masked_gradients_are_used_until_masks_are_fixed():
    model = mlp()
    optimizer = sgd(model)
    pruner = Movement(model, optimizer, BUDGET, STEPS, begin=2, end=10)
    train(model, optimizer, pruner, range(8))
    pruner.mask_gradients()
    assert (model[0].weight.grad[~pruner.mask("0.weight")] != 0).any()
    train(model, optimizer, pruner, range(8, 12))
    backward(model, 12)
    pruner.mask_gradients()
    assert not model[0].weight.grad[~pruner.mask("0.weight")].any()


# --- each of them -----------------------------------------------------------------------------------


def test_weights_return_with_the_value_they_left_with():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Movement(model, optimizer, BUDGET, STEPS, begin=1, end=30)
    train(model, optimizer, pruner, range(2))
    gone = ~pruner.mask("0.weight")
    left = pruner.value("0.weight").clone()
    train(model, optimizer, pruner, range(2, 4))
    still = gone & ~pruner.mask("0.weight")
    assert torch.equal(pruner.value("0.weight")[still], left[still])  # no decay: as it was
    pruner.state["0.weight"]["scores"][gone] = 1e6
    train(model, optimizer, pruner, [4])
    back = gone & pruner.mask("0.weight")
    assert back.any()
    assert torch.equal(model[0].weight[back & still], left[back & still])


def test_srste_goes_along_a_curve_then_holds_and_its_masks_move_until_the_end():
    model = mlp()
    optimizer = adam(model)
    pruner = SRSTE(model, optimizer, BUDGET, STEPS, begin=4, full=20, end=36, every=4)
    assert [s.step for s in pruner.schedule] == [4, 8, 12, 16, 20, 36]
    assert train(model, optimizer, pruner, range(20)) == list(range(4, 21))
    assert pruner.sparsity == 0.8
    masks = pruner.mask("0.weight").clone()
    assert train(model, optimizer, pruner, range(20, STEPS)) == list(range(21, 37))
    assert not torch.equal(masks, pruner.mask("0.weight"))
    assert sum(pruner.finish().allocation.kept.values()) == 64


def test_criteria_made_of_gradients_choose_the_masks_of_srste():
    model = mlp()
    optimizer = sgd(model)
    pruner = SRSTE(model, optimizer, BUDGET, STEPS, begin=4, full=4, criterion="taylor")
    sums = {}
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        for name in pruner.weights:
            sums[name] = sums.get(name, 0) + model.get_parameter(name).grad.abs()
        optimizer.step()
        pruner.step()
    scores = torch.cat([(pruner.value(n).abs() * sums[n]).flatten() for n in pruner.weights])
    masks = torch.cat([pruner.mask(n).flatten() for n in pruner.weights])
    assert scores[masks].min() >= scores[~masks].max()


@pytest.mark.parametrize("end", [4, 30])
def test_str_fixes_the_largest_of_what_is_left(end):
    """Thresholds too low, or too high: the budget holds, and what stays is as the network knew it."""
    for initial in (-9.0, -0.1):
        model = mlp()
        optimizer = sgd(model)
        pruner = STR(model, optimizer, BUDGET, STEPS, initial=initial, decay=0.0, rate=0.0, end=end)
        train(model, optimizer, pruner, range(end - 1))
        assert (pruner.sparsity > 0.8) == (initial == -0.1)
        optimizer.zero_grad()
        backward(model, end - 1)
        optimizer.step()
        known = {n: model.get_parameter(n).detach().clone() for n in pruner.weights}
        pruner.step()
        for name in pruner.weights:
            assert torch.equal(model.get_parameter(name), known[name] * pruner.mask(name))
        sizes = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in pruner.weights])
        masks = torch.cat([pruner.mask(n).flatten() for n in pruner.weights])
        assert int(masks.sum()) == 64
        assert not sizes[~masks].any()
        train(model, optimizer, pruner, range(end, STEPS))
        assert sum(pruner.finish().allocation.kept.values()) == 64


def test_gates_settle_for_evaluation_and_are_drawn_again_after_it():
    model = mlp()
    optimizer = adam(model)
    pruner = made("l0", model, optimizer, initial=0.0)  # half open
    train(model, optimizer, pruner, range(10))
    drawn = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pruner.settled():
        for name in pruner.weights:
            a = pruner.state[name]["log_alpha"]
            gates = (a.sigmoid() * 1.2 - 0.1).clamp(0, 1)
            torch.testing.assert_close(model.get_parameter(name).detach(), pruner.value(name) * gates)
            assert not torch.equal(model.get_parameter(name), drawn[name])
    assert all(torch.equal(drawn[n], p) for n, p in model.named_parameters())

    def fails():
        with pruner.settled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(torch.equal(drawn[n], p) for n, p in model.named_parameters())
    train(model, optimizer, pruner, range(10, STEPS))
    held = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pruner.settled():  # gates are fixed
        assert all(torch.equal(held[n], p) for n, p in model.named_parameters())


def test_a_model_that_was_saved_settled_goes_on_as_it_was_drawn():
    def start():
        model = mlp()
        optimizer = sgd(model)
        return model, optimizer, made("l0", model, optimizer, initial=0.0)

    model, optimizer, pruner = start()
    train(model, optimizer, pruner, range(10))
    with pruner.settled():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    again, other, goes_on = start()
    for one, state in zip((again, other, goes_on), saved, strict=True):
        one.load_state_dict(state)
    assert same(model, again)


def test_the_gates_that_stay_let_through_what_they_do_without_chance():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = L0(model, optimizer, BUDGET, STEPS, initial=0.0, begin=2, end=20)
    train(model, optimizer, pruner, range(19))
    optimizer.zero_grad()
    backward(model, 19)
    optimizer.step()
    gates = {n: pruner.gates(n) for n in pruner.weights}
    value = {n: pruner.value(n).clone() for n in pruner.weights}
    pruner.step()
    for name in pruner.weights:
        assert (gates[name] < 1).all()
        expected = (value[name] * gates[name]) * pruner.mask(name)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_multipliers_bring_gates_towards_the_budget_before_it_is_forced():
    def beyond(multiplier_rate):
        model = mlp()
        optimizer = adam(model)
        pruner = L0(
            model, optimizer, "sparsity=70%", 400, begin=50, end=390, rate=0.05, multiplier_rate=multiplier_rate
        )
        train(model, optimizer, pruner, range(380))
        assert pruner.target == pytest.approx(0.7)
        return abs(pruner.expected - pruner.target)

    assert beyond(1.0) < beyond(0.0) / 2


def test_noise_of_gates_is_of_the_seed_and_the_step():
    def gates(seed, steps):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        pruner = L0(model, optimizer, BUDGET, STEPS, seed=seed)
        train(model, optimizer, pruner, range(steps))
        return pruner.drawn("0.weight")[0]

    assert torch.equal(gates(0, 2), gates(0, 2))
    assert not torch.equal(gates(0, 2), gates(1, 2))
    assert not torch.equal(gates(0, 2), gates(0, 3))


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("str", {"pattern": "block:4x2"}, "STR prunes unstructured weights"),
        ("str", {"initial": 0.5}, "initial is 0.5"),
        ("str", {"rate": -1.0}, "rate is -1.0"),
        ("str", {"decay": math.nan}, "decay is nan"),
        ("str", {"end": 41}, "from step 41 to 41 of 40"),
        ("l0", {"rate": 0.0}, "rate 0.0"),
        ("l0", {"begin": 30, "end": 20}, "from step 30 to 20"),
        ("srste", {"decay": -1.0}, "decay is -1.0"),
        ("srste", {"full": 30, "end": 20}, "from step 30 to 20"),
        ("srste", {"criterion": "activation"}, "with every step"),
        ("srste", {"schedule": [(5, "sparsity=50%")]}, "the last one with sparsity=80%"),
        ("movement", {"rate": 0.0}, "rate is 0.0"),
        ("movement", {"begin": 30, "end": 20}, "from step 30 to 20"),
        ("soft", {"threshold": 0.5}, "threshold 0.5"),
        ("soft", {"begin": 30, "end": 20}, "from step 30 to 20"),
        ("soft", {"pattern": "channel"}, "not pattern 'channel'"),
        *((m, {"criterion": "taylor"}, "takes no criterion") for m in ("str", "l0", "movement", "soft")),
    ],
)
def test_wishes_that_make_no_sense_are_refused(method, wrong, message):
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(SpecError, match=message):
        METHODS[method](model, optimizer, BUDGET, STEPS, **wrong)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_gates_have_no_groups():
    model = mlp()
    with pytest.raises(SpecError, match="L0 prunes unstructured weights and blocks"):
        L0(model, sgd(model), None, STEPS, pattern="2:4")


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_stops_early_is_no_result(method):
    model = mlp()
    optimizer = sgd(model)
    pruner = made(method, model, optimizer)
    train(model, optimizer, pruner, range(10))
    with pytest.raises(PlanError, match="10 steps were applied"):
        pruner.finish()
    train(model, optimizer, pruner, range(10, STEPS))
    assert sum(pruner.finish().allocation.kept.values()) == 64


def test_the_state_of_another_method_is_refused_and_changes_nothing():
    model = mlp()
    optimizer = sgd(model)
    pruner = made("movement", model, optimizer)
    train(model, optimizer, pruner, range(10))
    other = mlp(1)
    soft = made("soft", other, sgd(other))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(DataError, match="method was Movement, is now SoftMovement"):
        soft.load_state_dict(pruner.state_dict())
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    assert not any(soft.state.values())


def test_scores_need_a_gradient():
    model = mlp()
    optimizer = sgd(model)
    pruner = Movement(model, optimizer, BUDGET, STEPS, begin=2, end=20)
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match="no finite gradient of '0.weight' was seen"):
        pruner.step()
    assert not pruner.bits
