"""Modules that cannot be captured: the rest of the model is pruned around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv, image
from secateur.errors import BudgetError, PlanError, TraceError
from secateur.graph import analyze
from secateur.measure import measure
from secateur.planning import make
from secateur.testing import check_removing_is_zeroing


class Choosy(nn.Module):
    """Which of two convolutions runs depends on the values that come in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = conv(width, width), conv(width, width)

    def forward(self, x, *, scale=1.0):
        return (self.one(x) if x.mean() > 0 else self.other(x)) * scale


def net():
    def body(s, x):
        x = s.stem(x)
        x = x + s.b(F.relu(s.a(x)))
        x = s.second(s.first(x), scale=2.0)
        return s.head(F.relu(s.c(x)))

    torch.manual_seed(0)
    parts = {"stem": conv(3, 8), "a": conv(8, 12), "b": conv(12, 8), "c": conv(8, 10), "head": conv(10, 4)}
    return Net(body, first=Choosy(8), second=Choosy(8), **parts).eval()


def test_what_cannot_be_followed_stays_and_says_why():
    model = net()
    graph = analyze(model, image())
    assert {a.name: a.units for a in graph.free} == {"a": 12, "c": 10}
    stream = next(a for a in graph.axes if ("stem.weight", 0) in {(m.tensor, m.dim) for m in a.members})
    assert stream.frozen.startswith("torch.export cannot follow first (Choosy): ")
    assert "test_hidden.py" in stream.frozen
    assert {"first.one.weight", "second.other.weight"} <= set(graph.program.unread)
    assert len(graph.program.hidden) == 2


def test_the_rest_is_pruned_under_the_law_and_the_hidden_part_still_chooses():
    model = net()
    result = check_removing_is_zeroing(model, image(), "params=85%")
    assert result.form == "module"
    assert "forward" not in vars(model.first)
    for sign in (-1, 1):
        assert result.model(sign * image().abs()).shape == (2, 4, 8, 8)


def test_macs_that_cannot_be_counted_are_not_named():
    model, x = net(), image()
    assert measure(model, x, seconds=0.01).macs is None
    with pytest.raises(BudgetError, match=r"macs=50% cannot be counted: torch.export cannot follow first"):
        make(model, analyze(model, x), budget="macs=50%")


def test_a_class_that_holds_on_to_sizes_cannot_be_shrunk_around_a_hidden_module():
    def body(s, x):
        x = s.a(s.choosy(s.stem(x)))
        return s.b(x[:, :6]) + s.c(x[:, 6:])

    parts = {"stem": conv(3, 8), "a": conv(8, 12), "b": conv(6, 4), "c": conv(6, 4)}
    model = Net(body, choosy=Choosy(8), **parts).eval()
    with pytest.raises(PlanError, match=r"its program cannot stand in for it: torch.export cannot follow choosy"):
        check_removing_is_zeroing(model, image(), "params=90%")


def test_a_model_that_itself_cannot_be_followed_is_refused():
    with pytest.raises(TraceError, match=r"Choosy cannot be captured by torch.export.*usual remedies"):
        analyze(Choosy(3), image())
