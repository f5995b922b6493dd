"""Mixtures of experts: the experts are an axis, whose numbers are computed anew over those that are left."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net
from secateur.graph import analyze
from secateur.planning import make
from secateur.testing import check_removing_is_zeroing

TOKENS = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


def mixture(body, experts=6):
    torch.manual_seed(0)
    up, down = nn.Parameter(torch.randn(experts, 8, 10) / 3), nn.Parameter(torch.randn(experts, 10, 8) / 3)
    return Net(body, stem=nn.Linear(8, 8), router=nn.Linear(8, experts), up=up, down=down, head=nn.Linear(8, 3)).eval()


def looked_up(s, x):
    """Every token multiplies with the matrices of its two experts."""
    x = s.stem(x)
    weights, chosen = s.router(x).softmax(-1).topk(2)
    hidden = F.silu(torch.einsum("td,tkdh->tkh", x, s.up[chosen]))
    return s.head(x + (torch.einsum("tkh,tkhd->tkd", hidden, s.down[chosen]) * weights[..., None]).sum(1))


def one_hot(s, x):
    """Every token visits all experts, weighted by zero except for two."""
    x = s.stem(x)
    weights, chosen = s.router(x).topk(2)
    share = (F.one_hot(chosen, 6) * weights.sigmoid()[..., None]).sum(1)
    hidden = F.relu(torch.einsum("td,edh->teh", x, s.up))
    return s.head(x + torch.einsum("teh,ehd,te->td", hidden, s.down, share))


def scattered(s, x):
    """The same, with the weights scattered to where they belong."""
    x = s.stem(x)
    logits = s.router(x)
    weights, chosen = logits.topk(2)
    share = torch.zeros_like(logits).scatter(1, chosen, weights.softmax(-1))
    hidden = F.relu(torch.einsum("td,edh->eth", x, s.up))
    return s.head(x + torch.einsum("eth,ehd,te->td", hidden, s.down, share))


@pytest.mark.parametrize("body", [looked_up, one_hot, scattered])
def test_experts_are_an_axis(body):
    model = mixture(body)
    experts = next(
        a for a in analyze(model, TOKENS).axes if ("router.weight", 0) in {(m.tensor, m.dim) for m in a.members}
    )
    assert (experts.units, experts.frozen, experts.exact) == (6, "", False)
    assert {("up", 0), ("down", 0), ("router.bias", 0)} <= {(m.tensor, m.dim) for m in experts.members}
    assert experts.least == 2  # every token is sent to two
    result = check_removing_is_zeroing(model, TOKENS, "params=60%")
    assert result.law.oracle == "zeroed program"
    assert result.model.up.shape[0] < 6


def test_at_least_as_many_experts_stay_as_every_token_visits():
    model = mixture(looked_up)
    graph = analyze(model, TOKENS)
    name = next(a.name for a in graph.axes if a.least == 2)
    plan = make(model, graph, budget="params=90%", overrides={name: 0.99})
    assert int(plan.units[name].sum()) == 2


def test_numbers_of_experts_that_are_computed_with_keep_the_experts():
    def body(s, x):
        x = s.stem(x)
        weights, chosen = s.router(x).topk(2)
        return s.head(
            x + (torch.einsum("td,tkdh->tkh", x, s.up[(chosen + 1) % 6]).sum((1, 2)) * weights.sum(-1))[:, None]
        )

    frozen = {
        a.frozen
        for a in analyze(mixture(body), TOKENS).axes
        if ("router.weight", 0) in {(m.tensor, m.dim) for m in a.members}
    }
    assert any("positions in it are computed with in aten.add" in why for why in frozen)
