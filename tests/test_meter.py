"""Costs that are counted again only where something changed, and what axes are worth."""

import numpy as np
import pytest
import torch

from nets import build
from secateur.errors import SpecError
from secateur.graph import analyze
from secateur.graph.savings import worths


@pytest.mark.parametrize("net", ["plain", "residual", "dense_cat", "grouped", "attention", "option_a_shortcut"])
def test_a_cost_does_not_depend_on_what_was_asked_before(net):
    graph = analyze(*build(net))
    draw = np.random.default_rng(0)
    asked = []
    for _ in range(12):
        axes = [axis for axis in graph.axes if draw.random() < 0.6]
        keep = {axis.name: draw.random(axis.units) < draw.random() for axis in axes}
        asked.append((keep, graph.cost(keep)))
    for keep, cost in asked:
        assert cost == graph.program.cost(graph.alive(keep))
        assert cost == graph.cost(keep)
    assert graph.cost() == graph.program.cost(np.ones(graph.program.labels, bool))


def test_flags_that_are_changed_afterwards_are_seen():
    graph = analyze(*build("plain"))
    axis = graph.free[0]
    keep = {axis.name: np.ones(axis.units, bool)}
    whole = graph.cost(keep)
    keep[axis.name][: axis.units // 2] = False
    assert graph.cost(keep).params < whole.params


def test_flags_of_another_length_are_refused():
    graph = analyze(*build("plain"))
    first, second = graph.free[:2]
    dense = graph.cost()
    with pytest.raises(SpecError, match="found flags for 3"):
        graph.cost({first.name: np.zeros(first.units, bool), second.name: np.ones(3, bool)})
    assert graph.cost() == dense  # nothing of it was kept


def test_the_dense_cost_is_that_of_the_model():
    model, x = build("residual")
    cost = analyze(model, x).cost()
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_worths_are_what_plans_save():
    graph = analyze(*build("residual"))
    found = worths(graph)
    assert list(found) == [axis.name for axis in graph.axes]
    dense = graph.cost()
    for axis in graph.free:
        keep = np.arange(axis.units) < axis.units - axis.units // 2
        half = graph.cost({axis.name: keep})
        worth = found[axis.name]
        assert (worth.half_params, worth.half_macs) == (dense.params - half.params, dense.macs - half.macs)
        assert 0 < worth.half_params < worth.params <= dense.params
        assert 0 < worth.half_macs < worth.macs <= dense.macs


def test_the_worth_of_one_layer_is_counted_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    (worth,) = (w for n, w in worths(analyze(model, torch.randn(2, 6))).items() if n == "0")
    assert (worth.params, worth.macs) == (70 + 30, 2 * (60 + 30))
    assert (worth.half_params, worth.half_macs) == (35 + 15, 60 + 30)
