"""Where the outputs come out that statistics are taken of."""

import pytest
import torch
from stats_of import outputs_of, share, size
from torch import nn
from torch.nn import functional as F

from nets import build
from secateur.graph import analyze
from secateur.stats import collect
from secateur.tasks import Classification


def test_outputs_of_a_module_are_those_a_hook_sees():
    model, inputs = build("plain")
    model.eval()
    seen = {}
    model[0].register_forward_hook(lambda module, args, y: seen.setdefault("0", []).append(y.detach()))
    x = torch.randn(10, *inputs.shape[1:])
    found = outputs_of(model, inputs, data=x)
    seen.clear()
    with torch.no_grad():
        model(x)
        on = share(model[:3](x), 1, lambda v: v > 0)
    torch.testing.assert_close(found["0.weight"][0], size(torch.cat(seen["0"]), 1))
    torch.testing.assert_close(found["0.weight"][1], on)
    assert not torch.equal(on, share(torch.cat(seen["0"]), 1, lambda v: v > 0)), "the batch norm moves some across zero"


class Functional(nn.Module):
    """A weight used functionally, one used twice, a product from the left, and an einsum."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 4))
        self.twice = nn.Parameter(torch.randn(5, 5))
        self.left = nn.Parameter(torch.randn(6, 5))
        self.named = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        first = F.relu(F.linear(x, self.a))
        once = F.linear(first, self.twice)
        again = F.linear(torch.tanh(once), self.twice)
        left = (self.left @ again.mT).mT
        return torch.einsum("bi,io->bo", left, self.named)


def test_weights_used_functionally_and_twice():
    model, x = Functional(), torch.randn(7, 4)
    found = outputs_of(model, x)
    with torch.no_grad():
        first = F.linear(x, model.a)
        once = F.linear(F.relu(first), model.twice)
        again = F.linear(torch.tanh(once), model.twice)
        left = again @ model.left.mT
        both = torch.cat([once, again])
    torch.testing.assert_close(found["a"], (size(first, 1), share(F.relu(first), 1)))
    torch.testing.assert_close(found["twice"], (size(both, 1), torch.ones(5)))
    torch.testing.assert_close(found["left"][0], size(left, 1))
    torch.testing.assert_close(found["named"][0], size(left @ model.named.detach(), 1))


def test_tied_weights_count_all_their_uses():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model, x = nn.Sequential(a, nn.ReLU(), b, nn.Flatten()), torch.randn(6, 4)
    found = outputs_of(model, x)
    with torch.no_grad():
        outs = torch.cat([a(x), b(a(x).relu())])
        behind = torch.cat([a(x).relu(), b(a(x).relu())])
    assert list(found) == ["0.weight"]
    torch.testing.assert_close(found["0.weight"], (size(outs, 1), share(behind, 1)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions_of_both_directions_and_in_groups(kind, groups):
    model, x = nn.Sequential(kind(4, 6, 3, groups=groups, bias=False), nn.ReLU()), torch.randn(5, 4, 9)
    found = outputs_of(model, x)["0.weight"]
    with torch.no_grad():
        y = model[0](x)
    if kind is nn.ConvTranspose1d and groups == 2:  # the weight is (in, out / groups): groups share its outputs
        y = torch.cat([y[:, :3], y[:, 3:]])
    torch.testing.assert_close(found, (size(y, 1), share(y.relu(), 1)))


def test_a_matrix_times_a_vector():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return (self.w @ x.mean(0)).relu()[None]

    x = torch.randn(3, 4)
    task = Classification(*[(x, torch.zeros(3, dtype=torch.long))] * 4, batch_size=3)
    model = Vector()
    found = collect(model, analyze(model, x), ["activation", "active"], task)["w"]
    y = model.w.detach() @ x.mean(0)
    torch.testing.assert_close(found["activation"], y.abs())
    torch.testing.assert_close(found["active"], (y > 0).float())


@pytest.mark.parametrize(
    ("behind", "on"),
    [
        (nn.GELU(), lambda y: F.gelu(y) > 0),
        (nn.Sequential(nn.LayerNorm(5), nn.SiLU()), lambda y: F.layer_norm(y, (5,)) > 0),
        (nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True)), lambda y: y > 0),
        (nn.Hardtanh(0, 6), lambda y: y > 0),
        (nn.Tanh(), lambda y: y != 0),
        (nn.Identity(), lambda y: y != 0),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 5)), nn.ReLU()), lambda y: y != 0),
    ],
)
def test_what_counts_as_on(behind, on):
    model, x = nn.Sequential(nn.Linear(4, 5), behind, nn.Linear(5, 3)).eval(), torch.randn(20, 4)
    with torch.no_grad():
        y = model[0](x)
    found = outputs_of(model, x)["0.weight"]
    torch.testing.assert_close(found[0], size(y, 1))
    torch.testing.assert_close(found[1], share(y, 1, on))


def test_a_residual_sum_is_followed_to_the_nonlinearity_behind_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x).relu()
            return (self.b(y) + y).relu()

    model, x = Residual(), torch.randn(20, 4)
    with torch.no_grad():
        expected = share(model(x), 1)
    torch.testing.assert_close(outputs_of(model, x)["b.weight"][1], expected)


def test_texts_of_other_lengths_than_the_example():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, ids):
            return self.down(self.up(self.embed(ids)).relu()).mean(1)

    class Texts(Classification):
        def batches(self, split):
            for length in (5, 2, 7):
                yield torch.arange(3 * length).view(3, length) % 9, torch.arange(3)

    model = Text()
    x = torch.zeros(2, 4, dtype=torch.long)
    task = Texts(*[(x, torch.zeros(2, dtype=torch.long))] * 3)
    found = collect(model, analyze(model, x), ["activation", "grad_abs"], task)
    with torch.no_grad():
        outs = torch.cat([model.up(model.embed(ids)).flatten(0, 1) for ids, _ in task.batches("calibration")])
    torch.testing.assert_close(found["up.weight"]["activation"], size(outs, 1))
    grads = [
        torch.autograd.grad(task.loss(model(ids), y), model.up.weight)[0].abs()
        for ids, y in task.batches("calibration")
    ]
    torch.testing.assert_close(found["up.weight"]["grad_abs"], torch.stack(grads).mean(0))
