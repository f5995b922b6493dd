"""The options of fine-tuning: schedules, steps, averages, formats, and what is refused."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from resumed import blobs, network, plan
from torch import nn
from torch.nn import functional as F

from secateur.errors import DataError, SpecError
from secateur.recover import recover, rewind
from secateur.recover.schedules import cosine, steps
from secateur.tasks import Classification, Pass


def task(**changes):
    parts = {"train": blobs(96, 0), "validation": blobs(60, 1), "test": blobs(60, 2), "batch_size": 8}
    return Classification(**(parts | changes))


class Losing(Classification):
    """Validation scores only rise, so that ``recover`` gives the last weights."""

    def scores(self, output, target):
        Losing.asked += 1
        return torch.full((len(target),), float(Losing.asked))

    asked = 0


def last(model, data, **options):
    """The weights after the last epoch."""
    parts = {name: getattr(data, name) for name in ("train", "validation", "test", "batch_size", "augment")}
    found, _ = recover(model, Losing(**parts), **options)
    return found


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def close(a, b, atol=1e-6):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- schedules --------------------------------------------------------------------------------------


def test_the_cosine_rises_then_falls_to_nothing():
    rates = [cosine((i + 0.5) / 100) for i in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert (cosine(0), cosine(0.05), cosine(1)) == (0, 1, pytest.approx(0))
    assert cosine(0.025) == 0.5
    assert cosine(0.525) == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01 < rates[0]


def test_rewinding_replays_the_end_of_the_original():
    seen = rewind(lambda done: done, 0.6)
    assert [seen(0), seen(0.5), seen(1)] == pytest.approx([0.6, 0.8, 1])
    assert [steps(x) for x in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    default = rewind()
    assert [default(x) for x in (0, 0.3, 0.4, 0.6, 0.7, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    for start in (-0.1, 1, math.nan):
        with pytest.raises(SpecError, match=r"rewind starts at .* from 0 to below 1"):
            rewind(start=start)


def spy(rates):
    """SGD that notes the rate of every step."""

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            super().step(closure)

    return Spy


def test_a_schedule_is_asked_at_the_middle_of_every_step_and_anew_in_every_call():
    for _ in range(2):
        rates = []
        _, history = recover(
            linear(), task(), epochs=2, lr=2.0, schedule=lambda d: d, optimizer=spy(rates), accumulate=5
        )
        assert [rate for (rate,) in rates] == pytest.approx([2 * (i + 0.5) / 6 for i in range(6)])
        assert [epoch.lr for epoch in history] == [rates[2][0], rates[5][0]]


def test_groups_with_rates_of_their_own_keep_their_proportion():
    rates = []

    def optimizer(parameters, lr):
        big, small = ([p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False))
        return spy(rates)([{"params": big}, {"params": small, "lr": lr / 10}], lr=lr)

    recover(linear(), task(), epochs=1, lr=1.0, optimizer=optimizer)
    assert len(rates) == 12
    assert all(other == pytest.approx(rate / 10) for rate, other in rates)
    assert rates[3][0] > rates[9][0] > 0


@pytest.mark.parametrize("factor", [-0.1, math.nan, "fast"])
def test_a_schedule_that_gives_no_factor_is_named(factor):
    with pytest.raises(SpecError, match=r"the schedule gave .* at 50% of the steps, expected a number from 0 up"):
        recover(linear(), task(), schedule=lambda done: factor)


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "small", "accumulate"), [(96, 8, 4), (96, 8, 5), (96, 24, 9)])
def test_accumulated_batches_are_one_big_batch(examples, small, accumulate):
    """The last group is a partial one in the second and third case."""
    x, y = blobs(examples, 0)

    class Ordered(Losing):
        def batches(self, split):
            size = self.batch_size
            return Pass(-(-len(x) // size), lambda i: (x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]))

    parts = {"train": (x, y), "validation": blobs(9, 1), "test": blobs(9, 2)}
    many = Ordered(**parts, batch_size=small)
    one = Ordered(**parts, batch_size=small * accumulate)
    model = nn.Sequential(linear(), nn.LayerNorm(3), nn.Linear(3, 3))
    a, _ = recover(model, many, epochs=3, lr=0.1, accumulate=accumulate)
    b, _ = recover(model, one, epochs=3, lr=0.1)
    assert close(a, b)
    assert not close(a, model)


def test_batches_of_a_group_count_by_their_examples():
    x, y = blobs(30, 0)
    parts = {"train": (x, y), "validation": (x, y), "test": (x, y)}

    class Uneven(Losing):
        def batches(self, split):
            yield from ((x[:20], y[:20]), (x[20:], y[20:]))

    class Whole(Losing):
        def batches(self, split):
            yield x, y

    a, _ = recover(linear(), Uneven(**parts), epochs=2, accumulate=2)
    b, _ = recover(linear(), Whole(**parts), epochs=2)
    assert close(a, b)


def test_clipping_bounds_the_step():
    model = linear()
    sgd = partial(torch.optim.SGD, momentum=0)
    moved = last(model, task(batch_size=96), epochs=1, lr=1.0, schedule=lambda d: 1, optimizer=sgd, clip=1e-3)
    step = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), moved.parameters(), strict=True)])
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_masked_weights_do_not_count_in_the_norm_of_the_gradient():
    """The step of the others is as long as clipping allows."""
    model, chosen = network(0), plan()
    model[3].p = 0.0
    with torch.no_grad():
        model[0].weight[~chosen.masks["0.weight"]] = 0
    sgd = partial(torch.optim.SGD, momentum=0)
    options = {"epochs": 1, "lr": 1.0, "schedule": lambda d: 1, "optimizer": sgd, "clip": 1e-3}
    moved = last(model, task(batch_size=96), plan=chosen, **options)
    step = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), moved.parameters(), strict=True)])
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "torch.optim:AdamW", "ema": 0.9},
        {"clip": 0.1, "accumulate": 2, "amp": "fp16"},
        {"schedule": "rewind", "ema": 0.5, "amp": True},
    ],
)
def test_zeros_stay_zero(options):
    keep = plan().masks["0.weight"]
    model = last(network(0), task(), epochs=2, plan=plan(), teacher=network(1), **options)
    assert (model[0].weight[~keep] == 0).all()
    assert (model[0].weight[keep] != 0).all()


def test_adamw_decays_weights():
    decay = {p: partial(torch.optim.AdamW, weight_decay=p) for p in (0.0, 0.5)}
    found = [last(linear(), task(), epochs=2, lr=0.1, optimizer=decay[p]).weight.norm() for p in decay]
    assert found[1] < 0.9 * found[0]


# --- average ----------------------------------------------------------------------------------------


def test_the_average_is_the_one_computed_by_hand():
    """Steps are observed from outside; early ones average over less."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            seen.append([p.detach().clone() for p in self.param_groups[0]["params"]])

    model = linear()
    averaged = last(model, task(), epochs=2, lr=0.1, ema=0.3, optimizer=Watched)
    mean = [p.detach().clone() for p in model.parameters()]
    for step, weights in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        mean = [decay * m + (1 - decay) * w for m, w in zip(mean, weights, strict=True)]
    assert len(seen) == 24
    for found, expected in zip(averaged.parameters(), mean, strict=True):
        torch.testing.assert_close(found.detach(), expected)
    assert not torch.allclose(averaged.weight, seen[-1][0])


def test_the_average_covers_running_statistics_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.norm(self.b(self.a(x))))

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            weights.append(self.param_groups[0]["params"][0].detach().clone())

    def watch(norm, *_):
        if norm.training:
            statistics.append(norm.running_mean.clone())

    weights, statistics, model = [], [], Tied()
    model.norm.register_forward_hook(watch)
    averaged = last(model, task(), epochs=1, lr=0.1, ema=0.5, optimizer=Watched)
    assert averaged.b.weight is averaged.a.weight
    assert int(averaged.norm.num_batches_tracked) == len(weights) == len(statistics) == 12
    for seen, found in ((weights, averaged.a.weight), (statistics, averaged.norm.running_mean)):
        mean = model.a.weight if seen is weights else model.norm.running_mean
        for step, value in enumerate(seen):
            decay = min(0.5, (1 + step) / (10 + step))
            mean = decay * mean + (1 - decay) * value
        torch.testing.assert_close(found, mean)


def test_validation_is_of_the_average():
    """Weights that jump to and fro average to something that is right."""
    x = torch.ones(8, 1)
    y = torch.zeros(8, dtype=torch.long)

    class Jumping(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})
            self.sign = 1

        def step(self, closure=None):
            self.sign = -self.sign
            for p in self.param_groups[0]["params"]:
                p.data.copy_(torch.tensor([[0.5 + self.sign], [0.0]]))

    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.data[1] = 1
    data = Classification((x, y), (x, y), (x, y), batch_size=1)
    options = {"epochs": 1, "optimizer": Jumping}
    assert [e.validation for e in recover(model, data, **options, ema=0.9)[1]] == [1.0]
    data = Classification((x[:7], y[:7]), (x, y), (x, y), batch_size=1)
    assert [e.validation for e in recover(model, data, **options)[1]] == [0.0]


# --- half precision ---------------------------------------------------------------------------------


class Overflowing(Losing):
    """A finite loss whose gradient is too large for fp16 at the scaler's first scale."""

    factor = 1.0

    def loss(self, output, target):
        return F.cross_entropy(output.float(), target) * self.factor


@pytest.mark.parametrize(("factor", "overflows"), [(1.0, False), (30.0, True)])
def test_steps_that_overflow_in_fp16_do_not_count(factor, overflows):
    """The schedule waits while the scale is halved until gradients fit."""
    rates = []
    parts = {"train": blobs(96, 0), "validation": blobs(9, 1), "test": blobs(9, 2), "batch_size": 8}
    data = Overflowing(**parts)
    object.__setattr__(data, "factor", factor)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    nn.init.constant_(model[1].weight, 1.0)
    better, history = recover(
        model, data, epochs=1, lr=1e-4, amp="fp16", schedule=lambda done: done + 1, optimizer=spy(rates)
    )
    assert 0 < len(rates) < 12 if overflows else len(rates) == 12
    assert [r for (r,) in rates] == pytest.approx([1e-4 * (1 + (i + 0.5) / 12) for i in range(len(rates))])
    assert history[0].lr == pytest.approx(rates[-1][0])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in better.parameters())


def test_gradients_that_fit_at_no_scale_are_named():
    class Broken(Losing):
        def loss(self, output, target):
            return (
                torch.where(output > 1e9, output, torch.zeros(())).sum() + 0 * (output - output.detach()).sqrt().sum()
            )

    parts = {"train": blobs(960, 0), "validation": blobs(9, 1), "test": blobs(9, 2), "batch_size": 8}
    with pytest.raises(DataError, match="gradients overflow in fp16 at every scale; use amp='bf16'"):
        recover(linear(), Broken(**parts), epochs=1, amp="fp16")


# --- the caller's world -----------------------------------------------------------------------------


def test_all_random_states_are_as_before():
    model = network(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    recover(model, task(), epochs=1)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_result_does_not_depend_on_the_callers_random_state():
    found = []
    for seed in (1, 2):
        model = network(0)
        torch.manual_seed(seed)
        found.append(last(model, task(), epochs=1))
    assert close(*found, atol=0)


def test_no_epochs_give_a_copy(tmp_path):
    model = network(0)
    same, history = recover(model, task(), epochs=0, checkpoint=tmp_path)
    assert history == ()
    assert same is not model
    assert close(same, model, atol=0)
