import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.allocate import Allocation
from secateur.errors import DataError
from secateur.plan import Plan
from secateur.recover import distillation_loss, recalibrate_, recover
from secateur.tasks import Classification, evaluate


def blobs(n, seed):
    """Three clouds of points that a linear layer tells apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])
    return centres[y] + 0.5 * torch.randn(n, 4, generator=generator), y


def task(**changes):
    parts = {"train": blobs(240, 0), "validation": blobs(90, 1), "test": blobs(90, 2), "batch_size": 16}
    return Classification(**(parts | changes))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def make_plan(masks=None, units=None):
    kept = {name: int(keep.sum()) for name, keep in (masks or units).items()}
    total = {name: keep.numel() for name, keep in (masks or units).items()}
    shapes = {name: tuple(keep.shape) for name, keep in (masks or {}).items()}
    return Plan("unstructured", "", Allocation(kept, total), masks or {}, units or {}, {}, shapes, {})


# recalibrate_


def test_recalibration_is_the_exact_average_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.7), nn.Dropout(0.9))
    model[0].running_mean.fill_(50.0)
    batches = [torch.randn(4, 3, 5, 5) * 2 + 1 for _ in range(5)]
    recalibrate_(model, iter(batches))
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].momentum == 0.7


def test_recalibration_changes_statistics_alone():
    model = network()
    model[4].eval()
    modes = [m.training for m in model.modules()]
    before = state(model)
    recalibrate_(model, [blobs(32, 5)[0]])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_recalibration_without_running_statistics_reads_no_batch():
    def batches():
        raise AssertionError("read")
        yield

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    recalibrate_(model, batches())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DataError, "no batches to recalibrate with"),
        ([torch.randn(8, 4), torch.randn(8, 5)], RuntimeError, "shapes cannot be multiplied"),
        ([torch.full((8, 4), torch.nan)], DataError, "batch norm '1' became NaN"),
    ],
)
def test_a_failed_recalibration_changes_nothing(batches, error, message):
    model = network()
    recalibrate_(model, [blobs(32, 5)[0]])
    before = state(model)
    with pytest.raises(error, match=message):
        recalibrate_(model, batches)
    assert same(state(model), before)
    assert model[1].momentum == 0.1
    assert model.training


def test_recalibration_spreads_tuples_and_dicts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, a, b):
            return self.norm(a + b)

    ones = torch.arange(8.0).view(4, 2)
    model = Two()
    recalibrate_(model, [(ones, ones), {"a": ones, "b": ones}])
    torch.testing.assert_close(model.norm.running_mean, 2 * ones.mean(0))


# distillation_loss


def test_distillation_matches_the_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected)


def test_distillation_is_zero_for_equals_and_averages_over_tokens():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    assert distillation_loss(teacher, teacher + 5, 4.0).item() == pytest.approx(0, abs=1e-5)
    flat = distillation_loss(student.view(6, 7), teacher.view(6, 7), 4.0)
    wrapped = distillation_loss(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), 4.0)
    torch.testing.assert_close(wrapped, flat)


def test_distillation_names_what_does_not_compare():
    with pytest.raises(DataError, match=r"shape \(2, 3\) from the student and shape \(2, 4\)"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 4), 4.0)
    with pytest.raises(DataError, match=r"a dict from the student"):
        distillation_loss({}, torch.ones(2, 4), 4.0)


# recover


def test_recover_trains_a_copy():
    model = network()
    model[4].eval()
    modes = [m.training for m in model.modules()]
    before, random = state(model), torch.get_rng_state()
    better, history = recover(model, task(), epochs=4, lr=0.05)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in better.modules()] == modes
    assert all(p.grad is None for p in [*model.parameters(), *better.parameters()])
    assert evaluate(better, task(), "test").mean() > max(0.9, evaluate(model, task(), "test").mean())
    assert len(history) == 4
    assert history[-1].loss < history[0].loss
    assert history[0].lr > history[-1].lr > 0
    assert all(epoch.seconds > 0 for epoch in history)


def test_the_same_seed_gives_the_same_weights():
    runs = [recover(network(), task(), epochs=2, seed=seed)[0] for seed in (1, 1, 2)]
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


def test_the_best_epoch_is_kept():
    model, history = recover(network(), task(), epochs=5, lr=0.02)
    assert evaluate(model, task(), "validation").mean() == max(epoch.validation for epoch in history)


def test_a_recovery_that_only_harms_returns_the_given_weights():
    x, y = blobs(240, 0)
    trained, _ = recover(network(), task(), epochs=3, lr=0.05)
    wrong = task(train=(x, (y + 1) % 3))
    kept, history = recover(trained, wrong, epochs=6, lr=0.1, patience=2)
    assert same(state(kept), state(trained))
    assert len(history) == 2


def test_masked_weights_stay_zero():
    model = network()
    mask = torch.rand(16, 4) < 0.5
    with torch.no_grad():
        model[0].weight.masked_fill_(~mask, 0.0)
    plan = make_plan(masks={"0.weight": mask})
    better, _ = recover(model, task(), epochs=2, plan=plan)
    assert (better[0].weight[~mask] == 0).all()
    assert (better[0].weight[mask] != 0).all()
    assert not torch.equal(better[0].weight, model[0].weight)


def test_a_plan_of_channels_asks_for_nothing():
    plan = make_plan(units={"a": torch.ones(3, dtype=torch.bool)})
    plain, with_plan = (recover(network(), task(), epochs=1, plan=p)[0] for p in (None, plan))
    assert same(state(plain), state(with_plan))


def test_a_teacher_is_followed_and_left_alone():
    """With alpha 1 the labels do not count: a student taught by a shifted teacher follows the teacher."""
    x, y = blobs(240, 0)
    teacher, _ = recover(network(1), task(train=(x, (y + 1) % 3), validation=(x, (y + 1) % 3)), lr=0.1)
    before, grads = state(teacher), [p.grad for p in teacher.parameters()]
    following = task(validation=(x, (y + 1) % 3))
    student, _ = recover(network(2), following, epochs=3, lr=0.05, teacher=teacher, alpha=1.0)
    agreement = (student.eval()(x).argmax(1) == copy.deepcopy(teacher).eval()(x).argmax(1)).float().mean()
    assert agreement > 0.9
    assert same(state(teacher), before)
    assert [p.grad for p in teacher.parameters()] == grads
    assert teacher.training


def test_alpha_zero_ignores_the_teacher():
    plain = recover(network(), task(), epochs=1)[0]
    taught = recover(network(), task(), epochs=1, teacher=network(7), alpha=0.0)[0]
    assert all(torch.allclose(a, b) for a, b in zip(plain.parameters(), taught.parameters(), strict=True))


def test_amp_computes_in_bfloat16_and_keeps_float_weights():
    seen = set()

    class Spy(Classification):
        def loss(self, output, target):
            seen.add(output.dtype)
            return F.cross_entropy(output.float(), target)

    spy = Spy(blobs(64, 0), blobs(30, 1), blobs(30, 2))
    better, _ = recover(network(), spy, epochs=1, amp=True)
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in better.parameters())


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    better, _ = recover(model, task(), epochs=1)
    assert torch.equal(better[0].weight, model[0].weight)
    assert not torch.equal(better[4].weight, model[4].weight)


def test_mistakes_are_named():
    with pytest.raises(DataError, match="no trainable parameters"):
        recover(network().requires_grad_(False), task())
    x, y = blobs(240, 0)
    with pytest.raises(DataError, match=r"training loss became nan; lower lr \(now"):
        recover(network(), task(train=(x * torch.nan, y)))
    with pytest.raises(DataError, match="the train split has no batches"):
        recover(network(), task(train=(x[:0], y[:0])))
