"""Models on device meta: shapes without values. Counts are real, which units stay is arbitrary, nothing is compared."""

import pytest
import torch
from torch import nn

from secateur import api
from secateur.apply.shrink import carry_out
from secateur.errors import SpecError
from secateur.graph import analyze
from secateur.planning import make


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 12, 3, groups=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))


def pair():
    """The same network without and with values, and inputs for both."""
    x = torch.randn(2, 3, 9, 9)
    return Net().eval().to("meta"), x.to("meta"), Net().eval(), x


def test_analysis_needs_no_values():
    bare, y, full, x = pair()
    a, b = analyze(bare, y), analyze(full, x)
    assert [(m.name, m.units, m.frozen) for m in a.axes] == [(m.name, m.units, m.frozen) for m in b.axes]
    assert a.cost() == b.cost()


@pytest.mark.parametrize("criterion", ["magnitude", "random", "bn_scale"])
def test_plans_meet_their_budget_without_values(criterion):
    bare, y, *_ = pair()
    graph = analyze(bare, y)
    chosen = make(bare, graph, budget="params=60%", allocate="uniform", criterion=criterion)
    kept = graph.cost({name: flags.numpy() for name, flags in chosen.units.items()}).params
    assert 0.5 * graph.cost().params < kept <= 0.6 * graph.cost().params
    same = make(bare, graph, budget="params=60%", allocate="uniform", criterion=criterion)
    assert not chosen.diff(same)


def test_all_units_of_an_axis_score_the_same():
    bare, y, *_ = pair()
    graph = analyze(bare, y)
    none = make(bare, graph, budget="threshold=1.0")
    assert all(bool(flags.all()) for flags in none.units.values())
    least = make(bare, graph, budget="threshold=1.01")
    assert least.allocation.kept == {axis.name: axis.least for axis in graph.free}


def test_shrinking_follows_the_shapes_and_compares_nothing():
    bare, y, full, x = pair()
    chosen = make(bare, analyze(bare, y), budget="params=60%")
    done = carry_out(bare, chosen)
    assert done.law is None
    assert done.form == "module"
    assert done.model(y).shape == (2, 4)
    assert all(p.is_meta for p in done.model.parameters())
    real = carry_out(full, chosen, x)  # the plan is for the real network too
    assert real.law.error < 1e-5
    assert {n: p.shape for n, p in real.model.named_parameters()} == {
        n: p.shape for n, p in done.model.named_parameters()
    }


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x1"])
def test_single_weights_cannot_be_chosen_without_values(pattern):
    bare, y, *_ = pair()
    budget = None if pattern == "2:4" else "sparsity=50%"
    with pytest.raises(SpecError, match=r"\.weight' has no values \(device meta\)"):
        api.plan(bare, y, pattern=pattern, budget=budget)


def test_what_measures_refuses_a_model_without_values():
    bare, y, *_ = pair()
    with pytest.raises(SpecError, match="nothing can be measured; use analyze, plan and shrink"):
        api.prune(bare, y)
