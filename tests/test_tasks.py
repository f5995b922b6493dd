from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import DataError
from secateur.tasks import (
    Classification,
    batches,
    call,
    device_of,
    evaluate,
    judge,
    mode,
    paired_difference,
    proportion,
)


def split(n, offset=0):
    x = torch.arange(offset, offset + n, dtype=torch.float32)[:, None].repeat(1, 3)
    return x, torch.arange(n) % 3


def small(**changes):
    parts = {"train": split(10), "validation": split(5, 100), "test": split(7, 200), "batch_size": 4}
    return Classification(**(parts | changes))


def test_evaluation_splits_keep_order_and_every_example():
    for name, (x, y) in (("validation", split(5, 100)), ("test", split(7, 200)), ("calibration", split(10))):
        xs, ys = zip(*small().batches(name), strict=True)
        assert torch.equal(torch.cat(xs), x)
        assert torch.equal(torch.cat(ys), y)


def test_training_passes_differ_are_repeatable_and_drop_the_short_batch():
    task = small()

    def two_passes():
        torch.manual_seed(3)
        return [torch.cat([x[:, 0] for x, _ in task.batches("train")]) for _ in range(2)]

    first, second = two_passes()
    assert len(first) == len(second) == 8
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(two_passes(), (first, second), strict=True))


def test_a_pass_knows_its_length_and_gives_its_batches_in_any_order():
    torch.manual_seed(3)
    forwards = small(augment=lambda x, g: x + torch.rand(x.shape, generator=g)).batches("train")
    ahead = list(forwards)
    assert len(forwards) == len(ahead) == 2
    for i in (1, 0):
        assert torch.equal(forwards[i][0], ahead[i][0])
    with pytest.raises(IndexError):
        forwards[2]

    def broken(x, generator):
        raise IndexError("in augment")

    with pytest.raises(IndexError, match="in augment"):
        list(small(augment=broken).batches("train"))


def test_training_labels_travel_with_their_examples():
    for x, y in small().batches("train"):
        assert torch.equal(x[:, 0].long() % 3, y)


def test_a_training_split_smaller_than_a_batch_is_one_batch():
    assert [len(x) for x, _ in small(batch_size=64).batches("train")] == [10]


def test_augment_touches_training_only_and_repeats_with_the_seed():
    def noisy(x, generator):
        return x + torch.rand(x.shape, generator=generator) + 1000

    task = small(augment=noisy)
    torch.manual_seed(0)
    first = next(iter(task.batches("train")))[0]
    torch.manual_seed(0)
    assert torch.equal(next(iter(task.batches("train")))[0], first)
    assert (first >= 1000).all()
    for name in ("calibration", "validation", "test"):
        assert all((x < 1000).all() for x, _ in task.batches(name))


def test_classification_refuses_what_does_not_match():
    with pytest.raises(DataError, match=r"split 'test' has x of shape \(7, 3\) and y of shape \(6,\)"):
        small(test=(split(7)[0], split(6)[1]))
    with pytest.raises(DataError, match="batch_size is 0, expected at least 1"):
        small(batch_size=0)
    with pytest.raises(DataError, match="split 'dev' is unknown, expected one of train, calibration"):
        list(small().batches("dev"))


class Probe(nn.Module):
    def forward(self, a, b=0.0, *, c=0.0):
        return a + 2 * b + 4 * c


def test_call_spreads_tuples_and_dicts():
    one = torch.ones(())
    assert call(Probe(), one) == 1
    assert call(Probe(), (one, one)) == 3
    assert call(Probe(), [one, one]) == 3
    assert call(Probe(), {"a": one, "c": one}) == 5


def test_device_of_looks_at_parameters_then_buffers_then_gives_the_cpu():
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    bare = nn.Module()
    assert device_of(bare).type == "cpu"
    bare.register_buffer("b", torch.zeros(1, device="meta"))
    assert device_of(bare).type == "meta"


def test_batches_move_nested_tensors_and_leave_the_rest_alone():
    class Nested:
        def batches(self, split):
            yield {"a": torch.ones(2), "flag": True}, (torch.ones(2), "name")

    ((inputs, targets),) = batches(Nested(), "train", nn.Linear(1, 1, device="meta"))
    assert inputs["a"].device.type == targets[0].device.type == "meta"
    assert inputs["flag"] is True
    assert targets[1] == "name"


def test_mode_restores_every_module_also_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1).eval(), nn.Dropout())
    before = [m.training for m in model.modules()]

    def failing():
        with mode(model, training=False):
            assert not any(m.training for m in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert [m.training for m in model.modules()] == before


def test_evaluate_gives_one_score_per_example_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = evaluate(model, small(), "test")
    assert scores.shape == (7,)
    assert scores.dtype == np.float64
    assert np.array_equal(scores, evaluate(model, small(), "test"))
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_names_an_empty_split():
    with pytest.raises(DataError, match="the test split has no batches"):
        evaluate(nn.Linear(3, 3), small(test=split(0)), "test")


def test_evaluate_counts_scores_that_are_not_numbers():
    class Broken(Classification):
        def scores(self, output, target):
            return torch.where(target == 0, torch.nan, 1.0)

    task = Broken(split(4), split(4), split(7))
    with pytest.raises(DataError, match="3 of 7 scores on the test split are NaN or infinite"):
        evaluate(nn.Linear(3, 3), task, "test")


def test_a_model_without_the_class_of_an_example_is_named():
    with pytest.raises(DataError, match="the data has the class 2, the model gives logits for 2, counted from 0"):
        evaluate(nn.Linear(3, 2), small(), "test")
    with pytest.raises(DataError, match="class that the model gives no logits for: Target 2 is out of bounds"):
        small().loss(torch.zeros(3, 2), torch.arange(3))


def test_logits_may_be_carried_by_an_output_of_another_kind():
    class Carrier(nn.Linear):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    assert evaluate(Carrier(3, 3), small(), "test").shape == evaluate(nn.Linear(3, 3), small(), "test").shape


def test_a_summary_that_is_no_number_is_named():
    class Broken(Classification):
        def summary(self, outputs):
            return {"recall": 1.0, "f1": float("nan")}

    with pytest.raises(DataError, match=r"task\.summary gave NaN for 'f1' on the test split"):
        judge(nn.Linear(3, 3), Broken(split(4), split(4), split(4)), "test")


def test_evaluate_wants_one_score_per_example():
    class Mean(Classification):
        def scores(self, output, target):
            return super().scores(output, target).mean()

    with pytest.raises(DataError, match=r"returned shape \(\), expected one score per example"):
        evaluate(nn.Linear(3, 3), Mean(split(4), split(4), split(4)), "test")


def test_wilson_interval_matches_its_published_example():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        found = proportion(np.array([1.0] * successes + [0.0] * (n - successes)))
        assert found == pytest.approx((successes / n, low, high), abs=1e-4)


def test_wilson_interval_stays_inside_and_is_never_a_point():
    for score in (0.0, 1.0):
        value, low, high = proportion(np.full(30, score))
        assert 0 <= low <= value <= high <= 1 or value == pytest.approx(high)
        assert high - low > 0.05


def test_real_scores_get_the_normal_interval():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * scores.std(ddof=1) / 2
    assert proportion(scores) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert paired_difference(scores + 1, scores) == pytest.approx((1, 1, 1))


def test_paired_difference_is_the_drop_and_pairing_helps():
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.9).astype(float)
    after = before.copy()
    after[:20] = 0.0
    drop, low, high = paired_difference(before, after)
    assert drop == pytest.approx(before.mean() - after.mean())
    assert drop > 0
    shuffled = paired_difference(before, rng.permutation(after))
    assert high - low < shuffled.high - shuffled.low


def test_paired_difference_of_equal_scores_is_no_point():
    drop, low, high = paired_difference(np.ones(100), np.ones(100))
    assert drop == 0
    assert low == pytest.approx(-high)
    assert 0.01 < high < 0.05


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        draw = rng.random(150)
        before = (draw < 0.92).astype(float)
        after = ((draw < 0.88) | (draw > 0.98)).astype(float)
        _, low, high = paired_difference(before, after)
        hits += low <= 0.02 <= high
    assert 0.92 <= hits / 400 <= 0.99


def test_intervals_refuse_what_they_cannot_judge():
    with pytest.raises(DataError, match="found 3 and 2"):
        paired_difference(np.ones(3), np.ones(2))
    with pytest.raises(DataError, match="no scores"):
        proportion(np.ones(0))
    with pytest.raises(DataError, match="at least two"):
        proportion(np.array([0.5]))
