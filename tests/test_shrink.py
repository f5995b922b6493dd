"""Removing is zeroing: the law of the house, over every small network, and what comes out of it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import NETS, Net, build, conv, image
from secateur.apply.shrink import carry_out, relative_error, shrink, shrink_
from secateur.errors import LawError, PlanError
from secateur.graph import analyze
from secateur.planning import make
from secateur.testing import check_removing_is_zeroing

PROGRAMS = {
    "option_a_shortcut", "split_to_branches", "slices", "plain_attribute", "slice_assignment", "fixed_index_gate",
    "attention", "fused_attention", "grouped_queries", "linear_to_map", "repeated", "narrowed",
    "heads_merged_into_the_batch",
}  # fmt: skip
"""Networks whose own code holds on to sizes: their rewritten program is the result."""


def plan_for(model, inputs, budget="params=60%", **kwargs):
    return make(model, analyze(model, inputs), budget=budget, **kwargs)


@pytest.mark.parametrize("name", NETS)
def test_removing_is_zeroing(name):
    model, inputs = build(name)
    result = check_removing_is_zeroing(model, inputs, seed=1)
    assert result.law.error <= result.law.tolerance
    assert name == "shuffled" or (result.form == "program") == (name in PROGRAMS)  # its halves may become uneven
    dense = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in result.model.parameters()) <= 0.6 * dense


@pytest.mark.parametrize("name", NETS)
def test_the_result_trains(name):
    model, inputs = build(name)
    small = check_removing_is_zeroing(model, inputs).model.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = copy.deepcopy(small.state_dict())
    out = small(inputs)
    out = out["y"] if isinstance(out, dict) else out
    out.square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize(
    "name", ["option_a_shortcut", "fused_attention", "slices", "split_to_branches", "heads_merged_into_the_batch"]
)
def test_a_rewritten_program_takes_any_batch_size(name):
    model, inputs = build(name)
    small = check_removing_is_zeroing(model, inputs).model
    one = small(inputs[:1])
    assert relative_error(one, small(inputs)[:1]) < 1e-5
    assert small(torch.cat([inputs] * 3)).shape[0] == 3 * len(inputs)


def test_a_batch_of_one_as_example_ties_nothing_to_one():
    model, inputs = build("option_a_shortcut")
    small = check_removing_is_zeroing(model, inputs[:1]).model
    assert small(inputs).shape == (2, 5)


def test_a_rewritten_program_keeps_names_and_knows_training_from_evaluation():
    def body(s, x):
        x = F.dropout(s.norm(s.a(x)), 0.5, s.training)
        return s.b(x[:, :6]) + s.c(x[:, 6:])

    torch.manual_seed(0)
    model = Net(body, a=conv(3, 12), norm=nn.BatchNorm2d(12), b=conv(6, 4), c=conv(6, 4)).eval()
    x = image()
    done = carry_out(model, plan_for(model, x))
    assert done.form == "program"
    small = done.model
    assert set(small.state_dict()) == set(model.state_dict())
    statistics = small.norm.running_mean.clone()
    small.eval()
    assert torch.equal(small(x), small(x))
    assert torch.equal(small.norm.running_mean, statistics)
    small.train()
    assert not torch.equal(small(x), small(x))
    assert not torch.equal(small.norm.running_mean, statistics)
    assert small.norm.num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, on copying a program
def test_a_rewritten_program_can_be_pruned_again_copied_and_pickled():
    model, inputs = build("option_a_shortcut")
    once = check_removing_is_zeroing(model, inputs).model
    twice = check_removing_is_zeroing(once, inputs).model
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    assert torch.equal(copy.deepcopy(once)(inputs), once(inputs))
    assert torch.equal(pickle.loads(pickle.dumps(once))(inputs), once(inputs))


def test_module_attributes_follow():
    model, inputs = build("grouped")
    small = check_removing_is_zeroing(model, inputs).model
    for m in small.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        if isinstance(m, nn.BatchNorm2d):
            assert m.num_features == len(m.weight)


def test_ties_dtype_and_requires_grad_survive():
    model, ids = build("tied_linear")
    model = model.double()
    model.up.weight.requires_grad_(False)
    small = check_removing_is_zeroing(model, ids).model
    assert small.head.weight is small.emb.weight
    assert small.up.weight.dtype == torch.float64
    assert not small.up.weight.requires_grad
    assert small.down.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = build("residual")
    result = check_removing_is_zeroing(model.to(dtype), x.to(dtype))
    assert next(result.model.parameters()).dtype == dtype


def test_in_place_keeps_the_object_and_equals_the_copy():
    model, x = build("residual")
    plan = plan_for(model, x)
    expected = shrink(model, plan)(x)
    assert shrink_(model, plan) is model
    assert torch.equal(model(x), expected)


def test_in_place_refuses_what_only_the_program_can_hold_and_changes_nothing():
    model, x = build("option_a_shortcut")
    plan, before = plan_for(model, x), model(x)
    with pytest.raises(PlanError, match=r"cannot be shrunk in place.*use shrink\(model, plan\)"):
        shrink_(model, plan)
    assert torch.equal(model(x), before)


def test_a_broken_law_is_caught_and_the_model_left_alone():
    model, x = build("plain")
    plan, before = plan_for(model, x), model(x)
    wrong = {t: dict(d) for t, d in plan.slices.items()}
    wrong["3.weight"] = {d: f.roll(1) for d, f in wrong["3.weight"].items()}
    object.__setattr__(plan, "slices", wrong)
    with pytest.raises(LawError, match="differs from the zeroed original"):
        shrink(model, plan)
    assert torch.equal(model(x), before)


def test_mask_plans_do_not_shrink():
    model, x = build("plain")
    with pytest.raises(PlanError, match=r"nothing can shrink; use mask\(model, plan\)"):
        shrink(model, plan_for(model, x, pattern="unstructured", budget="sparsity=50%"))


def test_a_plan_of_another_model_is_refused():
    model, x = build("plain")
    other, _ = build("residual")
    with pytest.raises(PlanError, match=r"the plan is for a model with .* use the dense model"):
        shrink(other, plan_for(model, x))


def test_a_plan_from_a_file_needs_inputs(tmp_path):
    model, x = build("plain")
    plan = plan_for(model, x)
    plan.save(tmp_path)
    loaded = type(plan).load(tmp_path)
    with pytest.raises(PlanError, match=r"shrink\(model, plan, inputs\)"):
        shrink(model, loaded)
    assert torch.equal(shrink(model, loaded, x)(x), shrink(model, plan)(x))


def test_relative_error_sees_shapes_and_nan():
    a = torch.ones(3)
    assert relative_error(a, a) == 0
    assert relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert relative_error(a, torch.ones(2)) == float("inf")
    assert relative_error(a * float("nan"), a) == float("inf")
    assert relative_error(a * float("nan"), a * float("nan")) == 0


def test_a_dropout_in_place_becomes_a_module_too():
    def body(s, x):
        x = s.drop(s.a(x))
        return s.b(x[:, :6]) + s.c(x[:, 6:])

    drop = nn.Dropout(0.5, inplace=True)
    model = Net(body, a=conv(3, 12), drop=drop, b=conv(6, 4), c=conv(6, 4)).eval()
    result = check_removing_is_zeroing(model, image())
    assert result.form == "program"
    assert any(isinstance(m, nn.Dropout) for m in result.model.modules())


def test_a_class_that_fails_without_a_word_still_gives_its_program():
    def body(s, x):
        x = s.a(x)
        assert x.shape[1] == 12
        return s.b(x)

    result = check_removing_is_zeroing(Net(body, a=conv(3, 12), b=conv(12, 4)).eval(), image())
    assert result.form == "program"
    assert "holds on to the old sizes" in result.why
