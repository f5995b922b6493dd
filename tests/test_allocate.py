"""Exact selection, ladders, and allocations that people edit."""

import pytest
import torch

from nets import build
from secateur.allocate import Allocation, Curve, Sensitivity, best, climb, kth, kth_smallest, resolve
from secateur.allocate.erk import ErdosRenyi
from secateur.errors import DataError, PlanError, SpecError
from secateur.graph import analyze
from secateur.planning import make


def nasty(kind, n, generator):
    x = torch.randn(n, generator=generator)
    return {
        "normal": x,
        "ties": x.round(),
        "constant": torch.full((n,), 2.5),
        "mostly zero": torch.where(torch.rand(n, generator=generator) < 0.95, 0.0, x),
        "denormal": x * 1e-42,
        "signed zeros": torch.where(x > 0, 0.0, -0.0),
        "wide": x.sign() * 10 ** (x * 10),
        "sorted": x.sort().values,
        "negative": -x.abs(),
    }[kind]


KINDS = ["normal", "ties", "constant", "mostly zero", "denormal", "signed zeros", "wide", "sorted", "negative"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", [16, 1 << 18])
def test_kth_smallest_equals_sorting(kind, sample, monkeypatch):
    monkeypatch.setattr(kth, "_SAMPLE", sample)
    monkeypatch.setattr(kth, "_CHUNK", 100)
    g = torch.Generator().manual_seed(0)
    tensors = [nasty(kind, n, g) for n in (1, 700, 3, 1000)]
    ordered = torch.cat(tensors).sort().values
    for k in (0, 1, 2, 500, 851, 852, 1702, 1703):
        assert kth_smallest(tensors, k) == ordered[k]


def test_a_sample_that_misleads_is_noticed(monkeypatch):
    monkeypatch.setattr(kth, "_SAMPLE", 10)
    x = torch.arange(10_000.0)
    x[::1000] = 1e9
    for k in (0, 5_000, 9_989, 9_990, 9_999):
        assert kth_smallest([x], k) == x.sort().values[k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 37, 499, 500])
def test_best_keeps_exactly_the_count_and_the_largest(kind, count):
    scores = nasty(kind, 500, torch.Generator().manual_seed(1))
    keep = best(scores, count)
    assert int(keep.sum()) == count
    if 0 < count < 500:
        assert scores[keep].min() >= scores[~keep].max()


def test_among_equals_the_first_stay():
    assert best(torch.tensor([1.0, 5, 1, 1, 5]), 3).tolist() == [True, True, False, False, True]


def erk(scores, relative=False):
    return ErdosRenyi(scores, relative, shapes={"a": [(7, 1)], "b": [(6, 5), (30, 2)], "c": [(2, 2)]})


def curves(scores, relative=False):
    rises = {"a": (0.0, 0.1, 3.0), "b": (2.0, 1.0, 2.0), "c": (-1.0, -1.0, -2.0)}
    return Sensitivity({place: Curve(place, (0.1, 0.5, 0.8), rise) for place, rise in rises.items()})(scores, relative)


@pytest.mark.parametrize("strategy", ["uniform", "global", erk, curves])
def test_ladders_never_grow_and_end_empty(strategy):
    scores = {"a": torch.rand(7).round(decimals=1), "b": torch.rand(30).round(decimals=1), "c": torch.zeros(4)}
    ladder = resolve(strategy)(scores)
    previous = ladder.kept(0)
    assert previous == {"a": 7, "b": 30, "c": 4}
    for rung in [*range(1, ladder.rungs, 1 + ladder.rungs // 500), ladder.rungs]:
        counts = ladder.kept(rung)
        assert all(counts[p] <= previous[p] for p in counts)
        previous = counts
    assert set(previous.values()) == {0}


def test_the_global_ladder_removes_one_unit_a_rung_lowest_first():
    ladder = resolve("global")({"a": torch.tensor([3.0, 1, 2]), "b": torch.tensor([2.0, 0])})
    assert [ladder.kept(r) for r in range(5)] == [
        {"a": 3, "b": 2}, {"a": 3, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 0}, {"a": 1, "b": 0},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["bisection", "random"])
def test_the_global_ladder_removes_the_lowest_whatever_was_asked_before(kind, order, monkeypatch):
    monkeypatch.setattr(kth, "_CHUNK", 100)
    g = torch.Generator().manual_seed(0)
    scores = {str(i): nasty(kind, n, g) for i, n in enumerate((300, 1, 0, 450))}
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
    # Ascending, and among equals those of the last places first.
    ranked = owner.flip(0)[torch.cat(list(scores.values())).flip(0).sort(stable=True).indices]
    ladder = resolve("global")(scores)
    rungs = [375, 187, 281, 234, 257, 245, 251] if order == "bisection" else torch.randint(752, (12,)).tolist()
    for rung in rungs:
        gone = torch.bincount(ranked[:rung], minlength=4).tolist()
        assert list(ladder.kept(rung).values()) == [300 - gone[0], 1 - gone[1], 0, 450 - gone[3]]


def test_places_of_different_precision_compete_exactly():
    scores = {"half": torch.tensor([0.1, 0.2], dtype=torch.bfloat16), "single": torch.linspace(0.0995, 0.1005, 101)}
    ordered = torch.cat([s.float() for s in scores.values()]).sort().values
    for rung in range(1, 103):
        kept = resolve("global")(scores).kept(rung)
        assert sum(kept.values()) == 103 - rung
        assert kept["half"] == int((scores["half"].float() >= ordered[rung]).sum())


def test_scaling_scores_changes_nothing():
    scores = {"a": torch.rand(50), "b": torch.rand(80)}
    for relative, scaled in (
        (False, {n: s * 8 for n, s in scores.items()}),
        (True, {"a": scores["a"] * 8, "b": scores["b"] / 4}),
    ):
        one, other = (resolve("global")(s, relative) for s in (scores, scaled))
        assert all(one.kept(r) == other.kept(r) for r in range(0, 130, 7))


def test_erk_keeps_in_proportion_to_the_sum_of_dimensions_over_their_product():
    """By hand: (64 + 3 + 3 + 3) / 1728 is 9.7 times (64 + 64 + 3 + 3) / 36864."""
    shapes = {"narrow": [(64, 3, 3, 3)], "wide": [(64, 64, 3, 3)]}
    sizes = {"narrow": 1728, "wide": 36864}
    ladder = ErdosRenyi({place: torch.zeros(n) for place, n in sizes.items()}, shapes=shapes)
    densities = {"narrow": 73 / 1728, "wide": 134 / 36864}
    for scale in (200.0, 25.0, 10.0, 1.0):  # the largest ones leave a layer whole
        rung = round(ladder.rungs * (1 - scale * densities["wide"]))
        kept = ladder.kept(max(rung, 0))
        for place, n in sizes.items():
            assert kept[place] == pytest.approx(n * min(1, scale * densities[place]), abs=1)


def test_erk_of_an_axis_is_that_of_all_its_weights():
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    plan = make(model, graph, budget="params=50%", allocate="erk")
    asked = {}

    def spy(scores, relative=False, *, shapes):
        asked.update(shapes)
        return ErdosRenyi(scores, relative, shapes=shapes)

    spy.needs = frozenset({"shapes"})
    assert not plan.diff(make(model, graph, budget="params=50%", allocate=spy))
    assert asked == {
        name: [
            graph.weights[n].shape for n in sorted({m.tensor for m in graph.axis(name).members} & graph.weights.keys())
        ]
        for name in plan.units
    }


@pytest.mark.parametrize("budget", ["sparsity=80%", "params=30%", "macs=30%"])
def test_erk_meets_budgets_and_keeps_small_layers_whole(budget):
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    plan = make(model, graph, pattern="unstructured", budget=budget, allocate="erk")
    part = {n: plan.allocation.kept[n] / plan.allocation.total[n] for n in plan.allocation.kept}
    density = {n: sum(w.shape) / w.numel for n, w in graph.weights.items()}
    assert all(part[a] >= part[b] - 0.02 for a in part for b in part if density[a] > density[b])
    assert 0.6 < sum(plan.allocation.kept.values()) / sum(plan.allocation.total.values()) / 0.25 < 1.4


def test_climb_finds_the_first_rung_that_fits():
    ladder = resolve("uniform")({"a": torch.rand(100)})
    assert climb(ladder, dict, lambda c: c["a"] <= 37) == {"a": 37}
    assert climb(ladder, dict, lambda c: True) == {"a": 100}
    assert climb(ladder, dict, lambda c: False) is None


def test_an_allocation_survives_json():
    allocation = Allocation({"a": 3, "b": 0}, {"a": 8, "b": 2})
    assert Allocation.from_json(allocation.to_json()) == allocation


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": [1, 2, 3]}', "{"])
def test_damaged_json_is_refused(text):
    with pytest.raises(DataError, match=r"an allocation is JSON of the form"):
        Allocation.from_json(text)


@pytest.mark.parametrize("text", ['{"a": [9, 8]}', '{"a": [-1, 8]}', '{"a": ["3", 8]}', '{"a": [3, "8"]}'])
def test_impossible_counts_are_refused(text):
    with pytest.raises(PlanError, match=r"allocation of 'a' keeps .*; expected 0 to '?8'? units"):
        Allocation.from_json(text)


def test_an_unknown_strategy_names_the_known_ones():
    with pytest.raises(SpecError, match="'globle' is unknown; there are global, uniform, erk, sensitivity"):
        resolve("globle")


def test_a_strategy_is_a_name_or_a_function():
    with pytest.raises(SpecError, match="allocation is a name or a function, found int"):
        resolve(3)
