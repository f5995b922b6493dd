"""What holds results to account: the zeroed program, the captured program, the sizes that a program was made for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, build, conv, image
from secateur.apply.oracle import ZeroedProgram
from secateur.apply.shrink import relative_error, shrink
from secateur.errors import DataError, LawError, TraceError
from secateur.graph import analyze
from secateur.graph.rules import REWRITES, RULES
from secateur.graph.trace import run
from secateur.planning import make
from secateur.testing import check_removing_is_zeroing


def normed():
    """A stream under a norm, rotary pairs, gated units: zeroing the weights is not enough here."""

    def body(s, x):
        y = s.norm(s.stem(x))
        q, k, v = (p(y).view(2, 5, 2, 6).transpose(1, 2) for p in (s.q, s.k, s.v))
        angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., 3:], t[..., :3]], -1) * sin for t in (q, k))
        y = y + s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))
        return s.head(s.norm2(y))

    torch.manual_seed(0)
    widths = {"q": (8, 12), "k": (8, 12), "v": (8, 12), "o": (12, 8), "stem": (6, 8), "head": (8, 3)}
    parts = {name: nn.Linear(*size) for name, size in widths.items()}
    return Net(body, norm=nn.RMSNorm(8), norm2=nn.LayerNorm(8), **parts).eval(), torch.randn(2, 5, 6)


def test_the_zeroed_program_is_the_program_where_nothing_goes():
    model, x = normed()
    graph = analyze(model, x)
    whole = ZeroedProgram(graph.program, model, graph.alive({}))
    assert relative_error(run(whole, x), run(model, x)) < 1e-6


def test_a_norm_is_taken_over_what_stays():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    graph = analyze(model, x)
    axis = graph.free[0]
    keep = torch.tensor([True] * 5 + [False] * 3).numpy()
    found = run(ZeroedProgram(graph.program, model, graph.alive({axis.name: keep})), x)
    first, norm, last = model
    h = F.layer_norm(F.linear(x, first.weight[:5], first.bias[:5]), (5,), norm.weight[:5], norm.bias[:5])
    assert relative_error(found, F.linear(h, last.weight[:, :5], last.bias)) < 1e-6


def test_what_is_under_a_norm_is_held_to_the_zeroed_program():
    assert check_removing_is_zeroing(*normed(), "params=50%").law.oracle == "zeroed program"


@pytest.mark.parametrize("name", ["flip", "roll"])
def test_a_wrong_rule_is_caught(name, monkeypatch):
    """Here the rules say that an operator leaves channels where they are, and it does not."""

    def body(s, x):
        moved = s.a(x).flip(1) if name == "flip" else s.a(x).roll(3, 1)
        return s.c(s.norm(moved + s.b(x)))

    torch.manual_seed(0)
    net = Net(body, a=nn.Linear(6, 10), b=nn.Linear(6, 10), norm=nn.LayerNorm(10), c=nn.Linear(10, 3)).eval()
    x = torch.randn(4, 6)
    check_removing_is_zeroing(net, x)
    monkeypatch.setitem(RULES, name, lambda op: op.dims("self"))
    monkeypatch.setitem(REWRITES, name, lambda op, cut: {})
    with pytest.raises(LawError, match="differs from the zeroed program"):
        check_removing_is_zeroing(net, x)


def test_rotary_pairs_stay_pairs():
    widths = {a.units for a in analyze(*normed()).free if a.name.endswith("head width")}
    assert widths == {3}  # six indices, two of a pair together


def test_a_capture_that_computes_something_else_proves_nothing():
    def body(s, x):
        return s.b(F.relu(s.a(x))) * (2.0 if torch.compiler.is_exporting() else 1.0)

    model, x = Net(body, a=conv(3, 8), b=conv(8, 4)).eval(), image()
    plan, before = make(model, analyze(model, x)), model(x)
    with pytest.raises(TraceError, match=r"captured of Net differs from the model itself by 1 on the example inputs"):
        shrink(model, plan)
    assert torch.equal(model(x), before)


def test_a_program_refuses_sizes_that_it_was_not_made_for():
    model, x = build("option_a_shortcut")
    plan = make(model, analyze(model, x), budget="params=60%")
    small = shrink(model, plan)
    assert small(torch.randn(7, 3, 8, 8)).shape == (7, 5)
    with pytest.raises(DataError, match=r"shape \[2, 3, 9, 8\], this program was made for \[any, 3, 8, 8\]"):
        small(torch.randn(2, 3, 9, 8))


def test_parameters_that_the_example_does_not_reach_are_counted_and_named():
    model, x = build("plain")
    model.spare = nn.Parameter(torch.zeros(5, 7))
    graph = analyze(model, x)
    assert graph.program.unread == ("spare",)
    assert graph.cost().params == sum(p.numel() for p in model.parameters())
    assert "spare" in shrink(model, make(model, graph)).state_dict()
