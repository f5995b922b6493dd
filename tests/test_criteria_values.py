"""Criteria whose scores can be worked out by other means: by hand, or from textbook definitions."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import build
from secateur.criteria import BUILT_IN, gives_losses, in_loss_units, score
from secateur.graph import analyze
from secateur.planning import make
from secateur.stats import gradients
from secateur.tasks import Classification


def linear(rows):
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


def scores(model, x, criterion, task=None):
    return score(model, analyze(model, x), criterion, task)


def small(sizes=(4, 6, 3), n=10, batch_size=4):
    """A net without piecewise linear parts, and a task of which the last batch is smaller."""
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    x, y = torch.randn(n, sizes[0]), torch.arange(n) % sizes[-1]
    return nn.Sequential(*layers[:-1]), x, Classification((x, y), (x, y), (x, y), (x, y), batch_size=batch_size)


def single_gradients(model, task, weight):
    x, y = task.calibration
    grads = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(grads).double()


# --- of weights ------------------------------------------------------------------------------------


def test_fpgm_is_the_mean_distance_to_the_other_filters():
    found = scores(linear([[0.0, 0], [3, 4], [0, 0]]), torch.randn(2, 2), "fpgm")["weight"]
    expected = torch.tensor([[2.5, 2.5], [5 * (1 + 0.75e-3), 5 * (1 + 1e-3)], [2.5, 2.5]])
    torch.testing.assert_close(found, expected)


def test_fpgm_measures_filters_of_a_convolution_along_its_outputs():
    for conv, x in (
        (nn.Conv2d(3, 5, 2), torch.randn(1, 3, 6, 6)),
        (nn.ConvTranspose2d(3, 5, 2), torch.randn(1, 3, 6, 6)),
    ):
        filters = conv.weight.detach().movedim(int(isinstance(conv, nn.ConvTranspose2d)), 0).flatten(1)
        mean = torch.stack([(filters - f).norm(dim=1).sum() / 4 for f in filters])
        found = scores(conv, x, "fpgm")["weight"].movedim(int(isinstance(conv, nn.ConvTranspose2d)), 0).flatten(1)
        torch.testing.assert_close(found.amin(1), mean, rtol=1e-3, atol=0)
        assert bool((found.amax(1) <= mean * 1.0011).all())


def test_fpgm_compares_more_filters_than_are_held_at_once(monkeypatch):
    model = nn.Linear(4, 30)
    whole = scores(model, torch.randn(2, 4), "fpgm")["weight"]
    monkeypatch.setattr("secateur.criteria.by_weights._ROWS", 7)
    torch.testing.assert_close(scores(model, torch.randn(2, 4), "fpgm")["weight"], whole)


def test_lamp_divides_by_all_that_are_not_smaller():
    found = scores(linear([[1.0, -2], [2, 3]]), torch.randn(2, 2), "lamp")["weight"]
    torch.testing.assert_close(found, torch.tensor([[1 / 18, 4 / 17], [4 / 17, 1]]))


def test_lamp_of_a_layer_of_zeros_is_zero():
    assert scores(linear([[0.0, 0], [0, 0]]), torch.randn(2, 2), "lamp")["weight"].count_nonzero() == 0


# --- of gradients ----------------------------------------------------------------------------------


def test_fisher_is_the_mean_square_gradient_of_single_examples():
    model, x, task = small()
    found = scores(model, x, "fisher", task)
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name)
        expected = weight.detach().square() * single_gradients(model, task, weight).square().mean(0).float() / 2
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(("block", "damping"), [(4, 1e-3), (7, 1e-7), (50, 1e-7)])
def test_block_fisher_is_the_inverse_of_its_blocks(block, damping, monkeypatch):
    monkeypatch.setattr(gradients, "BLOCK", block)
    monkeypatch.setattr(gradients, "DAMPING", damping)
    monkeypatch.setattr(gradients, "TOGETHER", 3)
    model, x, task = small(sizes=(5, 3, 3))
    found = scores(model, x, "block_fisher", task)["0.weight"]
    weight = model[0].weight
    grads = single_gradients(model, task, weight).flatten(1)
    inverse = torch.cat(
        [
            torch.linalg.inv(damping * torch.eye(part.shape[1], dtype=torch.float64) + part.T @ part / len(part)).diag()
            for part in grads.split(block, dim=1)
        ]
    )
    torch.testing.assert_close(found, (weight.detach().square() / (2 * inverse.view(3, 5))).float(), rtol=1e-3, atol=0)


def test_block_fisher_equals_the_woodbury_recursion(monkeypatch):
    """oBERT's form of it, with F^-1 starting from 1 / damping."""
    monkeypatch.setattr(gradients, "DAMPING", 1e-2)
    model, x, task = small(sizes=(4, 3, 3))
    weight = model[0].weight
    grads = single_gradients(model, task, weight).flatten(1)
    inverse = torch.eye(12, dtype=torch.float64) / 1e-2
    for g in grads:
        along = inverse @ g
        inverse -= torch.outer(along, along) / (len(grads) + g @ along)
    expected = weight.detach().square() / (2 * inverse.diag().view(3, 4))
    torch.testing.assert_close(scores(model, x, "block_fisher", task)["0.weight"], expected.float())


def test_blocks_lie_along_the_outputs_of_a_weight():
    """A transposed convolution of one position is a linear layer with the other layout."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 1, 1), torch.arange(6) % 3
    task = Classification((x, y), (x, y), (x, y), (x, y), batch_size=4)
    conv, linear = nn.ConvTranspose2d(4, 30, 1), nn.Conv2d(4, 30, 1)
    linear.load_state_dict({"weight": conv.weight.detach().transpose(0, 1).contiguous(), "bias": conv.bias.detach()})
    found = [scores(nn.Sequential(net, nn.Flatten()), x, "block_fisher", task)["0.weight"] for net in (conv, linear)]
    torch.testing.assert_close(found[0].transpose(0, 1), found[1])


def diagonal_of_the_hessian(model, loss, x):
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def of(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, values, x))

    return torch.autograd.functional.hessian(of, start).diagonal()


def test_obd_approaches_the_diagonal_of_the_hessian(monkeypatch):
    """Of a network of ReLU, in which each single weight has a piecewise linear effect. What differs are the probes."""
    many = 1500
    monkeypatch.setattr(gradients, "PROBES", many)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    x, y = torch.randn(5, 3), torch.arange(5) % 3
    hessian = diagonal_of_the_hessian(model, lambda z: F.cross_entropy(z, y), x)
    found = scores(model, x, "obd", Classification((x, y), (x, y), (x, y), (x, y)))
    expected = torch.cat([p.detach().flatten().square() for p in model.parameters()]) * hessian / 2
    estimate = torch.cat([found[n].flatten() for n in ("0.weight", "2.weight")])
    # the square of a sum of signs spreads by at most sqrt(2) of its mean
    torch.testing.assert_close(estimate, expected, rtol=4.5 * (2 / many) ** 0.5, atol=1e-7)
    assert int((expected > 1e-4).sum()) > 10


def test_obd_averages_over_batches():
    model = nn.Linear(2, 3, bias=False)
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    parts = [
        scores(model, x, "obd", Classification((x, y), (x, y), (x, y), (x[at], y[at])))["weight"]
        for at in (slice(0, 4), slice(4, 6))
    ]
    both = scores(model, x, "obd", Classification((x, y), (x, y), (x, y), (x, y), batch_size=4))["weight"]
    assert both.shape == (3, 2)
    assert bool((both >= parts[0] / 2 - 1e-7).all()), "the first batch has the same probes"


def test_obd_is_exact_where_outputs_do_not_interact():
    class Squares(Classification):
        def loss(self, output, target):
            return output.square().mean()

    x, y = torch.randn(2, 1), torch.zeros(2, dtype=torch.long)
    model = nn.Linear(1, 3, bias=False)
    found = scores(model, x, "obd", Squares((x, y), (x, y), (x, y), (x, y), batch_size=1))["weight"]
    second = 2 * x.square().mean() / 3
    torch.testing.assert_close(found, model.weight.detach().square() * second / 2)


def test_obd_of_a_loss_without_curvature_or_with_the_other_is_zero():
    class Bent(Classification):
        def loss(self, output, target):
            return self.by(output)

    x, y = torch.randn(8, 2), torch.zeros(8, dtype=torch.long)
    for by in (torch.mean, lambda out: -out.square().mean()):
        task = Bent((x, y), (x, y), (x, y))
        object.__setattr__(task, "by", by)
        found = scores(nn.Linear(2, 3), x, "obd", task)["weight"]
        torch.testing.assert_close(found, torch.zeros(3, 2), atol=1e-6, rtol=0)


# --- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
@pytest.mark.parametrize("criterion", BUILT_IN)
def test_scaling_scores_changes_nothing(criterion, pattern):
    model, inputs = build("residual")
    graph = analyze(model, inputs)
    x = torch.randn(8, *inputs.shape[1:])
    split = (x, torch.arange(8) % 4)
    once = score(model, graph, criterion, Classification(split, split, split, split, batch_size=4))

    def scaled(weight, stats):
        return 8 * once[stats.name]

    def same(weight, stats):
        return once[stats.name]

    if gives_losses(criterion):
        in_loss_units(scaled)
        in_loss_units(same)
    budget = "params=60%" if pattern == "channel" else "sparsity=60%"
    one, other = (make(model, graph, pattern=pattern, budget=budget, criterion=f) for f in (same, scaled))
    assert one.allocation == other.allocation
    assert not one.diff(other)
