"""Statistics: that one pass gives them all, and data that do not fit."""

import copy

import pytest
import torch
from stats_of import task_of
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nets import NETS, build
from secateur.criteria import score
from secateur.errors import DataError, SpecError
from secateur.graph import analyze
from secateur.stats import COLLECTED, collect, gradients
from secateur.tasks import Classification

# --- one pass --------------------------------------------------------------------------------------


class Counted(Classification):
    def batches(self, split):
        Counted.passes.append(split)
        yield from super().batches(split)

    def loss(self, output, target):
        Counted.losses.append(len(target))
        return super().loss(output, target)


@pytest.mark.parametrize(
    ("needs", "losses"),
    [
        (["activation", "active", "norm_scale"], []),
        (["grad_abs", "activation"], [4, 2]),
        (["curvature"], [4, 4, 2, 2]),
        (["grad_square", "fisher_inverse"], [1] * 6),
        (list(COLLECTED), [4, 4, 1, 1, 1, 1, 2, 2, 1, 1]),
    ],
)
def test_everything_comes_from_one_pass(needs, losses, monkeypatch):
    monkeypatch.setattr(Counted, "passes", [], raising=False)
    monkeypatch.setattr(Counted, "losses", [], raising=False)
    model, inputs = build("plain")
    x = torch.randn(6, *inputs.shape[1:])
    split = (x, torch.arange(6) % 5)
    found = collect(model, analyze(model, inputs), needs, Counted(split, split, split, split, batch_size=4))
    assert Counted.losses == losses
    assert Counted.passes == ["calibration"]
    for stats in found.values():
        assert set(stats.values) == set(needs)
        assert all(value.isfinite().all() and not value.requires_grad for value in stats.values.values())


def test_together_is_the_same_as_one_by_one():
    model, inputs = build("plain")
    x = torch.randn(6, *inputs.shape[1:])
    graph, task = analyze(model, inputs), task_of(x, 5)
    together = collect(model, graph, COLLECTED, task)
    for what in COLLECTED:
        for name, stats in collect(model, graph, [what], task).items():
            torch.testing.assert_close(stats[what], together[name][what])


def test_the_model_is_left_as_it_was():
    model, inputs = build("plain")
    model.train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = copy.deepcopy(model.state_dict())
    collect(model, analyze(model, inputs), COLLECTED, task_of(torch.randn(6, *inputs.shape[1:]), 5))
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["3.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_named_weights_are_looked_at():
    model, inputs = build("plain")
    found = collect(
        model, analyze(model, inputs), ["activation"], task_of(torch.randn(4, *inputs.shape[1:]), 5), 0, ["0.weight"]
    )
    assert list(found) == ["0.weight"]


def test_half_precision_is_summed_in_single():
    model, x = nn.Linear(4, 3).bfloat16(), torch.randn(8, 4).bfloat16()
    found = collect(model, analyze(model, x), COLLECTED, task_of(x))["weight"]
    assert {what: found[what].dtype for what in COLLECTED if what != "norm_scale"} == dict.fromkeys(
        [what for what in COLLECTED if what != "norm_scale"], torch.float32
    )


def test_curvature_of_outputs_that_are_not_one_tensor(monkeypatch):
    monkeypatch.setattr(gradients, "PROBES", many := 2000)

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            hidden = self.a(x).relu()
            return {"logits": self.b(hidden), "hidden": hidden.sum(1), "length": len(x)}

    class Named(Classification):
        def loss(self, output, target):
            assert output["length"] == len(target)
            return super().loss(output["logits"], target) + output["hidden"].square().mean()

    class Joined(Classification):
        def loss(self, output, target):
            return super().loss(output[:, :3], target) + output[:, 3].square().mean()

    class One(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            out = self.inner(x)
            return torch.cat([out["logits"], out["hidden"][:, None]], 1)

    model, x = Several(), torch.randn(6, 4)
    split = (x, torch.arange(6) % 3)
    one = One(model)
    found = collect(model, analyze(model, x), ["curvature"], Named(split, split, split))
    expected = collect(one, analyze(one, x), ["curvature"], Joined(split, split, split))
    for name in ("a.weight", "b.weight"):  # other signs fall on the outputs of a mapping, which are in another order
        one, other = found[name]["curvature"], expected[f"inner.{name}"]["curvature"]
        torch.testing.assert_close(one, other, rtol=4.5 * 2 / many**0.5, atol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_every_statistic_of_every_net(name, monkeypatch):
    class Any(Classification):
        def batches(self, split):
            yield inputs, ()

        def loss(self, output, target):
            return sum(v.float().square().mean() for v in tree_leaves(output) if isinstance(v, torch.Tensor))

    monkeypatch.setattr(gradients, "OUTPUTS", 2000)
    monkeypatch.setattr(gradients, "PROBES", 1)
    model, inputs = build(name)
    graph = analyze(model, inputs)
    split = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    found = collect(model, graph, COLLECTED, Any(split, split, split))
    for weight, stats in found.items():
        for what, value in stats.values.items():
            per_output = what in ("activation", "active", "norm_scale")
            shape = graph.weights[weight].shape
            assert value.shape == ((shape[stats.out_dim],) if per_output else shape)
            assert bool(value.isfinite().all())


# --- data that do not fit --------------------------------------------------------------------------


NEED_DATA = [what for what in COLLECTED if what != "norm_scale"]


@pytest.mark.parametrize("what", NEED_DATA)
def test_no_task_no_statistics(what):
    model, inputs = build("plain")
    with pytest.raises(DataError, match=f"needs data for '{what}', so give task="):
        collect(model, analyze(model, inputs), [what])


@pytest.mark.parametrize("what", NEED_DATA)
def test_data_of_another_shape_are_refused(what):
    model, inputs = build("plain")
    model.train()
    task = task_of(torch.randn(4, 5, 8, 8), 5)
    with pytest.raises(DataError, match=r"calibration batch 0.*float32\[(4|1), 5, 8, 8\]"):
        collect(model, analyze(model, inputs), [what], task)
    assert model.training


@pytest.mark.parametrize("what", NEED_DATA)
def test_data_that_are_not_finite_are_refused(what):
    model, inputs = build("plain")
    x = torch.randn(8, *inputs.shape[1:])
    x[5] = torch.nan
    expected = "loss on calibration batch 1 is"
    if what in ("activation", "active"):
        expected = "outputs of weight '0.weight' on calibration batch 1 are NaN"
    with pytest.raises(DataError, match=expected):
        collect(model, analyze(model, inputs), [what], task_of(x, 5))


@pytest.mark.parametrize("what", NEED_DATA)
def test_no_data_are_refused(what):
    model, inputs = build("plain")
    with pytest.raises(DataError, match="batch"):
        collect(
            model, analyze(model, inputs), [what], task_of(torch.randn(4, *inputs.shape[1:]), 5, calibration=inputs[:0])
        )

    class Nothing(Classification):
        def batches(self, split):
            return iter(())

    split = (inputs, torch.zeros(len(inputs), dtype=torch.long))
    with pytest.raises(DataError, match="the calibration split has no batches"):
        collect(model, analyze(model, inputs), [what], Nothing(split, split, split))


def test_an_unknown_statistic_names_the_known_ones():
    model, inputs = build("plain")
    with pytest.raises(SpecError, match="no statistic is called 'gradient'; there are grad_abs, "):
        collect(model, analyze(model, inputs), ["gradient"])


def test_a_fisher_matrix_too_large_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(gradients, "LARGEST", 1000)
    model, inputs = build("plain")
    with pytest.raises(
        DataError, match=r"The Fisher|the Fisher matrix of [\d,]+ weights takes .* use criterion='fisher'"
    ):
        score(model, analyze(model, inputs), "block_fisher", task_of(torch.randn(4, *inputs.shape[1:]), 5))


def test_outputs_inside_an_operator_are_refused_and_may_be_ignored():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, x = Recurrent(), torch.randn(4, 5, 4)
    graph = analyze(model, x)
    with pytest.raises(DataError, match=r"the outputs of weight 'rnn.weight_\w+' stay inside gru"):
        collect(model, graph, ["activation"], task_of(x))
    assert list(collect(model, graph, ["activation"], task_of(x), 0, ["head.weight"])) == ["head.weight"]


def test_a_weight_used_in_parts_is_refused():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return F.linear(x, self.w[:3])

    model, x = Parts(), torch.randn(4, 4)
    with pytest.raises(DataError, match="weight 'w' has 5 outputs and is used in parts, 3 at once"):
        collect(model, analyze(model, x), ["activation"], task_of(x))


def test_outputs_that_are_too_many_for_their_hessian_are_refused(monkeypatch):
    monkeypatch.setattr(gradients, "OUTPUTS", 4)
    model, inputs = build("plain")
    with pytest.raises(DataError, match=r"the model gives 5 numbers per example, more than the 4 .* use 'fisher'"):
        collect(model, analyze(model, inputs), ["curvature"], task_of(torch.randn(4, *inputs.shape[1:]), 5))


def test_outputs_that_are_not_of_examples_are_refused():
    class Mean(Classification):
        def loss(self, output, target):
            return output

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x).mean()

    model, x = Scalar(), torch.randn(4, 4)
    split = (x, torch.arange(4) % 3)
    with pytest.raises(DataError, match="needs outputs with one row per example; use 'fisher'"):
        collect(model, analyze(model, x), ["curvature"], Mean(split, split, split))
