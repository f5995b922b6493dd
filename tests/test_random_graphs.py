"""The law over networks that are drawn at random: 200 of them here, 2,000 under ``-m nightly``."""

from __future__ import annotations

import pytest
from random_graphs import Drawn

from secateur.apply.shrink import carry_out
from secateur.errors import BudgetError
from secateur.graph import analyze
from secateur.planning import make

CHUNK = 20


def check(seed: int) -> int:
    """Hold one network to the law, at 60 % of its parameters or as near as it can get; the units that went."""
    net = Drawn(seed).eval()
    x = net.example()
    graph = analyze(net, x)
    wishes = {"criterion": "random", "allocate": "uniform", "seed": seed}
    try:
        plan = make(net, graph, budget="params=60%", **wishes)
    except BudgetError as error:
        if error.nearest is None:
            return 0  # everything is frozen, and the error said so
        plan = make(net, graph, budget=f"params={min(100, 100 * error.nearest + 0.01):.2f}%", **wishes)
    done = carry_out(net, plan)
    assert done.law.error <= done.law.tolerance
    return sum(int((~flags).sum()) for flags in plan.units.values())


def check_all(start: int) -> None:
    removed = []
    for seed in range(start, start + CHUNK):
        try:
            removed.append(check(seed))
        except Exception as error:
            raise AssertionError(f"network {seed} ({', '.join(Drawn(seed).kinds)}): {error}") from error
    assert sum(n > 0 for n in removed) >= 0.8 * CHUNK, f"little was free in {removed}"


@pytest.mark.parametrize("start", range(0, 200, CHUNK))
def test_removing_is_zeroing_in_any_network(start: int) -> None:
    check_all(start)


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(200, 2200, CHUNK))
def test_removing_is_zeroing_in_two_thousand_more(start: int) -> None:
    check_all(start)
