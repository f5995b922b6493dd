"""What the user knows better: what to leave alone, least widths, ties, outputs that may lose channels."""

import pytest
import torch
from torch import nn

from nets import build
from secateur import api
from secateur.apply.shrink import carry_out, shrink
from secateur.errors import BudgetError, PlanError, SpecError
from secateur.graph import analyze
from secateur.plan import Plan
from secateur.planning import make
from secateur.store import load, save


class Backbone(nn.Module):
    """Three widths of its own: a (16), b (12), and the features (8) that it returns besides the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.c, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        features = self.c(self.norm(self.b(self.a(x).relu())).relu())
        return {"classes": self.head(features.mean((2, 3))), "features": features}


class Twins(nn.Module):
    """Two branches of width 10 that nothing ties."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 10), nn.Linear(4, 10)
        self.left_out, self.right_out = nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x):
        return self.left_out(self.left(x).relu()) + self.right_out(self.right(x).tanh())


class Hard(Backbone):
    """A backbone whose code holds on to its width, so that only its rewritten program can lose channels."""

    def forward(self, x):
        features = self.c(self.norm(self.b(self.a(x).relu())).relu())
        features = features.view(len(x), 8, -1)
        return {"classes": self.head(features.mean(2)), "features": features}


X = torch.randn(2, 3, 6, 6)


def kept(model, graph, **wishes):
    """Per axis how many units stay."""
    found = make(model, graph, **{"budget": "params=40%", **wishes})
    return {name: int(flags.sum()) for name, flags in found.units.items()}


# --- ignore ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ignore",
    ["a", ["a"], "a.weight", "[a]*", lambda name: name == "a"],
    ids=["name", "list", "tensor", "glob", "function"],
)
def test_an_axis_is_ignored_however_it_is_named(ignore):
    model = Backbone().eval()
    graph = analyze(model, X)
    assert set(kept(model, graph)) == {"a", "b"}
    assert set(kept(model, graph, ignore=ignore, budget="params=70%")) == {"b"}


def test_a_module_is_ignored_with_everything_that_meets_its_tensors():
    model = Backbone().eval()
    graph = analyze(model, X)
    assert set(kept(model, graph, ignore=model.norm, budget="params=70%")) == {"a"}
    assert set(kept(model, graph, ignore=[model.a], budget="params=70%")) == {"b"}
    with pytest.raises(BudgetError, match="no axis is free"):
        make(model, graph, ignore=[model.a, "b"], budget="params=70%")


def test_masks_leave_ignored_modules_dense():
    model = Backbone().eval()
    found = api.plan(model, X, pattern="unstructured", budget="sparsity=50%", ignore=[model.a, lambda n: "head" in n])
    assert set(found.masks) == {"b.weight", "c.weight"}


@pytest.mark.parametrize(
    ("ignore", "words"),
    [
        (nn.Linear(2, 2), "is no part of this Backbone"),
        (nn.ReLU(), "has no parameters"),
        (lambda name: False, "accepts none"),
        ("nothing.*", "matches nothing"),
        (3, "a glob, a module or a function of the name, found int"),
    ],
)
def test_what_is_not_there_cannot_be_ignored(ignore, words):
    model = Backbone().eval()
    with pytest.raises(SpecError, match=words):
        api.plan(model, X, ignore=ignore)


# --- minimum ---------------------------------------------------------------------------------------


def test_every_axis_keeps_its_minimum():
    model = Backbone().eval()
    graph = analyze(model, X)
    assert min(kept(model, graph, budget="params=25%").values()) < 5
    assert min(kept(model, graph, budget="params=45%", minimum=5).values()) >= 5
    assert kept(model, graph, budget="macs=80%", minimum={"a": 1.0})["a"] == 16
    assert kept(model, graph, budget="threshold=100", minimum=0.3) == {"a": 5, "b": 4}
    assert kept(model, graph, budget="threshold=100", minimum={"*": 2, "b": 0.5}) == {"a": 2, "b": 6}
    assert kept(model, graph, budget="threshold=100", minimum=40) == {"a": 16, "b": 12}
    assert kept(model, graph, budget="threshold=100", minimum=5, pattern="channel/4") == {"a": 8, "b": 8}
    assert kept(model, graph, budget="params=90%", minimum=6, overrides={"a": 0.9})["a"] == 6


def test_a_budget_below_the_minimum_is_refused_with_the_nearest():
    model = Backbone().eval()
    with pytest.raises(BudgetError, match=r"kept as a minimum.*nearest possible is params="):
        api.plan(model, X, budget="params=20%", minimum=0.9)


@pytest.mark.parametrize("minimum", [0, -1, 1.5, True, "4", {"a": 0}, {"b": None}])
def test_a_minimum_that_is_none_is_refused(minimum):
    with pytest.raises(SpecError, match="expected a count from 1, or a part from"):
        api.plan(Backbone().eval(), X, minimum=minimum)


def test_a_minimum_needs_units():
    with pytest.raises(SpecError, match="does not remove"):
        api.plan(Backbone().eval(), X, pattern="unstructured", budget="sparsity=50%", minimum=4)


# --- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [("left.weight:0", "right.weight:0"), ("left", "right"), ("left.bias:0", "right")])
def test_tied_places_keep_the_same_units(tie, tmp_path):
    model, x = Twins().eval(), torch.randn(2, 4)
    graph = analyze(model, x, ties=[tie])
    free = [axis for axis in graph.axes if not axis.frozen]
    assert [axis.units for axis in free] == [10]
    chosen = make(model, graph, budget="params=60%")
    assert torch.equal(chosen.slices["left.weight"][0], chosen.slices["right.weight"][0])
    assert carry_out(model, chosen).law.error < 1e-6
    chosen.save(tmp_path)
    assert Plan.load(tmp_path).declared == chosen.declared
    small = shrink(model, Plan.load(tmp_path), x)  # analyzed anew, the tie included
    assert small.left.out_features == small.right.out_features < 10


def test_untied_they_choose_for_themselves():
    model, x = Twins().eval(), torch.randn(2, 4)
    assert {axis.name for axis in analyze(model, x).free} == {"left", "right"}


def test_a_tie_to_something_frozen_freezes():
    model = Backbone().eval()
    frozen = {a.name: a.frozen for a in analyze(model, X, ties=[("b", "b.weight:0")]).axes}
    assert not frozen["b"]
    model.b = nn.Conv2d(16, 8, 3, padding=1)
    model.norm, model.c = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
    tied = {a.name: a.frozen for a in analyze(model, X, ties=[("b", "c")]).axes}
    assert "model output" in tied["b"]


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        (("left", "left_out"), "10 units and 'left_out' has 3"),
        (("left", "middle"), "'middle', which is neither an axis nor a dimension"),
        (("left.weight:2", "right"), "'left.weight:2', which is neither"),
        (("left",), "a tie is a pair of names"),
        ("left", "a tie is a pair of names"),
    ],
)
def test_a_tie_that_cannot_be_is_refused(tie, words):
    with pytest.raises(SpecError, match=words):
        analyze(Twins().eval(), torch.randn(2, 4), ties=[tie])


# --- freed outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Backbone, Hard])
@pytest.mark.parametrize("free", [1, [1]])
def test_a_freed_output_loses_channels_and_the_law_compares_those_that_stay(kind, free, tmp_path):
    model = kind().eval()
    assert "c" in {axis.name for axis in analyze(model, X).axes if axis.frozen}
    graph = analyze(model, X, free_outputs=free)
    chosen = make(model, graph, budget="params=60%", overrides={"c": 0.5})
    done = carry_out(model, chosen)
    assert done.law.oracle == "zeroed original"
    assert done.law.error < 1e-5
    rows = chosen.units["c"]
    out = done.model(X)
    assert out["features"].shape[1] == int(rows.sum()) < 8
    assert out["classes"].shape == (2, 5)
    chosen.save(tmp_path)
    again = shrink(model, Plan.load(tmp_path), X)
    assert torch.allclose(again(X)["features"], out["features"], atol=1e-6)


def test_what_goes_of_a_freed_output_is_what_the_plan_says():
    model = Backbone().eval()
    chosen = make(model, analyze(model, X, free_outputs=True), budget="params=95%", ignore=["a", "b", "head"])
    small = shrink(model, chosen)
    assert torch.allclose(small(X)["features"], model(X)["features"][:, chosen.units["c"]], atol=1e-6)


def test_all_outputs_can_be_freed():
    graph = analyze(Backbone().eval(), X, free_outputs=True)
    assert {axis.name for axis in graph.free} == {"a", "b", "c", "head"}
    assert graph.declared.free_outputs == (0, 1)


def test_an_output_returned_twice_is_freed_only_as_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            y = self.fc(x)
            return y, y

    model, x = Twice().eval(), torch.randn(2, 4)
    assert "model output 1" in analyze(model, x, free_outputs=0).axis("fc").frozen
    assert not analyze(model, x, free_outputs=(0, 1)).axis("fc").frozen
    done = carry_out(model, make(model, analyze(model, x, free_outputs=True), budget="params=50%"))
    assert [len(out[0]) for out in done.model(x)] == [3, 3]


@pytest.mark.parametrize("free", [2, -1, [0, 5], ["features"]])
def test_an_output_that_is_not_there_cannot_be_freed(free):
    with pytest.raises(SpecError, match="the model returns 2 tensors, counted from 0"):
        analyze(Backbone().eval(), X, free_outputs=free)


@pytest.mark.parametrize("net", ["residual", "dense_cat", "grouped", "attention", "option_a_shortcut", "plain"])
def test_freed_outputs_and_ties_keep_the_law_in_other_structures(net):
    model, x = build(net)
    axes = analyze(model, x).free
    pairs = [(a.name, b.name) for i, a in enumerate(axes) for b in axes[i + 1 :] if a.units == b.units]
    graph = analyze(model, x, free_outputs=True, ties=pairs[:1])
    chosen = make(model, graph, budget="params=70%", criterion="random", allocate="uniform")
    assert carry_out(model, chosen).law.error < 1e-5


def test_prune_takes_the_graph_that_says_so_and_the_result_is_saved_and_loaded(tmp_path):
    model = Hard().eval()
    graph = analyze(model, X, free_outputs=1)
    result = api.prune(model, graph, budget="params=60%", overrides={"c": 0.5})
    assert result.report.law.error < 1e-5
    save(result, tmp_path)
    small = load(tmp_path, model=model)
    assert torch.equal(small(X)["features"], result.model(X)["features"])


def test_a_loaded_plan_without_its_declaration_is_no_plan_for_the_model(tmp_path):
    model = Backbone().eval()
    make(model, analyze(model, X, free_outputs=1), budget="params=60%", overrides={"c": 0.5}).save(tmp_path)
    text = (tmp_path / "plan.json").read_text().replace('"free_outputs": [\n   1\n  ]', '"free_outputs": []')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="frozen: model output 1"):
        shrink(model, Plan.load(tmp_path), X)
