"""Places that keep the same part of their units."""

import pytest

from nets import build
from secateur.allocate import together
from secateur.errors import SpecError
from secateur.graph import analyze
from secateur.planning import make


def anything(_, count):
    return count


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 8, "b": 4, "c": 3}, {"a": 8, "b": 4, "c": 3}),
        ({"a": 5, "b": 4, "c": 3}, {"a": 6, "b": 3, "c": 3}),
        ({"a": 1, "b": 1, "c": 9}, {"a": 2, "b": 1, "c": 9}),
        ({"a": 6, "b": 3, "c": 1}, {"a": 6, "b": 3, "c": 1}),
    ],
)
def test_a_group_keeps_its_mean_part_rounded_up(counts, expected):
    totals = {"a": 8, "b": 4, "c": 9}
    assert together.level(counts, totals, [("a", "b")], anything) == expected


def test_counts_that_are_not_allowed_are_passed_over():
    def even(name, count):
        return count + count % 2

    found = together.level({"a": 5, "b": 6}, {"a": 12, "b": 12}, [("a", "b")], even)
    assert found == {"a": 6, "b": 6}
    found = together.level({"a": 1, "b": 1}, {"a": 3, "b": 3}, [("a", "b")], even)
    assert found == {"a": 2, "b": 2}


def test_totals_without_a_common_part_keep_everything():
    assert together.level({"a": 2, "b": 3}, {"a": 4, "b": 5}, [("a", "b")], anything) == {"a": 4, "b": 5}


def test_groups_that_share_a_place_change_in_one_step():
    steps = together.steps([("a", "b"), ("b", "c"), ("d",)])
    assert set(steps["a"]) >= {"a", "b"}
    assert set(steps["c"]) == {"a", "b", "c"}
    assert steps["d"] == ("d",)


@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("pattern", ["channel", "channel/2"])
def test_a_plan_keeps_groups_equal_and_meets_its_budget(allocate, pattern):
    model, inputs = build("grouped_queries")
    graph = analyze(model, inputs)
    group = ("head width", "value width")
    plan = make(model, graph, pattern=pattern, budget="params=45%", allocate=allocate, equal=[group])
    kept, total = plan.allocation.kept, plan.allocation.total
    assert kept[group[0]] * total[group[1]] == kept[group[1]] * total[group[0]] < total[group[0]] * total[group[1]]
    cost = graph.cost({name: flags.numpy() for name, flags in plan.units.items()})
    assert cost.params <= 0.45 * graph.cost().params


def test_an_override_wins_over_a_group():
    model, inputs = build("grouped_queries")
    graph = analyze(model, inputs)
    plan = make(model, graph, budget="params=70%", equal=[("head width", "value width")], overrides={"head width": 0.5})
    assert plan.allocation.kept["head width"] == plan.allocation.total["head width"] // 2


def test_unknown_names_and_patterns_without_units_are_refused():
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    with pytest.raises(SpecError, match="equal names 'nothing', which is no axis"):
        make(model, graph, budget="params=70%", equal=[("nothing", "0")])
    with pytest.raises(SpecError, match="which pattern 'unstructured' does not remove"):
        make(model, graph, pattern="unstructured", budget="sparsity=50%", equal=[("0", "3")])
